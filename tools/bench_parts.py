"""What the parts of a training step take, each compiled apart (see `tools.bench_train`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rg_jax.model.gemma2 import positions_of, prefix_lm_mask
from rg_jax.model.losses import blockwise_token_losses
from rg_jax.model.paligemma import apply
from rg_jax.training.state import TrainState, unflatten
from tools import bench_setup as setup


def parts(case: setup.Case, state: TrainState, batch, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each part for one step, all of its micro-batches together.

    They do not add up to the step: apart, nothing is fused across them or overlaps, and a backward
    pass under remat holds its own second forward pass.
    """
    runs = micro_batch_parts(case, state, batch)
    grads = jax.tree.map(jnp.ones_like, state.trainable)
    update = jax.jit(case.optimizer.update)
    runs["optimizer"] = lambda: update(grads, state.opt_state, state.trainable, state.step)
    found = {}
    for name, run in runs.items():
        spent = setup.interleave({name: lambda run=run: jax.block_until_ready(run())}, rounds)
        times = 1 if name == "optimizer" else case.accumulation
        found[name] = {"seconds": times * setup.summary(spent[name])["seconds"]}
    return found


def micro_batch_parts(case: setup.Case, state: TrainState, batch) -> dict[str, Callable[[], Any]]:
    """Name → a function that does this part of one micro-batch (and does not wait for it)."""
    model, dtype = case.model, jnp.dtype(case.config.compute_dtype)
    rows, n = case.batch // case.accumulation, case.config.img.num_tokens
    width = case.config.llm.width
    image, text = batch["image"][:rows], batch["text"][:rows]
    ar = jnp.pad(batch["mask_ar"][:rows, :-1], ((0, 0), (n, 0)))
    vectors = jnp.ones((rows, n + case.text_len, width), dtype)
    everything = {**state.trainable, **state.frozen}

    # Parameters are arguments everywhere: what a function only refers to becomes part of its code.
    def encoder(mine, rest, image):
        return apply(model, unflatten(rest | mine), image, method="embed_image")

    def decode(module, x, ar):
        valid = jnp.ones(x.shape[:2], bool)
        return module.llm(x, positions_of(valid), prefix_lm_mask(valid, ar), first=n)[0]

    def decoder(mine, rest, x, ar):
        return apply(model, unflatten(rest | mine), x, ar, method=decode)

    def loss(mine, rest, hidden, targets, counted):
        table = (rest | mine)["llm/embedder/input_embedding"]
        valid = case.config.valid_vocab
        return blockwise_token_losses(
            hidden,
            table,
            targets,
            block_size=case.block_size,
            valid_vocab=valid,
            counted=counted,
            groups=case.mesh.size,
        )

    def masks(mine, rest, prompts, features):
        tree = unflatten(rest | mine)
        return apply(model, tree, features, prompts, method="decode_masks")

    def forward(function, *inputs):
        jitted = jax.jit(function)
        return lambda: jitted({}, everything, *inputs)

    def backward(function, prefix, *inputs):
        """With the gradients of what is trained below `prefix`, and of the first input."""
        mine = {k: v for k, v in state.trainable.items() if k.startswith(prefix)}
        rest = {k: v for k, v in everything.items() if k not in mine}
        over = (0,) if prefix == "img/" else (0, 2)

        def total(*given):
            return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*given)))

        jitted = jax.jit(jax.grad(total, argnums=over))
        return lambda: jitted(mine, rest, *inputs)

    runs = {
        "encoder forward": forward(encoder, image),
        "decoder forward": forward(decoder, vectors, ar),
        "decoder and its gradients": backward(decoder, "llm/layers/", vectors, ar),
        "loss and its gradients": backward(
            loss,
            "llm/embedder/",
            vectors[:, n:],
            text[:, 1:],
            batch["mask_loss"][:rows, 1:] != 0,
        ),
    }
    if not case.freeze_encoder:
        runs["encoder and its gradients"] = backward(encoder, "img/", image)
    if case.slots:
        prompts = jnp.ones((rows, case.slots, width), dtype)
        features = jnp.ones((rows, n, case.config.img.width), dtype)
        runs["masks and their gradients"] = backward(masks, "masks/", prompts, features)
    return runs
