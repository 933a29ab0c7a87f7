"""Losses of masks: focal, cross-entropy and dice, over fixed slots of which some hold a mask.

Everything is float32. A slot that holds nothing adds exactly nothing, to the value and to every
gradient, whatever its logits are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

AnyArray = Array | np.ndarray

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
KINDS = ("focal", "bce")
_DICE_EPS = 1e-6


def cross_entropy_pixels(
    logits: Float[AnyArray, "*n H W"], targets: Float[AnyArray, "*n H W"]
) -> Float[Array, "*n H W"]:
    """Binary cross-entropy of every pixel, stable for any logit."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def focal_pixels(
    logits: Float[AnyArray, "*n H W"],
    targets: Float[AnyArray, "*n H W"],
    alpha: float = FOCAL_ALPHA,
    gamma: float = FOCAL_GAMMA,
) -> Float[Array, "*n H W"]:
    """Sigmoid focal loss of every pixel (Lin et al., arXiv:1708.02002)."""
    p = jax.nn.sigmoid(logits)
    missed = p * (1 - targets) + (1 - p) * targets  # 1 − probability of the truth
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * missed**gamma * cross_entropy_pixels(logits, targets)


def dice_masks(
    logits: Float[AnyArray, "*n H W"], targets: Float[AnyArray, "*n H W"]
) -> Float[Array, "*n"]:
    """1 − 2 Σ p·t / (Σ p + Σ t + 1e-6) of every mask, with p = sigmoid(logit)."""
    p = jax.nn.sigmoid(logits)
    both = (p * targets).sum(axis=(-2, -1))
    return 1 - 2 * both / (p.sum(axis=(-2, -1)) + targets.sum(axis=(-2, -1)) + _DICE_EPS)


def mask_loss_sums(
    logits: Float[AnyArray, "*n H W"],
    targets: Float[AnyArray, "*n H W"] | Bool[AnyArray, "*n H W"],
    valid: Bool[AnyArray, "*n"],
    kind: str = "focal",
) -> dict[str, Float[Array, "*n"]]:
    """Per slot {"pixels": focal or cross-entropy, mean over its pixels; "dice"}; 0 where invalid.

    Divide their sums by the number of valid slots for the means of the paper. Raises ValueError
    for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"mask loss {kind!r} is not one of {', '.join(KINDS)}")
    holds = valid[..., None, None]
    # Cut off before any arithmetic: 0 · inf would be NaN, in the gradient too.
    logits = jnp.where(holds, logits.astype(jnp.float32), 0.0)
    targets = jnp.where(holds, targets.astype(jnp.float32), 0.0)
    pixels = focal_pixels if kind == "focal" else cross_entropy_pixels
    return {
        "pixels": jnp.where(valid, pixels(logits, targets).mean(axis=(-2, -1)), 0.0),
        "dice": jnp.where(valid, dice_masks(logits, targets), 0.0),
    }
