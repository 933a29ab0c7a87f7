"""Greedy decoding with a memory: one compiled loop that stops when every row has ended."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rg_jax.model.gemma2 import unstacked
from rg_jax.model.mask_decoder import resize_logits
from rg_jax.model.paligemma import AnyArray, PaliGemma, apply, cast_for_inference


def generate(
    model: PaliGemma,
    params: Any,
    image: Float[AnyArray, "B S S 3"],
    text: Int[AnyArray, "B T"],
    mask_input: Bool[AnyArray, "B T"] | None = None,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int = 0,
    active: Bool[AnyArray, " B"] | None = None,
    return_hidden: bool = False,
) -> Int[Array, "B new"] | dict[str, Array]:
    """The most likely continuation of each prompt, token by token.

    `text` holds prompts only, ragged where `mask_input` is False. Rows that are not `active`
    (fillers of a last batch) generate nothing and keep nobody waiting. Returns (B, max_new_tokens)
    int32: tokens up to and including EOS, then `pad_id`.

    With `return_hidden` returns a dict: `tokens`; `hidden` (B, max_new_tokens, D), the decoder's
    state after the final norm *at* each generated token (having read it), zero from EOS on; and
    `image_features` (B, N, W). That is what a mask decoder reads.

    Meant to be called under jax.jit with everything after `mask_input` but `active` fixed.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    params = cast_for_inference(params, model.config)
    layers = unstacked(params)
    batch = text.shape[0]

    def choose(hidden):
        return jnp.argmax(apply(model, params, hidden, method="logits"), axis=-1).astype(jnp.int32)

    last, cache, features = apply(
        model, params, image, text, mask_input, max_new_tokens, method="prefill"
    )
    done = jnp.zeros(batch, bool) if active is None else ~jnp.asarray(active, bool)
    token = jnp.where(done, pad_id, choose(last))
    tokens = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
    states = None
    if return_hidden:
        states = jnp.zeros((batch, max_new_tokens, last.shape[-1]), last.dtype)
    # Token i is read in turn i and gives token i + 1. The last one need not be read, unless its
    # own state is asked for.
    turns = max_new_tokens if return_hidden else max_new_tokens - 1

    def going_on(state):
        turn, _, done, *_ = state
        return (turn < turns) & ~done.all()

    def step(state):
        turn, token, done, tokens, states, cache = state
        hidden, cache = apply(model, params, token, cache, layers, method="decode_step")
        if return_hidden:
            states = states.at[:, turn].set(jnp.where(done[:, None], 0, hidden))
        token = jnp.where(done, pad_id, choose(hidden))
        tokens = tokens.at[:, turn + 1].set(token, mode="drop")
        return turn + 1, token, done | (token == eos_id), tokens, states, cache

    state = (jnp.int32(0), token, done | (token == eos_id), tokens, states, cache)
    _, _, _, tokens, states, _ = jax.lax.while_loop(going_on, step, state)
    if return_hidden:
        return {"tokens": tokens, "hidden": states, "image_features": features}
    return tokens


def masks_of_generated(
    model: PaliGemma,
    params: Any,
    generated: dict[str, Array],
    close_id: int,
    slots: int,
    size: int,
    threshold: float = 0.0,
) -> Bool[Array, "B K M M"]:
    """What the mask decoder makes of the first K = `slots` `</seg>` of every generated row.

    `generated`: of `generate` with `return_hidden`. A pixel is inside where its logit is above
    `threshold`: 0, a probability of one half, unless the published masks are wanted, which were cut
    at a logit of 0.5. M = `size`. Slots without a `</seg>` are empty.
    """
    found = generated["tokens"] == close_id
    spare = max(slots - found.shape[1], 0)  # more slots than tokens: the last ones stay empty
    at = jnp.argsort(~found, axis=1, stable=True)[:, :slots]
    prompts = jnp.take_along_axis(generated["hidden"], at[:, :, None], axis=1)
    logits = apply(
        model,
        cast_for_inference(params, model.config),
        generated["image_features"],
        prompts,
        method="decode_masks",
    )
    inside = resize_logits(logits, (size, size)) > threshold
    inside &= (jnp.arange(at.shape[1]) < found.sum(axis=1)[:, None])[:, :, None, None]
    return jnp.pad(inside, ((0, 0), (0, spare), (0, 0), (0, 0)))
