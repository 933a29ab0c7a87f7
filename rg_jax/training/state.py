"""The state of a run and how it comes into being on its devices.

Parameters live as two flat dicts, trainable (float32 masters) and frozen (bfloat16 by default,
without optimizer state), so that nothing is ever updated or differentiated by accident.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rg_jax.training.optimizer import Optimizer, assign


class TrainState(NamedTuple):
    """`step` counts finished optimizer steps; the dicts are keyed by flat parameter names."""

    step: jax.Array
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt_state: Any


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters → `{"llm/layers/…": array}`, sorted by name."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def merge(state: TrainState) -> dict[str, Any]:
    """All parameters as the nested tree that the model takes."""
    return unflatten({**state.trainable, **state.frozen})


def split_names(names, rules) -> tuple[dict[str, Any], list[str]]:
    """Schedule specs of the trainable parameters, and the names of the frozen ones."""
    assigned = assign(names, rules)
    trainable = {name: spec for name, spec in assigned.items() if spec is not None}
    return trainable, [name for name in names if name not in trainable]


def state_shapes(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    trainable: Mapping[str, Any],
    optimizer: Optimizer,
    frozen_dtype: str = "bfloat16",
) -> TrainState:
    """Shapes and dtypes of the whole state, without allocating anything."""
    train = {n: jax.ShapeDtypeStruct(shapes[n].shape, jnp.float32) for n in trainable}
    frozen = {
        n: jax.ShapeDtypeStruct(s.shape, jnp.dtype(frozen_dtype))
        for n, s in shapes.items()
        if n not in trainable
    }
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step, train, frozen, jax.eval_shape(optimizer.init, train))


def new_state(
    shapes: TrainState, shardings: TrainState, params: dict[str, Any], optimizer: Optimizer
) -> TrainState:
    """A state at step 0 from flat parameters, every array on its own devices."""

    def place(name: str, shape: jax.ShapeDtypeStruct, sharding) -> jax.Array:
        value = params[name]
        if isinstance(value, np.ndarray):
            return jax.device_put(np.asarray(value).astype(shape.dtype), sharding)
        return jax.device_put(value.astype(shape.dtype), sharding)

    train = {n: place(n, s, shardings.trainable[n]) for n, s in shapes.trainable.items()}
    frozen = {n: place(n, s, shardings.frozen[n]) for n, s in shapes.frozen.items()}
    init: Callable = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    return TrainState(step, train, frozen, init(train))


def describe(shapes: TrainState) -> str:
    """`trainable.txt`: every parameter with shape, dtype and whether it learns."""
    lines = []
    groups = {"trainable": shapes.trainable, "frozen": shapes.frozen}
    counts = {k: sum(int(np.prod(s.shape)) for s in group.values()) for k, group in groups.items()}
    for title, group in groups.items():
        share = counts[title] / max(sum(counts.values()), 1)
        lines.append(
            f"# {title}: {counts[title]:,} parameters in {len(group)} arrays ({share:.2%} of all)"
        )
        lines += [f"{title}\t{n}\t{tuple(s.shape)}\t{s.dtype}" for n, s in group.items()]
    return "\n".join(lines) + "\n"
