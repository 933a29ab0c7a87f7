"""Who learns how fast: freezing and schedules by regex, Adafactor, AdamW, Muon, SGD.

Parameters are flat dicts `{"llm/layers/attn/q_einsum/w": array, …}`, as in the weight files.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from rg_jax.errors import UserError
from rg_jax.model.matrices import matrix_axes, stacked

Schedule = Callable[[Any], Any]


def assign(names: Iterable[str], rules: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Gives each parameter the value of the first (regex, value) that matches its whole name.

    Raises UserError if a parameter is matched by no rule (so that nothing is frozen or trained
    by accident) or a rule matches nothing (so that a misspelt regex is seen).
    """
    names, rules = list(names), [tuple(rule) for rule in rules]
    assigned: dict[str, Any] = {}
    used: set[int] = set()
    for name in names:
        for index, (pattern, value) in enumerate(rules):
            if re.fullmatch(pattern, name):
                assigned[name] = value
                used.add(index)
                break
        else:
            raise UserError(
                f"config.schedule has no rule for parameter '{name}'; end it with ('.*', …)"
            )
    # Rules that only repeat what earlier ones took are harmless if they are the final catch-all.
    for index, (pattern, _) in enumerate(rules):
        if index not in used and pattern != ".*":
            raise UserError(f"config.schedule: '{pattern}' matches no parameter of this model")
    return assigned


def make_schedule(total_steps: int, spec: Mapping[str, Any]) -> Schedule:
    """Learning-rate multiplier in [0, 1] as a function of the step.

    `spec`: `decay` = "cosine" | "linear" | "constant", `warmup_steps` or `warmup_percent`,
    `scale` (constant factor, default 1), `floor` (final value as a share of the peak, default 0).
    """
    spec = dict(spec)
    decay = spec.pop("decay", "cosine")
    percent, warmup = spec.pop("warmup_percent", None), spec.pop("warmup_steps", None)
    scale, floor = spec.pop("scale", 1.0), spec.pop("floor", 0.0)
    if spec:
        raise UserError(f"config.schedule: unknown fields {sorted(spec)}")
    if percent is not None and warmup is not None:
        raise UserError("config.schedule: set one of warmup_percent, warmup_steps")
    if percent is not None:
        warmup = int(round(total_steps * percent / 100))
    warmup = warmup or 0
    if decay not in ("cosine", "linear", "constant"):
        raise UserError(f"config.schedule: decay='{decay}' is not cosine, linear or constant")

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        share = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        if decay == "cosine":
            value = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        elif decay == "linear":
            value = floor + (1 - floor) * (1 - share)
        else:
            value = jnp.ones_like(share)
        # The first step already moves: (step + 1) / warmup, as warm-ups are usually counted.
        return scale * jnp.minimum(value, (step + 1) / warmup if warmup else 1.0)

    return schedule


def base_transform(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """Gradients → directions of unit learning rate, by `config.name`."""
    name = config["name"]
    if name == "adafactor":
        # Shazeer & Stern 2018 with an absolute learning rate: no parameter scaling, no relative
        # step, update clipping at RMS 1. Stacked layers share one clipping RMS.
        return optax.chain(
            optax.scale_by_factored_rms(
                decay_rate=config.get("decay_rate", 0.8),
                min_dim_size_to_factor=config.get("min_dim_size_to_factor", 64),
            ),
            optax.clip_by_block_rms(config.get("clipping_threshold", 1.0)),
        )
    if name == "adamw":
        return optax.scale_by_adam(
            b1=config.get("b1", 0.9), b2=config.get("b2", 0.999), eps=config.get("eps", 1e-8)
        )
    if name == "muon":
        # Orthogonalised steps for matrices (Jordan et al. 2024), as large as AdamW's would be
        # (Liu et al., arXiv:2502.16982), and Adam with Nesterov's momentum for tables and
        # vectors. -1: the caller subtracts.
        return optax.contrib.muon(
            learning_rate=-1.0,
            beta=config.get("beta", 0.95),
            adam_b1=config.get("b1", 0.9),
            adam_b2=config.get("b2", 0.999),
            eps=config.get("eps", 1e-8),
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    if name == "sgd":
        return optax.identity()
    raise UserError(f"config.optimizer.name='{name}' is not adafactor, adamw, muon or sgd")


def _matrices(params: Mapping[str, Any]) -> dict[str, Any]:
    """Which parameters are matrices, and between which axes; None: a table, a vector."""

    def axes(name, value):
        found = matrix_axes(name)
        if found is None:
            return None
        return optax.contrib.MuonDimensionNumbers(
            *(tuple(value.ndim + axis for axis in axes) for axes in found)
        )

    return {name: axes(name, value) for name, value in params.items()}


class Optimizer:
    """Clip by global norm, transform, decay weights, scale by each parameter's own schedule.

    Weight decay is decoupled and scaled by the learning rate (as in torch's AdamW and in the
    published run's Adafactor); vectors (norm scales, biases) are not decayed.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        schedules: Mapping[str, Mapping[str, Any]],
        total_steps: int,
    ):
        """`schedules`: flat name → schedule spec of every TRAINABLE parameter."""
        if not schedules:
            raise UserError("config.schedule freezes every parameter: nothing to train")
        self.lr = float(config["lr"])
        self.weight_decay = float(config.get("weight_decay", 0.0))
        self.clip_norm = config.get("clip_norm")
        self.schedules = {n: make_schedule(total_steps, s) for n, s in schedules.items()}
        self.transform = base_transform(config)

    def init(self, params: Mapping[str, jax.Array]) -> Any:
        """Optimizer state for the trainable parameters (none for frozen ones)."""
        return self.transform.init(dict(params))

    def update(self, grads, state, params, step):
        """One step. Returns (new params, new state, norms of gradient, update and new params).

        `step` counts from 0; the learning rate is read at this step.
        """
        norm = optax.tree.norm(grads)
        if self.clip_norm:
            factor = jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * factor, grads)
        directions, state = self.transform.update(grads, state, params)

        def updates_of(params):
            return {
                name: self._update(name, d, params[name], step) for name, d in directions.items()
            }

        def add(params, updates):
            return {n: params[n] + u.astype(params[n].dtype) for n, u in updates.items()}

        updates = updates_of(params)
        norms = {
            "grad_norm": norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(add(params, updates)),
        }
        # The sums first, then the parameters: in one pass for both XLA does not write the new ones
        # over the old, and copies them afterwards.
        params, norms = jax.lax.optimization_barrier((params, norms))
        return add(params, updates_of(params)), state, norms

    def _update(self, name, direction, param, step):
        rate = self.lr * self.schedules[name](step)
        decay = self.weight_decay if param.ndim - stacked(name) >= 2 else 0.0
        return -rate * (direction + decay * param)

    def learning_rate(self, step) -> jax.Array:
        """The largest learning rate in use at `step`, for the log."""
        unique = {id(s): s for s in self.schedules.values()}.values()
        return self.lr * jnp.max(jnp.stack([s(step) for s in unique]))
