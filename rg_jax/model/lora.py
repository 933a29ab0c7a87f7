"""Low-rank adaptation (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A frozen weight W takes part as W + (alpha / rank) · A B. A begins at random and B at zero, so that
the first step is that of the model as it was. The factors are parameters beside the weights:

    lora/<name of W>/a      (layers …, axes that W sums over, rank)
    lora/<name of W>/b      (layers …, rank, axes that W makes)
    lora/<table>/rows       what is added to the rows of the grounding tokens: they are new to the
                            original vocabulary, and a row that cannot learn is never written

Layers compute x W + (x A) B: neither a gradient of W nor a merged copy of it is made while
training. `merge` makes plain weights of both, for generation and export.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from rg_jax.model.config import ModelConfig, shape_table
from rg_jax.model.matrices import matrix_axes, stacked

ROOT = "lora"  # of the factors' names; also Flax's collection while they are applied
TABLE = "llm/embedder/input_embedding"
Factors = tuple[Array, Array]


# ---------------------------------------------------------------- names and shapes


def factor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every factor, `lora/…`; empty without `config.lora`.

    Raises ValueError for a regex of `lora.include` that matches nothing, and for a parameter that
    is no matrix.
    """
    if config.lora is None:
        return {}
    shapes = {}
    for name, shape in _adapted(config):
        lead, summed, made = _axes(name, len(shape))
        rank = (config.lora.rank,)
        outer = tuple(shape[i] for i in lead)
        shapes[f"{ROOT}/{name}/a"] = outer + tuple(shape[i] for i in summed) + rank
        shapes[f"{ROOT}/{name}/b"] = outer + rank + tuple(shape[i] for i in made)
    if config.lora.new_rows:
        shapes[f"{ROOT}/{TABLE}/rows"] = (config.lora.new_rows, config.llm.width)
    return shapes


def _adapted(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    names, used = shape_table(config), set()
    for name, shape in names.items():
        found = [p for p in config.lora.include if re.fullmatch(p, name)]
        used.update(found)
        if found:
            if matrix_axes(name) is None:
                raise ValueError(f"lora.include: '{found[0]}' matches {name}, which is no matrix")
            yield name, shape
    for pattern in config.lora.include:
        if pattern not in used:
            raise ValueError(f"lora.include: '{pattern}' matches no parameter of this model")


def _axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Axes of W that count matrices, that are summed over, that are made; from the front."""
    summed, made = (tuple(ndim + axis for axis in axes) for axes in matrix_axes(name))
    return tuple(i for i in range(ndim) if i not in summed + made), summed, made


def init_factors(config: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """The factors at the start, a tree, float32: A normal of variance 1 / inputs, the rest zero."""
    table, flat = shape_table(config), {}
    for number, (name, shape) in enumerate(factor_shapes(config).items()):
        flat[name] = jnp.zeros(shape, jnp.float32)
        if name.endswith("/a"):
            weight = name.removeprefix(f"{ROOT}/").removesuffix("/a")
            _, summed, _ = _axes(weight, len(table[weight]))
            inputs = math.prod(table[weight][i] for i in summed)
            flat[name] = jax.random.normal(jax.random.fold_in(rng, number), shape) * inputs**-0.5
    return traverse_util.unflatten_dict(flat, sep="/").get(ROOT, {})


# ---------------------------------------------------------------- in the layers


def variables(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Parameters as Flax's collections; with factors, where there are any, scaled in their B."""
    if ROOT not in params:
        return {"params": params}
    base = {name: part for name, part in params.items() if name != ROOT}
    flat = traverse_util.flatten_dict(params[ROOT], sep="/")
    scaled = {n: v * config.lora.scale if n.endswith("/b") else v for n, v in flat.items()}
    return {"params": base, ROOT: traverse_util.unflatten_dict(scaled, sep="/")}


def factors_of(module: nn.Module, name: str, dtype: Any) -> Factors | None:
    """A and B of the module's own parameter `name`, or None where it is not adapted."""
    if not module.has_variable(ROOT, name):
        return None
    found = module.get_variable(ROOT, name)
    return found["a"].astype(dtype), found["b"].astype(dtype)


def low_rank(
    equation: str, x: Array, factors: Factors, fan_in: tuple[int, ...], batch: tuple[int, ...] = ()
) -> Array:
    """(x A) B for a weight whose own product is `equation`, e.g. "btd,ckdh->cbtkh".

    `fan_in`, `batch`: which of its axes are summed over, and which count matrices.
    """
    operands, out = equation.split("->")
    inputs, weight = operands.split(",")
    lead, summed = ("".join(weight[i] for i in axes) for axes in (batch, fan_in))
    made = "".join(c for c in weight if c not in lead + summed)
    between = lead + "".join(c for c in inputs if c not in summed) + "r"
    inner = jnp.einsum(f"{inputs},{lead}{summed}r->{between}", x, factors[0])
    return jnp.einsum(f"{between},{lead}r{made}->{out}", inner, factors[1])


def trained_rows(params: Mapping[str, Any], config: ModelConfig) -> Float[Array, "K D"] | None:
    """The table's last rows with what LoRA adds to them, float32; None where it adds nothing."""
    if ROOT not in params or not config.lora.new_rows:
        return None
    added = params[ROOT]["llm"]["embedder"]["input_embedding"]["rows"]
    rows = config.num_predictable
    last = params["llm"]["embedder"]["input_embedding"][rows - len(added) : rows]
    return jnp.asarray(last, jnp.float32) + jnp.asarray(added, jnp.float32)


# ---------------------------------------------------------------- one weight of both


def merge(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A tree of parameters with factors → the plain tree, `lora` gone, in the weights' own dtypes.

    W + (alpha / rank) · A B is computed in float32, layer by layer where layers are stacked. A
    tree without factors comes back as it is; so may a part of a tree come, weights with their
    own factors.
    """
    if ROOT not in params:
        return dict(params)
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    factors = {n: flat.pop(n) for n in list(flat) if n.startswith(f"{ROOT}/")}
    for key in factors:
        name, _, kind = key.removeprefix(f"{ROOT}/").rpartition("/")
        if kind == "a":
            b = factors[f"{ROOT}/{name}/b"]
            parts = (jnp.asarray(x) for x in (flat[name], factors[key], b))
            flat[name] = _merged(name, *parts, config.lora.scale)
        elif kind == "rows":
            table, end = jnp.asarray(flat[name]), config.num_predictable
            rows = trained_rows(params, config)
            flat[name] = table.at[end - len(rows) : end].set(rows.astype(table.dtype))
    return traverse_util.unflatten_dict(flat, sep="/")


def _merged(name: str, weight: Array, a: Array, b: Array, scale: float) -> Array:
    lead, summed, made = _axes(name, weight.ndim)
    if stacked(name):  # one layer at a time: a float32 copy of all would be large
        lead, summed, made = (tuple(i - 1 for i in axes if i) for axes in (lead, summed, made))
    letters = "defghij"
    outer, left, right = ("".join(letters[i] for i in axes) for axes in (lead, summed, made))
    product = f"{outer}{left}r,{outer}r{right}->{letters[: len(outer + left + right)]}"

    def one(parts):
        w, a, b = parts
        change = scale * jnp.einsum(product, a.astype(jnp.float32), b.astype(jnp.float32))
        return (w.astype(jnp.float32) + change).astype(w.dtype)

    return jax.lax.map(one, (weight, a, b)) if stacked(name) else one((weight, a, b))
