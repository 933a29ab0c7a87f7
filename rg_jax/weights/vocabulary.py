"""Making weights fit another vocabulary or another image size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rg_jax.errors import UserError

TABLE = "llm/embedder/input_embedding"
POSITIONS = "img/pos_embedding"
_CHUNK = 16_384


def padded_rows(num_tokens: int, multiple: int = 64) -> int:
    """Rows of a table for `num_tokens` tokens: the next multiple, which devices divide evenly."""
    return -(-num_tokens // multiple) * multiple


def grow_table(
    table: Float[np.ndarray, "old D"],
    num_tokens: int,
    *,
    rows: int | None = None,
    known: int | None = None,
    moved: Mapping[int, int] | None = None,
    seed: int = 0,
    noise: float = 0.1,
) -> Float[np.ndarray, "new D"]:
    """An embedding table with room for `num_tokens` tokens, in the dtype of `table`.

    The first `known` rows (default: all) are kept bit for bit. Rows from there to `num_tokens`
    start as the mean of the known ones, so that a new token is at first about as likely as the
    average one, plus seeded noise of `noise` standard deviations per column, so that no two are
    the same. `moved` (new row → old row) holds tokens that the old table knows too, at another
    place. The rest, up to `rows` (default: `padded_rows(num_tokens)`), is zero padding.
    Raises UserError where that would shrink the vocabulary or not fit into `rows`.
    """
    known = len(table) if known is None else known
    rows = padded_rows(num_tokens) if rows is None else rows
    if not 1 <= known <= len(table):
        raise UserError(f"{TABLE} has {len(table)} rows; {known} of them cannot be known tokens.")
    if num_tokens < known:
        raise UserError(
            f"{TABLE} knows {known} tokens but the tokenizer has only {num_tokens}; "
            "the weights and the tokenizer do not belong together."
        )
    if rows < num_tokens:
        raise UserError(f"{TABLE} cannot hold {num_tokens} tokens in {rows} rows.")
    mean, std = _mean_and_std(table[:known])
    grown = np.zeros((rows, table.shape[1]), table.dtype)
    grown[:known] = table[:known]
    random = np.random.default_rng(seed).standard_normal((num_tokens - known, table.shape[1]))
    grown[known:num_tokens] = (mean + noise * std * random).astype(table.dtype)
    for new, old in (moved or {}).items():
        grown[new] = table[old]
    return grown


def resize_positions(
    positions: Float[np.ndarray, "1 old W"], num_tokens: int
) -> Float[np.ndarray, "1 new W"]:
    """Position embeddings for another number of patches: bilinear over the grid, in float32.

    The result is float32 whatever comes in: interpolating in bfloat16 would lose what little
    differs between neighbours. Raises UserError where either number is not a square.
    """
    old, new = math.isqrt(positions.shape[1]), math.isqrt(num_tokens)
    if old**2 != positions.shape[1] or new**2 != num_tokens:
        raise UserError(
            f"{POSITIONS}: {positions.shape[1]} positions cannot be resized to {num_tokens}; "
            "both must be square grids."
        )
    wide = positions.astype(np.float32)
    if old == new:
        return wide
    grid = jnp.asarray(wide.reshape(old, old, -1))
    resized = jax.image.resize(grid, (new, new, grid.shape[-1]), "bilinear")
    return np.asarray(resized).reshape(1, num_tokens, -1)


def adapters(
    num_tokens: int,
    *,
    known: int | None = None,
    moved: Mapping[int, int] | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = lambda change: None,
) -> dict[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]:
    """For `load(adapt=…)`: a larger vocabulary and another image size, and nothing else.

    `num_tokens` is the tokenizer's, added tokens included; the table's rows are the model's.
    `known` rows are those of the tokenizer's own pieces, `moved` (new row → old row) the added
    tokens that the file has too; None: the file does not name its tokens. Such a table, if it is
    as long as ours and trained to its last token, was saved with our tokens, and is kept whole.
    `tell` is told of every change in a sentence. A table with more rows than these tokens,
    `<image>` and their padding raises UserError: it belongs to another tokenizer.
    """

    def has_our_tokens(array: np.ndarray, rows: int) -> bool:
        if moved is not None or known is None or known >= num_tokens:
            return False
        added = np.asarray(array[known:num_tokens], np.float32)
        return len(array) in (num_tokens, rows) and bool(added.any(axis=1).all())

    def table(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _same_width(TABLE, array, shape)
        used = max([(known or 0) - 1, *(moved or {}).values()]) + 1
        if len(array) < used:
            raise UserError(
                f"{TABLE} has {len(array)} rows, but its tokens need {used}; the weights and the "
                "tokenizer do not belong together."
            )
        # One row more for <image>, and padding up to a multiple of 64, as stock folders have it.
        if known is not None and len(array) > max(used, known + 1) + 63:
            raise UserError(
                f"{TABLE} has {len(array)} rows, but the tokenizer knows {known} tokens; the "
                "weights and the tokenizer do not belong together."
            )
        if has_our_tokens(array, shape[0]):
            tell(f"rows {known} to {num_tokens - 1} are taken for the added tokens, in our order")
            return np.pad(array, ((0, shape[0] - len(array)), (0, 0)))
        if num_tokens > len(array):
            tell(f"the vocabulary grows from {len(array)} to {num_tokens} tokens")
        kept = known + len(moved or {}) if known is not None else len(array)
        if len(array) > kept:
            tell(
                f"{len(array) - kept} of its {len(array)} rows are not used (padding, or tokens "
                f"that the run lacks); {num_tokens - kept} tokens start near the mean"
            )
        return grow_table(array, num_tokens, rows=shape[0], known=known, moved=moved, seed=seed)

    def positions(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        _same_width(POSITIONS, array, shape)
        if array.shape != shape:
            tell(f"{array.shape[1]} position embeddings are resized to {shape[1]}")
        return resize_positions(array, shape[1])

    return {TABLE: table, POSITIONS: positions}


def _same_width(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.ndim != len(shape) or array.shape[-1] != shape[-1]:
        raise UserError(f"params/{name} is {array.shape} but the model needs {shape}.")


def _mean_and_std(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column means and deviations in float64, in chunks: 257k rows are 5 GB at once."""
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(table), _CHUNK)]
    mean = sum(table[c].astype(np.float64).sum(axis=0) for c in chunks) / len(table)
    square = sum(np.square(table[c].astype(np.float64) - mean).sum(axis=0) for c in chunks)
    return mean, np.sqrt(square / len(table))
