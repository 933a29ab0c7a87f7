"""What a weights file holds, and where two of them differ: the texts of `inspect` and `compare`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.model.config import VARIANTS, ModelConfig, from_variant, shape_table
from rg_jax.weights.source import Leaf, Source
from rg_jax.weights.vocabulary import TABLE

# Numbers looked at in one go: differences are computed in float64.
_CHUNK = 2**22


def list_variant(variant: str, image_size: int | None = None) -> str:
    """Names and shapes of a known size ("3b", …), from its dimensions alone. Raises UserError."""
    if variant not in VARIANTS:
        raise UserError(f"--model={variant}: must be one of {', '.join(VARIANTS)}")
    try:
        model = from_variant(variant, image_size=image_size)
    except ValueError as error:
        raise UserError(f"--image_size={image_size}: {error}") from error
    rows = [(name, shape, "", math.prod(shape), "") for name, shape in shape_table(model).items()]
    return "\n".join([*_table(rows), *_totals({n: math.prod(s) for n, s, *_ in rows})])


def list_source(source: Source, norms: bool = True) -> str:
    """Every leaf with shape, dtype, count and (unless `norms` is False) L2 norm, and all that the
    source says beside."""
    rows = []
    for name, leaf in source.leaves.items():
        norm = f"{norm_of(leaf):.6g}" if norms else ""
        rows.append((name, leaf.shape, leaf.dtype.name, leaf.size, norm))
    lines = [f"{source.path}: {source.kind}", *_table(rows)]
    lines += _totals({name: leaf.size for name, leaf in source.leaves.items()})
    lines += _said(source)
    lines += [f"missing: {key}" for keys in source.missing.values() for key in keys]
    lines += [f"unknown: {key}" for key in source.unknown]
    lines += [f"left out: {key}" for key in source.left_out]
    return "\n".join([*lines, *(f"note: {note}" for note in source.notes)])


def _said(source: Source) -> list[str]:
    lines = []
    if source.model is not None:
        lines.append(f"dimensions: {_dimensions(source.model)}")
    tokens = source.extra_tokens
    shown = "not known" if tokens is None else " ".join(tokens) or "none"
    lines.append(f"extra tokens: {shown}")
    if source.tokenizer_model is not None and tokens is not None:
        tokenizer = Tokenizer.load(source.tokenizer_model, tokens)
        ids = ", ".join(
            f"{token} {i}"
            for token, i in zip(tokenizer.extra_tokens, tokenizer.extra_ids, strict=True)
        )
        lines.append(
            f"tokenizer: {tokenizer.base_size} pieces, sha256 {tokenizer.sha256}; "
            f"<loc0000> {tokenizer.loc_ids[0]}, <image> {tokenizer.image_id}"
            + (f", {ids}" if ids else "")
        )
    if source.fmt is not None:
        lines.append(f"grounding format: {source.fmt.to_json()}")
    if source.masks is not None:
        lines.append(f"mask decoder: {source.masks}")
    return lines


def _dimensions(model: ModelConfig) -> str:
    img, llm = model.img, model.llm
    return (
        f"encoder {img.depth} layers of {img.width}, {img.num_heads} heads, {img.image_size} px in "
        f"patches of {img.patch_size}; decoder {llm.depth} layers of {llm.width}, {llm.num_heads} "
        f"heads, {llm.num_kv_heads} for keys, {llm.vocab_size} rows for tokens"
    )


def _table(rows: list[tuple]) -> list[str]:
    texts = [(n, str(tuple(s)).replace(" ", ""), d, f"{c:,}", norm) for n, s, d, c, norm in rows]
    widths = [max((len(row[i]) for row in texts), default=0) for i in range(5)]
    return [
        f"{n:<{widths[0]}}  {s:<{widths[1]}}  {d:<{widths[2]}}  {c:>{widths[3]}}  {norm}".rstrip()
        for n, s, d, c, norm in texts
    ]


def _totals(counts: dict[str, int]) -> list[str]:
    parts: dict[str, int] = {}
    for name, count in counts.items():
        part = name.split("/")[0]
        parts[part] = parts.get(part, 0) + count
    each = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    return [f"total: {sum(counts.values()):,} parameters in {len(counts)} arrays ({each})"]


def norm_of(leaf: Leaf) -> float:
    """The L2 norm, summed in float64."""
    array = leaf.stored().reshape(-1)
    chunks = (array[i : i + _CHUNK] for i in range(0, len(array), _CHUNK))
    return math.sqrt(sum(float(np.square(c.astype(np.float64)).sum()) for c in chunks))


class Difference(NamedTuple):
    """Of one leaf: largest absolute difference, that over the largest entry of the first, and the
    layers that differ (none for a leaf that has no layers)."""

    absolute: float
    relative: float
    layers: tuple[int, ...]
    swapped: tuple[tuple[int, int], ...]


def compare(one: Source, other: Source) -> Iterator[tuple[bool, str]]:
    """(whether the two differ in it, a line) for every leaf, as soon as it is compared.

    Keys that only one has, keys of another shape and keys that neither knows are lines of their
    own. Of tables with another number of rows the common ones are compared.
    """
    for a, b in ((one, other), (other, one)):
        for name in a.leaves:
            if name not in b.leaves:
                yield True, f"only in {a.path}: {a.label(name)}"
        for key in [*(k for keys in a.missing.values() for k in keys)]:
            yield True, f"missing in {a.path}: {key}"
        for key in a.unknown:
            yield True, f"unknown in {a.path}: {key}"
    for name, leaf in one.leaves.items():
        mine, theirs = leaf, other.leaves.get(name)
        if theirs is None:
            continue
        if mine.shape != theirs.shape:
            yield True, f"other shape: {name}: {mine.shape} and {theirs.shape}"
            if name != TABLE or mine.shape[1:] != theirs.shape[1:]:
                continue
        found = difference(mine, theirs, layered="/layers/" in name or "/encoderblock/" in name)
        if found is None:
            yield False, f"equal: {name}"
            continue
        where = f", layers {', '.join(map(str, found.layers))}" if found.layers else ""
        yield True, f"differs: {name}: {found.absolute:.3g}, relative {found.relative:.3g}{where}"
        for a, b in found.swapped:
            yield True, f"swapped: {name}: layer {a} of one is layer {b} of the other"


def difference(one: Leaf, other: Leaf, layered: bool) -> Difference | None:
    """How two leaves of the same shape (but for rows) differ; None: not at all, NaN equals NaN."""
    a, b = one.stored(), other.stored()
    rows = min(len(a), len(b)) if a.ndim else 0
    a, b = (x[:rows] if x.ndim else x for x in (a, b))
    absolute = largest = 0.0
    differing = set()
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    per_layer = max(1, a[0].size if layered else a.size)
    for start in range(0, len(flat_a), _CHUNK):
        x, y = (f[start : start + _CHUNK].astype(np.float64) for f in (flat_a, flat_b))
        unequal = (x != y) & ~(np.isnan(x) & np.isnan(y))
        largest = max(largest, float(np.nanmax(np.abs(x), initial=0.0)))
        if unequal.any():
            gap = np.abs(x - y)[unequal]
            absolute = max(absolute, math.inf if np.isnan(gap).any() else float(gap.max()))
            differing |= set(((np.flatnonzero(unequal) + start) // per_layer).tolist())
    if not differing:
        return None
    layers = tuple(sorted(differing)) if layered else ()
    swapped = tuple((i, j) for i in layers for j in layers if i != j and np.array_equal(a[i], b[j]))
    return Difference(absolute, absolute / largest if largest else math.inf, layers, swapped)
