"""Greedy answers from a model: the same for any batch size and any number of devices.

How a product is rounded depends on its shape, and a near tie between two words on the rounding.
So every device always runs one and the same program: `rows` prompts of the set's prompt length,
whole parameters, no exchange with other devices. More samples or more devices are more runs of
it, never another program; rows that are left over are filled up and ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rg_jax import run as run_lib
from rg_jax.data.masks import mask_close_id
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.model.generate import generate, masks_of_generated
from rg_jax.model.paligemma import cast_for_inference
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.state import flatten, unflatten

Params = dict[str, jax.Array]
FIELDS = ("image", "text", "mask_input", "index", "counts")


class Answered(NamedTuple):
    """One row of a batch: its `index` in the samples, generated ids up to and including EOS (the
    budget of tokens was too small where there is none), counters of its prompt, and its masks
    (K, M, M) at the first K `</seg>`, None without a mask decoder."""

    index: int
    tokens: np.ndarray
    counts: np.ndarray
    masks: np.ndarray | None


class Predictor:
    """Greedy decoding of a run's model. `rows`: prompts that each device answers at once."""

    def __init__(self, run: run_lib.Run, max_new_tokens: int, rows: int):
        self.run, self.rows = run, rows
        places = {**run.shardings.trainable, **run.shardings.frozen}
        whole = mesh_lib.replicated(run.mesh)

        def ready(params):
            return flatten(cast_for_inference(unflatten(params), run.model.config))

        self._ready = jax.jit(ready, in_shardings=(places,), out_shardings=whole)
        spread = P(mesh_lib.AXIS)
        on_each_device = jax.shard_map(
            self._answer(max_new_tokens),
            mesh=run.mesh,
            in_specs=(P(), *(spread for _ in FIELDS)),
            out_specs=spread,
            check_vma=False,
        )
        # Every host gets the answers of all of them.
        self._jitted = jax.jit(on_each_device, out_shardings=whole)

    def _answer(self, max_new_tokens: int):
        run = self.run
        with_masks = run.model.config.masks is not None
        data = run_lib.data_config(run.config)
        close_id = mask_close_id(run.tokenizer) if with_masks else -1

        def answer(params, image, text, mask_input, index, counts):
            params = unflatten(params)
            out = generate(
                run.model,
                params,
                image,
                text,
                mask_input,
                active=index >= 0,
                max_new_tokens=max_new_tokens,
                eos_id=run.tokenizer.eos_id,
                pad_id=run.tokenizer.pad_id,
                return_hidden=with_masks,
            )
            if not with_masks:
                return index, counts, out, None
            masks = masks_of_generated(
                run.model, params, out, close_id, data.mask_slots, data.mask_size
            )
            return index, counts, out["tokens"], masks

        return answer

    def prepare(self, params: Params) -> Params:
        """Flat parameters as this predictor takes them: in the dtype of inference, a copy on every
        device. Made once, not for every batch."""
        return self._ready(params)

    @property
    def unit(self) -> int:
        """Samples that all devices of all hosts answer at once."""
        return self.rows * self.run.mesh.size

    def __call__(
        self, prepared: Params, batch: Mapping[str, np.ndarray], left: int
    ) -> Iterator[Answered]:
        """Answers the rows of a batch, this host's part of it; each is given once, on every host.

        The batch is a multiple of `unit`; `left`: samples from its first row to the end of the
        set. Rows with index -1 are fillers and not given.
        """
        step = self.unit // jax.process_count()
        for start in range(0, len(batch["index"]), step):
            # Host 0 has the first rows: where it has none, nobody has.
            if start >= left:
                break
            fields = {name: batch[name][start : start + step] for name in FIELDS}
            arrays = mesh_lib.to_devices(fields, self.run.mesh)
            index, counts, tokens, masks = jax.device_get(self._jitted(prepared, *arrays.values()))
            for row in np.flatnonzero(index >= 0):
                yield Answered(
                    int(index[row]),
                    tokens[row],
                    counts[row],
                    None if masks is None else masks[row],
                )


def detokenise(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[str, bool]:
    """Generated ids (T,) up to EOS → text with its marks, and whether it ended by itself."""
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    text = tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens).strip()
    return text, bool(len(ends))


def fingerprint(params: Params) -> str:
    """A hash over every bit of flat parameters, the same however they are sharded.

    Sums of whole numbers modulo 2³², in any order, weighted by place so that no two parameters
    can change places unseen.
    """

    def one(value: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(value, jnp.dtype(f"uint{8 * value.dtype.itemsize}"))
        place = jnp.zeros(value.shape, jnp.uint32)
        for axis, size in enumerate(value.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, value.shape, axis
            )
        weight = place * jnp.uint32(2654435761) + jnp.uint32(0x9E3779B9)
        weight = (weight ^ (weight >> 15)) | jnp.uint32(1)
        return jnp.sum(bits.astype(jnp.uint32) * weight, dtype=jnp.uint32)

    sums: dict[str, Any] = jax.device_get(
        jax.jit(lambda tree: {name: one(value) for name, value in tree.items()})(params)
    )
    listing = [
        f"{name} {params[name].shape} {params[name].dtype} {int(value)}"
        for name, value in sorted(sums.items())
    ]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()
