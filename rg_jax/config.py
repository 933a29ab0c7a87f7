"""What every config file shares: arguments after the colon, durations, saving and comparing.

A config file is ordinary Python with `get_config(arg=None) -> ConfigDict`. It is chosen with
`--config=configs/det.py:demo,steps=200` and single fields are overridden with
`--config.batch_size=8`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rg_jax.errors import UserError

DURATION_UNITS = ("steps", "epochs", "examples", "percent")


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Reads `demo,steps=200` into a ConfigDict with the types of `defaults`.

    A bare word sets a boolean argument to True. Raises UserError for an unknown argument or a
    value of the wrong type, naming the argument and listing the known ones.
    """
    values = dict(defaults)
    for part in filter(None, (piece.strip() for piece in (arg or "").split(","))):
        name, has_value, text = part.partition("=")
        if name not in defaults:
            known = ", ".join(f"{k} ({type(v).__name__})" for k, v in defaults.items()) or "none"
            raise UserError(f"unknown config argument '{name}'; this config takes: {known}")
        values[name] = _typed(name, text, defaults[name]) if has_value else _bare(name, defaults)
    return ml_collections.ConfigDict(values)


def _bare(name: str, defaults: Mapping[str, Any]) -> bool:
    if not isinstance(defaults[name], bool):
        raise UserError(f"config argument '{name}' needs a value: write {name}=…")
    return True


def _typed(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise UserError(f"config argument {name}='{text}' is not of type {kind}") from None


def duration(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    name: str,
    *,
    total_steps: int | None = None,
    batch_size: int,
    examples: int,
) -> int | None:
    """Steps of a duration given as exactly one of `name_steps|_epochs|_examples|_percent`.

    `examples` is the size of the training set, `total_steps` the length of the run (for percent).
    Returns None where none is given; raises UserError where several are.
    """
    given = [u for u in DURATION_UNITS if config.get(f"{name}_{u}") is not None]
    if not given:
        return None
    if len(given) > 1:
        fields = ", ".join(f"{name}_{u}" for u in given)
        raise UserError(f"config gives {fields}: set exactly one of them")
    unit, value = given[0], config[f"{name}_{given[0]}"]
    if unit == "percent" and total_steps is None:
        raise UserError(f"config field {name}_percent has no total to refer to")
    steps = {
        "steps": lambda: value,
        "epochs": lambda: value * examples / batch_size,
        "examples": lambda: value / batch_size,
        "percent": lambda: value * (total_steps or 0) / 100,
    }[unit]()
    if steps < 0:
        raise UserError(f"config field {name}_{unit}={value} must not be negative")
    return int(round(steps))


# Numbers that must be at least this large for a run to make sense.
_AT_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "accumulation": 1,
    "log_steps": 1,
    "checkpoint_steps": 1,
    "keep_checkpoints": 1,
    "loss.block_size": 1,
    "data.text_len": 2,
    "data.workers": 0,
    "data.threads": 0,
    "eval.every_steps": 0,
    "eval.samples": 1,
    "eval.batch_size": 0,
    "eval.rows": 1,
    "eval.final_samples": 0,
    "eval.max_new_tokens": 0,
    "eval.gallery": 0,
    "eval.bootstrap": 1,
    "masks.slots": 1,
    "masks.size": 0,
    "lora.rank": 0,
    "masks.weight": 0,
}
_ONE_OF = {
    "objective": ("text", "contrastive"),
    "frozen_dtype": ("bfloat16", "float32", "float16"),
    "masks.loss": ("focal", "bce"),
    "weights_format": ("", "weights", "config"),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for a field whose value no run can have, naming it."""

    def value(field: str) -> Any:
        found = config
        for name in field.split("."):
            found = found[name]
        return found

    for field, least in _AT_LEAST.items():
        if value(field) < least:
            raise UserError(f"config.{field}={value(field)}: must be at least {least}")
    if not config.optimizer.lr >= 0:
        raise UserError(f"config.optimizer.lr={config.optimizer.lr}: must not be negative")
    for field, known in _ONE_OF.items():
        if value(field) not in known:
            raise UserError(f"config.{field}={value(field)!r}: must be one of {', '.join(known)}")
    if config.objective == "contrastive" and config.accumulation > 1:
        raise UserError(
            f"config.accumulation={config.accumulation}: objective contrastive compares the whole "
            "batch at once; set it to 1 and choose a smaller config.batch_size"
        )
    if config.objective == "contrastive" and config.batch_size < 2:
        raise UserError(
            f"config.batch_size={config.batch_size}: objective contrastive tells the pairs of a"
            " batch apart; it needs 2 or more"
        )
    for unit in DURATION_UNITS[:3]:
        total = config.get(f"total_{unit}")
        if total is not None and total <= 0:
            raise UserError(f"config.total_{unit}={total}: must be above 0")


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as sorted JSON; what a run's `config.json` holds."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | set):
        return list(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"config holds {value!r}, which JSON cannot store")


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json` (tuples come back as lists)."""
    return ml_collections.ConfigDict(json.loads(text))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Fields in which two configs (as plain JSON values) differ, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            field = f"{prefix}.{key}" if prefix else key
            lines += differences(old.get(key), new.get(key), field)
        return lines
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]


def write_aside(path: str | os.PathLike, data: str | bytes) -> None:
    """Writes a small file so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
