"""Which parameters are matrices, and between which of their axes."""

from __future__ import annotations

import re

# Axes that a weight sums over and axes that it produces, counted from the end. What is in neither
# (layers, gate and value, keys and values) counts matrices.
_MATRIX_AXES = (
    (r"masks/.*/kernel", (-2,), (-1,)),
    (r".*/(q|kv|qkv)_einsum/w", (-2,), (-3, -1)),
    (r".*/attn_vec_einsum/w", (-3, -2), (-1,)),
    (r".*/mlp/(gating_einsum|linear)", (-2,), (-1,)),
    (r".*/(query|key|value)/kernel", (-3,), (-2, -1)),
    (r".*/out/kernel", (-3, -2), (-1,)),
    (r".*/embedding/kernel", (-4, -3, -2), (-1,)),
    (r".*/(Dense_[01]|head)/kernel", (-2,), (-1,)),
)


def matrix_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Axes summed over and axes made by the parameter of this flat name, counted from the end.

    None for what is no matrix: a table, a position code, a scale, a bias.
    """
    if factor := re.fullmatch("lora/(.+)/([ab])", name):
        return _factor_axes(*factor.groups())
    for pattern, summed, made in _MATRIX_AXES:
        if re.fullmatch(pattern, name):
            return summed, made
    return None


def _factor_axes(name: str, factor: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes of a low-rank factor: `a` makes the rank out of the weight's inputs, `b` sums it."""
    found = matrix_axes(name)
    if found is None:
        return None
    summed, made = map(len, found)
    if factor == "a":
        return tuple(range(-summed - 1, -1)), (-1,)
    return (-made - 1,), tuple(range(-made, 0))


def stacked(name: str) -> bool:
    """Whether the leading axis of the parameter counts layers."""
    return "layers/" in name or "encoderblock/" in name
