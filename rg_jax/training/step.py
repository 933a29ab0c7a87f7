"""The training step: loss over target tokens, accumulation, one optimizer update.

This file and `losses.py` are what a training run is; the rest moves data in and numbers out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rg_jax.errors import UserError
from rg_jax.model.config import ModelConfig
from rg_jax.model.lora import trained_rows
from rg_jax.model.losses import blockwise_token_losses, per_example
from rg_jax.model.mask_decoder import resize_logits
from rg_jax.model.mask_losses import mask_loss_sums
from rg_jax.model.paligemma import PaliGemma, apply
from rg_jax.training.mesh import AXIS, batch_sharding, replicated
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import TrainState, unflatten

# What of a batch enters the compiled step; the masks where the model has a mask decoder.
BATCH_KEYS = ("image", "text", "mask_ar", "mask_loss", "mask_input", "task")
MASK_KEYS = ("masks", "mask_at", "mask_valid")
NORMALISE = ("tokens", "examples")


@dataclasses.dataclass(frozen=True)
class MaskLoss:
    """How masks enter the loss: L_txt + `weight` · (L_kind + L_dice), see `model.mask_losses`."""

    kind: str = "focal"
    weight: float = 1.0


def on_device(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the compiled step takes."""
    return {key: batch[key] for key in (*BATCH_KEYS, *MASK_KEYS) if key in batch}


def row_losses(
    model: PaliGemma,
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    block_size: int,
    mask_loss: str = "focal",
    devices: int = 1,
) -> dict[str, jax.Array]:
    """Per row (B,): `text`, the summed cross-entropy of its target tokens, and `tokens`, their
    number; with masks in the batch also the sums `pixels` and `dice` over its `masks` masks.

    Position t of the text predicts token t + 1, so the last token is never fed to the model.
    `devices`: how many share the rows evenly.
    """
    text = batch["text"]
    out = apply(
        model,
        params,
        batch["image"],
        text[:, :-1],
        batch["mask_ar"][:, :-1],
        batch["mask_input"][:, :-1],
        text_only=True,
    )
    losses = blockwise_token_losses(
        out["hidden"],
        params["llm"]["embedder"]["input_embedding"],
        text[:, 1:],
        block_size=block_size,
        valid_vocab=model.config.valid_vocab,
        softcap=model.config.llm.final_softcap,
        last_rows=trained_rows(params, model.config),
        counted=batch["mask_loss"][:, 1:] != 0,
        groups=devices,
    )
    text_loss, tokens = per_example(losses, batch["mask_loss"][:, 1:])
    rows = {"text": text_loss, "tokens": tokens}
    if model.config.masks is not None and "masks" in batch:
        rows |= _mask_rows(model, params, batch, out, mask_loss)
    return rows


def _mask_rows(model, params, batch, out, kind) -> dict[str, jax.Array]:
    """The mask decoder reads the hidden state at each `</seg>` and the encoder's features."""
    prompts = jnp.take_along_axis(out["hidden"], batch["mask_at"][:, :, None], axis=1)
    logits = apply(model, params, out["image_features"], prompts, method="decode_masks")
    logits = resize_logits(logits, batch["masks"].shape[-2:])
    valid = batch["mask_valid"]
    sums = mask_loss_sums(logits, batch["masks"].astype(jnp.float32), valid, kind)
    return {k: v.sum(axis=1) for k, v in sums.items()} | {
        "masks": valid.sum(axis=1).astype(jnp.float32)
    }


def example_weights(mask_loss: jax.Array, normalise: str) -> tuple[jax.Array, jax.Array]:
    """Each row's factor on its summed loss, and the denominator of the whole batch.

    "tokens": every target token of the batch counts the same (Hugging Face's trainer).
    "examples": every example counts the same (big_vision).
    """
    tokens = mask_loss[:, 1:].sum(-1).astype(jnp.float32)
    if normalise == "tokens":
        return jnp.ones_like(tokens), jnp.maximum(tokens.sum(), 1.0)
    factors = jnp.where(tokens > 0, 1 / jnp.maximum(tokens, 1), 0.0)
    return factors, jnp.maximum((tokens > 0).sum().astype(jnp.float32), 1.0)


def in_compute_dtype(trainable: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The layers' matrices in the dtype that their products run in, all else as it is.

    Every product casts its weight anyway, and hands back a gradient of that dtype: done before,
    both are the same numbers. The token table stays, since gradients of two uses are added in it;
    vectors (norms, biases) cost nothing.
    """
    dtype = jnp.dtype(config.compute_dtype)
    layers = ("llm/layers/", "img/Transformer/")

    def cast(name, x):
        return x.astype(dtype) if name.startswith(layers) and x.ndim >= 3 else x

    return {name: cast(name, x) for name, x in trainable.items()}


def make_update(
    model: PaliGemma,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    tasks: int,
    accumulation: int = 1,
    block_size: int = 32768,
    normalise: str = "tokens",
    mask_loss: MaskLoss | None = None,
) -> Callable:
    """The function (state, batch) → (state, metrics), to be jitted once.

    `batch` holds `accumulation` micro-batches; the gradient is that of the whole batch however it
    is cut, because losses are summed and divided once by the batch's own denominator. Metrics:
    loss, loss and token sums per task (T,), gradient, update and parameter norms, learning rate;
    with masks their summed losses and their number.
    """
    mask_loss = mask_loss or MaskLoss()
    if normalise not in NORMALISE:
        raise UserError(f"config.loss.normalise={normalise}: must be one of {', '.join(NORMALISE)}")

    def micro_batches(batch):
        """(A·b, …) → (A, b, …); interleaved, so that every device keeps rows in each part."""

        def split(x):
            x = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, AXIS)))

        return jax.tree.map(split, batch)

    def loss_sum(trainable, frozen, batch):
        params = unflatten({**trainable, **frozen})
        rows = row_losses(model, params, batch, block_size, mask_loss.kind, mesh.size)
        total = (rows["text"] * batch["factor"]).sum()
        aux = _task_sums(rows, batch["task"], tasks)
        if "masks" in rows:
            masks = rows["pixels"] + rows["dice"]
            total = total + mask_loss.weight * (masks * batch["mask_factor"]).sum()
            aux |= {f"mask_{name}": rows[name].sum() for name in ("pixels", "dice", "masks")}
        return total, aux

    grad_fn = jax.value_and_grad(loss_sum, has_aux=True)

    def gradients(trainable, frozen, batch):
        # Once per step, not in every pass and every micro-batch: passes over all master weights
        # are saved, and devices that share them send half as much.
        weights = in_compute_dtype(trainable, model.config)
        if accumulation == 1:
            (loss, aux), grads = grad_fn(weights, frozen, batch)
            # Where there is no loop over the layers, the optimizer would read each stack of
            # gradients as an array per layer, in every one of its passes.
            grads = jax.lax.optimization_barrier(grads)
            # What a product hands back is computed with in the masters' float32, as sums are.
            return loss, aux, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trainable)

        def add(carry, micro):
            (loss, aux), grads = grad_fn(weights, frozen, micro)
            found = (loss, aux, grads)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), carry, found), None

        micro = jax.tree.map(lambda x: x[0], batch)
        (loss, aux), _ = jax.eval_shape(grad_fn, weights, frozen, micro)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, aux, trainable))
        return jax.lax.scan(add, zeros, batch)[0]

    def update(state: TrainState, batch: Mapping[str, jax.Array]):
        batch = on_device(batch)
        factor, denominator = example_weights(batch["mask_loss"], normalise)
        batch["factor"] = factor / denominator
        if "mask_valid" in batch:
            count = jnp.maximum(batch["mask_valid"].sum().astype(jnp.float32), 1.0)
            batch["mask_factor"] = jnp.broadcast_to(1 / count, factor.shape)
        if accumulation > 1:
            batch = micro_batches(batch)
        loss, aux, grads = gradients(state.trainable, state.frozen, batch)
        return finished(optimizer, state, grads, {"loss": loss, **aux})

    return update


def finished(optimizer: Optimizer, state: TrainState, grads, metrics: Mapping[str, Any]):
    """The end of a step: (next state, `metrics` with norms and learning rate)."""
    trainable, opt_state, norms = optimizer.update(
        grads, state.opt_state, state.trainable, state.step
    )
    metrics = {**metrics, **norms, "lr": optimizer.learning_rate(state.step)}
    return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics


def _task_sums(rows, task, tasks) -> dict[str, jax.Array]:
    group = jax.nn.one_hot(task, tasks, dtype=jnp.float32)
    return {"task_loss": rows["text"] @ group, "task_tokens": rows["tokens"] @ group}


def batch_shapes(model: ModelConfig, config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one whole batch, to compile the step before there is any data."""
    rows, length, side = config.batch_size, config.data.text_len, model.img.image_size
    text = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    shapes = {
        "image": jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32),
        "text": text,
        "mask_ar": text,
        "mask_loss": text,
        "mask_input": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        "task": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    if model.masks is not None:
        slots, size = config.masks.slots, config.masks.size or side
        shapes["masks"] = jax.ShapeDtypeStruct((rows, slots, size, size), jnp.uint8)
        shapes["mask_at"] = jax.ShapeDtypeStruct((rows, slots), jnp.int32)
        shapes["mask_valid"] = jax.ShapeDtypeStruct((rows, slots), jnp.bool_)
    return shapes


def jit_update(update: Callable, shardings: TrainState, mesh: Mesh) -> Callable:
    """Compiles the step with explicit shardings; the old state's memory is reused."""
    return jax.jit(
        update,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=(0,),
    )


def make_eval_loss(model: PaliGemma, mesh: Mesh, shardings, *, tasks: int, block_size: int):
    """Jitted (params, batch) → per-task loss and token sums, without gradients."""

    def eval_loss(params, batch):
        batch = {key: batch[key] for key in BATCH_KEYS}
        return _task_sums(
            row_losses(model, unflatten(params), batch, block_size, devices=mesh.size),
            batch["task"],
            tasks,
        )

    return jax.jit(
        eval_loss, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )
