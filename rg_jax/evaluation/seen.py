"""Has a run looked at what it is evaluated on? By the names of splits, and where those do not tell,
by the questions and captions themselves.

A builder makes variants of a data set: other layouts, languages, ways to split. What is test in one
may be train in another, so variants are compared by what they ask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.data.record import Record
from rg_jax.data.sources import open_source
from rg_jax.errors import UserError
from rg_jax.run import CONFIG_FILE, full_name, load_config

Part = Mapping[str, Any]  # an entry of config.data.train, val or test
Contents = Callable[[Part], "frozenset[int] | None"]


def mixtures_of(config: Any) -> dict[str, list[Part]]:
    """What a run has learnt from ("train") and was watched on ("val"), and so the runs, as far as
    they are there, whose weights it began with ("train before", "val before")."""
    found = {name: list(config.data[name]) for name in ("train", "val")}
    start = Path(config.weights) if config.weights else None
    if start is not None and (start / CONFIG_FILE).is_file():
        for name, parts in mixtures_of(load_config(start)).items():
            before = f"{name.partition(' ')[0]} before"
            found[before] = found.get(before, []) + parts
    return found


def seen_in(
    part: Part, mixtures: Mapping[str, Sequence[Part]], contents: Contents
) -> dict[str, str]:
    """Which of a run's mixtures ("train", "val") hold what `part` evaluates, and how that is known.

    Splits of one variant are told apart by their names, without their slices: `val[:50%]` is a look
    at `val`. Other variants of the same data set, and variants built with `leaks_allow`, are
    compared by `contents`; one that is not there (None) may hold anything and counts as seen.
    """
    found = {}
    for name, parts in mixtures.items():
        reasons = [_reason(part, other, contents) for other in parts]
        if seen := [reason for reason in reasons if reason]:
            found[name] = seen[0]
    return found


def _reason(part: Part, other: Part, contents: Contents) -> str:
    """Why `other` counts as a look at `part`, in words; empty: it is none."""
    if part["name"] != other["name"]:
        return ""
    where = f"{full_name(other)}, split {other['split']}"
    configs = {part["config"], other["config"]} - {""}
    if len(configs) < 2 and _splits(part) & _splits(other):
        return f"{where}: the same split"
    apart = len(configs) < 2 and not any("leaks_allow" in config for config in configs)
    if apart:
        return ""  # the builder lets nothing stand in two splits
    ours, theirs = contents(part), contents(other)
    if theirs is None or ours is None:
        return f"{where}, which is not there to be compared, may hold them"
    common = len(ours & theirs)
    return f"{where}: {common} of {len(ours)} questions and captions are the same" * bool(common)


class _Everything(frozenset):
    """The split `all`: it has something in common with every other."""

    def __and__(self, other):
        return other or self

    __rand__ = __and__


def _splits(part: Part) -> frozenset[str]:
    names = frozenset(piece.partition("[")[0].strip() for piece in part["split"].split("+"))
    return _Everything(names) if "all" in names else names


def contents_of(folders: Iterable[str | os.PathLike]) -> Contents:
    """What the data sets below these folders ask, as numbers of (picture's group, words)."""
    folders = list(folders)

    def contents(part: Part) -> frozenset[int] | None:
        for folder in folders:
            try:
                source = open_source(full_name(part), part["split"], folder)
            except UserError:
                continue
            return frozenset(
                hash(key) for row in range(len(source)) for key in _keys(source.light(row))
            )
        return None

    return contents


def _keys(record: Record) -> list[tuple[str, ...]]:
    group = record["source"]["group"]
    keys = [(group, row["language"], row["question"], row["answer"]) for row in record["qa"]]
    texts = record["texts"].items()
    return keys + [(group, lang, row["caption"]) for lang, row in texts if row["caption"]]
