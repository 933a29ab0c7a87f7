"""Grouped attention with an optional soft-cap.

What the encoder and the decoder share. Heads stand in front of tokens inside, (B, heads, tokens,
H), so that every product is a plain batch of matrices; the softmax has its own gradient, which
keeps two arrays of the scores' size where automatic differentiation keeps more and reads them
oftener (on a CPU half of the attention's time).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

AnyArray = Array | np.ndarray

# The names by which recompute policies keep results (see `siglip.remat_block`).
SCORES, MIXED = "scores", "mixed"
MADE = "made"  # of a weight and its input, with what LoRA adds to it
# Below every score, finite. Only where a softmax subtracts its largest score first.
MASKED = -2.3819763e38
# exp(±60) and sums of thousands of them are ordinary float32 numbers: nothing to subtract.
_SAFE_CAP = 60.0
_TINY = 1e-37


def soft_cap(x: Float[Array, "*n"], cap: float | None) -> Float[Array, "*n"]:
    """cap · tanh(x / cap); `x` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N T H"]:
    """As `attend` takes keys and values."""
    return x.swapaxes(1, 2)


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[AnyArray, "B T S"] | None = None,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """What each query mixes from the values it sees; query head n belongs to key head n // (N / K).

    `q` is already scaled; keys and values stand heads first; `mask` says who sees whom, None:
    everyone everyone. Scores and softmax are float32, soft-capped at `cap`. A query that sees
    nothing gets zeros.
    """
    batch, length, n, h = q.shape
    kv = keys.shape[1]
    # Queries of one group are rows of one matrix: keys are never repeated.
    rows = heads_first(q).reshape(batch, kv, n // kv * length, h)
    scores = checkpoint_name(_scores(rows, keys), SCORES)
    scores = scores.reshape(batch, kv, n // kv, length, -1)
    visible = None if mask is None else jnp.asarray(mask)[:, None, None, :, :]
    weights = attention_weights(scores, visible, cap).astype(q.dtype)
    weights = weights.reshape(batch, kv, n // kv * length, -1)
    mixed = jnp.einsum("bkrs,bksh->bkrh", weights, values)
    return checkpoint_name(heads_first(mixed.reshape(batch, n, length, h)), MIXED)


@jax.custom_vjp
def _scores(
    rows: Float[Array, "B K R H"], keys: Float[Array, "B K S H"]
) -> Float[Array, "B K R S"]:
    """Products in float32. Their gradients are products in the dtype of `rows` and `keys`.

    Left to JAX, the float32 gradient of the scores would pull both into float32 products, which a
    GPU runs at half the speed and reads from twice the memory.
    """
    return jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32)


def _scores_fwd(rows, keys):
    return _scores(rows, keys), (rows, keys)


def _scores_bwd(saved, grad):
    rows, keys = saved
    d_rows = jnp.einsum("bkrs,bksh->bkrh", grad.astype(keys.dtype), keys)
    d_keys = jnp.einsum("bkrs,bkrh->bksh", grad.astype(rows.dtype), rows)
    return d_rows.astype(rows.dtype), d_keys.astype(keys.dtype)


_scores.defvjp(_scores_fwd, _scores_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_weights(
    scores: Float[Array, "*b T S"], visible: Bool[Array, "*c T S"] | None, cap: float | None
) -> Float[Array, "*b T S"]:
    """Softmax of the capped scores over the last axis, exactly 0 where not `visible`."""
    return _weights(scores, visible, cap)[0]


def _weights(scores, visible, cap):
    tanh = None if cap is None else jnp.tanh(scores / cap)
    capped = scores if cap is None else cap * tanh
    if cap is None or cap > _SAFE_CAP:
        seen = capped if visible is None else jnp.where(visible, capped, MASKED)
        capped = capped - seen.max(axis=-1, keepdims=True)
    raised = jnp.exp(capped)
    if visible is not None:
        raised = jnp.where(visible, raised, 0.0)
    total = jnp.maximum(raised.sum(axis=-1, keepdims=True), _TINY)
    return raised / total, tanh


def _weights_fwd(scores, visible, cap):
    weights, tanh = _weights(scores, visible, cap)
    return weights, (weights, tanh)


def _weights_bwd(cap, saved, grad):
    weights, tanh = saved
    change = weights * (grad - (weights * grad).sum(axis=-1, keepdims=True))
    if tanh is not None:
        change = change * (1 - jnp.square(tanh))
    return change, None


attention_weights.defvjp(_weights_fwd, _weights_bwd)
