"""PaliGemma 2: SigLIP's image tokens in front of Gemma 2's text tokens.

PaliGemma 2: https://arxiv.org/abs/2412.03555. Parameters travel as the plain tree
{"img": …, "llm": …} with the names of the original checkpoints, and {"masks": …} where a mask
decoder reads the hidden states (see `mask_decoder`). One row, with N image tokens:

    tokens      img … img  BOS  prefix … \\n   target … EOS  PAD PAD
    mask_ar      0  …  0    0     0  …   0      1   …   1    ·   ·     0: all see all, 1: causal
    mask_input   1  …  1    1     1  …   1      1   …   1    0   0     0: seen by nobody
    position     0  …       N    N+1 …                       ·   ·     counts mask_input
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rg_jax.model import lora
from rg_jax.model.config import ModelConfig
from rg_jax.model.gemma2 import Gemma2, positions_of, prefix_lm_mask
from rg_jax.model.mask_decoder import MaskDecoder
from rg_jax.model.siglip import SigLIP

AnyArray = Array | np.ndarray


@flax.struct.dataclass
class Cache:
    """What the decoder remembers of the tokens so far, in fixed slots.

    `memory`: keys and values (B, K, S, H) of each layer, heads first. `valid`: (B, S), False for
    padding and for slots not yet written. `position`: (B,), that of the next token. `slot`: where
    the next token goes.
    """

    memory: tuple[tuple[jax.Array, jax.Array], ...]
    valid: jax.Array
    position: jax.Array
    slot: jax.Array


class PaliGemma(nn.Module):
    """Call its methods with `apply(model, params, …, method="…")` of this module."""

    config: ModelConfig

    def setup(self):
        self.img = SigLIP(self.config)
        self.llm = Gemma2(self.config)
        if self.config.masks is not None:
            self.masks = MaskDecoder(self.config.masks)

    def embed_image(
        self, image: Float[AnyArray, "B S S 3"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N W"]]:
        """Images in [-1, 1] → image tokens for the decoder, and the features before the head."""
        return self.img(jnp.asarray(image))

    def embed_text(self, text: Int[AnyArray, "B T"]) -> Float[Array, "B T D"]:
        """Token ids → scaled token vectors."""
        return self.llm.embed(jnp.asarray(text))

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Hidden states → float32 logits over the table's rows, padding rows at -2.4e38."""
        return self.llm.logits(hidden)

    def decode_masks(
        self, image_features: Float[AnyArray, "B N W"], prompts: Float[AnyArray, "B K D"]
    ) -> Float[Array, "B K h w"]:
        """Mask logits, float32, of K mentions per image, on the mask decoder's own grid.

        `image_features` as `__call__` gives them, `prompts` the hidden state at each `</seg>`.
        """
        return self.masks(image_features, prompts)[:, :, 0]

    def everything(self, image, text, mask_ar):
        """Goes through all parameters, to make them (see `init_params`)."""
        out = self(image, text, mask_ar)
        if self.config.masks is not None:
            self.decode_masks(out["image_features"], out["hidden"][:, -1:])

    def __call__(
        self,
        image: Float[AnyArray, "B S S 3"],
        text: Int[AnyArray, "B T"],
        mask_ar: Int[AnyArray, "B T"],
        mask_input: Bool[AnyArray, "B T"] | None = None,
        text_only: bool = False,
    ) -> dict[str, Array]:
        """Hidden states of every token; logits are left to whoever knows where they are needed.

        Returns `hidden` (B, N + T, D), after the final norm, and `image_features` (B, N, W), the
        encoder's output before the head. `mask_input` None: every text token is valid.
        `text_only`: `hidden` (B, T, D) of the text alone.
        """
        x, features, valid = self._embed(image, text, mask_input)
        ar = jnp.asarray(mask_ar, jnp.int32)
        mask = prefix_lm_mask(valid, jnp.pad(ar, ((0, 0), (features.shape[1], 0))))
        first = features.shape[1] if text_only else 0
        hidden, _ = self.llm(x, positions_of(valid), mask, first=first)
        return {"hidden": hidden, "image_features": features}

    def prefill(
        self,
        image: Float[AnyArray, "B S S 3"],
        text: Int[AnyArray, "B T"],
        mask_input: Bool[AnyArray, "B T"] | None,
        max_new_tokens: int,
    ) -> tuple[Float[Array, "B D"], Cache, Float[Array, "B N W"]]:
        """Read image and prompt: hidden state of the last valid token, memory, image features.

        Prompts may be ragged (`mask_input` False on the padding); all of a prompt sees all of it.
        The memory has room for `max_new_tokens` more.
        """
        x, features, valid = self._embed(image, text, mask_input)
        mask = prefix_lm_mask(valid, jnp.zeros(valid.shape, jnp.int32))
        hidden, (keys, values) = self.llm(x, positions_of(valid), mask, keep_keys=True)
        length = valid.shape[1]
        last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
        room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))
        cache = Cache(
            memory=tuple(
                (jnp.pad(k, room), jnp.pad(v, room)) for k, v in zip(keys, values, strict=True)
            ),
            valid=jnp.pad(valid, ((0, 0), (0, max_new_tokens))),
            position=valid.sum(axis=1, dtype=jnp.int32),
            slot=jnp.asarray(length, jnp.int32),
        )
        return hidden[jnp.arange(hidden.shape[0]), last], cache, features

    def decode_step(
        self, tokens: Int[Array, " B"], cache: Cache, layers: tuple[Any, ...]
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read one more token per row: its hidden state, and the memory with it in.

        `layers`: of `gemma2.unstacked`, for parameters without LoRA factors.
        """
        valid = cache.valid.at[:, cache.slot].set(True)
        hidden, memory = self.llm.step(
            self.llm.embed(tokens[:, None]),
            cache.position[:, None],
            valid[:, None, :],
            cache.memory,
            cache.slot,
            layers,
        )
        return hidden[:, 0], Cache(
            memory=memory, valid=valid, position=cache.position + 1, slot=cache.slot + 1
        )

    def _embed(self, image, text, mask_input):
        tokens, features = self.embed_image(image)
        x = jnp.concatenate([tokens, self.embed_text(text)], axis=1)
        mask = jnp.ones(text.shape, bool) if mask_input is None else jnp.asarray(mask_input, bool)
        return x, features, jnp.pad(mask, ((0, 0), (tokens.shape[1], 0)), constant_values=True)


def apply(model: nn.Module, params: Any, *args: Any, method: str = "__call__", **kwargs: Any):
    """`model.apply` for parameters, LoRA's factors among them, without Flax's outer "params"."""
    return model.apply(lora.variables(params, model.config), *args, method=method, **kwargs)


def init_params(config: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """Random float32 parameters for training from scratch.

    Meant for `jax.jit(functools.partial(init_params, config), out_shardings=…)(rng)`: the forward
    pass in it is then dead code, and every array is born where it belongs.
    """
    size = config.img.image_size
    image = jnp.zeros((1, size, size, 3), jnp.float32)
    text = jnp.zeros((1, 1), jnp.int32)
    params = PaliGemma(config).init(rng, image, text, text, method="everything")["params"]
    factors = lora.init_factors(config, jax.random.fold_in(rng, 1))
    return {**params, lora.ROOT: factors} if factors else params


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """The tree of parameters as jax.ShapeDtypeStruct, without making a single one."""
    return jax.eval_shape(lambda rng: init_params(config, rng), jax.random.key(0))


def cast_for_inference(params: Any, config: ModelConfig) -> Any:
    """Parameters in the dtype the products run in: a decoding loop need not cast them every turn.

    Norm scales and biases stay: they work in float32. Results are bit for bit the same. LoRA's
    factors, where there are any, are merged into the weights.
    """
    params = lora.merge(params, config)
    dtype = jnp.dtype(config.compute_dtype)

    def cast(path, leaf):
        keys = [entry.key for entry in path]
        return leaf if any("norm" in key.lower() for key in keys) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
