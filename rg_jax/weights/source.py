"""What every weights file looks like from here: named leaves that are read one at a time.

A reader (`npz`, `huggingface`, `encoders`, `run_folder`) looks at headers only and says which
parameters a file holds, under the original checkpoints' names (`img/…`, `llm/…`, `masks/…`).
`load` then checks names and shapes against a model before a byte of weights is read, and carries
leaf after leaf to its place: the host never holds more than one of them beside what `put` keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat
from rg_jax.model.config import MaskDecoderConfig, ModelConfig

BF16 = np.dtype(ml_dtypes.bfloat16)

Put = Callable[[str, np.ndarray], Any]
Adapt = Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array in a file. `read(dtype)` gives it whole, in that dtype (`dtype`: as it is kept)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.dtype], np.ndarray]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape, dtype=np.int64))

    def stored(self) -> np.ndarray:
        """The array in the dtype it is kept in."""
        return self.read(self.dtype)


@dataclasses.dataclass
class Source:
    """The parameters of one file or folder, and what else it says about its model.

    - `path`: as the user named it, for messages; `kind`: the format in a word.
    - `leaves`: by our names; `missing`: for a leaf that cannot be put together, the keys it lacks.
    - `unknown`: keys that have no place in the model; `left_out`: those that have none on purpose
      (a text tower, an attention pool): they are told, not refused.
    - `parts`: those of a model that it is meant to hold, all of it.
    - `label(name)`: what the file calls a leaf.
    - `model`: dimensions by the file's own config or shapes, None where it is one part of a model.
    - `extra_tokens`: those behind `<image>` in the table; () none, None: the file does not say.
    - `fmt`, `masks`: how the model writes places and what its mask decoder is, where that is known.
    - `tokens`: token → id by the file's own tokenizer, None without one; `tokenizer_model`: the
      SentencePiece file beside it, where there is one.
    - `facts`: what a model card tells of its training, by name.
    - `notes`: what a user should know, a sentence each.
    """

    path: str
    kind: str
    leaves: dict[str, Leaf]
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    parts: tuple[str, ...] = ("img", "llm")
    label: Callable[[str], str] = lambda name: name
    model: ModelConfig | None = None
    extra_tokens: tuple[str, ...] | None = None
    fmt: GroundingFormat | None = None
    masks: MaskDecoderConfig | None = None
    tokens: dict[str, int] | None = None
    tokenizer_model: Path | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def only(self, part: str) -> Source:
        """The leaves below `part` ("img", "llm") alone: no whole model any more, and what the other
        parts lack does not matter."""

        def below(names: Mapping[str, Any]) -> dict[str, Any]:
            return {name: v for name, v in names.items() if name.startswith(f"{part}/")}

        leaves, missing = below(self.leaves), below(self.missing)
        only = dataclasses.replace(
            self, leaves=leaves, missing=missing, parts=(part,), model=None, masks=None
        )
        # An encoder reads no tokens: whichever it lay beside are of no matter.
        return dataclasses.replace(only, tokens=None) if part == "img" else only

    def without(self, part: str) -> Source:
        """Everything but the leaves below `part`."""

        def others(names: Mapping[str, Any]) -> dict[str, Any]:
            return {name: v for name, v in names.items() if not name.startswith(f"{part}/")}

        return dataclasses.replace(self, leaves=others(self.leaves), missing=others(self.missing))


def flatten(tree: Any) -> dict[str, Any]:
    """A nested dict as {"img/head/bias": leaf, …}, in the tree's own leaf order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def problems(
    source: Source, wanted: Mapping[str, Any], adapt: Iterable[str] = (), unknown: bool = True
) -> list[str]:
    """Every way in which the file is not the weights of `wanted`, each naming its keys.

    `wanted`: by name what has a shape and a dtype. Leaves in `adapt` may have another shape.
    """
    found = []
    missing = [
        key
        for name in wanted
        if name not in source.leaves
        for key in source.missing.get(name, [source.label(name)])
    ]
    if missing:
        found.append(f"missing: {', '.join(missing)}")
    strangers = [source.label(name) for name in source.leaves if unknown and name not in wanted]
    strangers += source.unknown
    if strangers:
        found.append(f"unknown: {', '.join(strangers)}")
    for name, target in wanted.items():
        leaf = source.leaves.get(name)
        if leaf is None:
            continue
        shape = tuple(target.shape)
        if leaf.shape != shape and name not in adapt:
            found.append(f"{source.label(name)} is {leaf.shape} but the model needs {shape}")
        floats = leaf.dtype == BF16 or np.issubdtype(leaf.dtype, np.floating)
        if not floats and leaf.dtype != target.dtype:
            found.append(f"{source.label(name)} holds {leaf.dtype}, not floating point numbers")
    return found


def load(source: Source, expected: Any, *, put: Put | None = None, adapt: Adapt | None = None):
    """The leaves of `source` as the tree `expected` (of jax.ShapeDtypeStruct), in its dtypes.

    `put(name, array)` places each leaf, e.g. on its devices, and returns what goes into the tree
    (default: the NumPy array). `adapt` holds, by name, the functions `(array, shape) -> array` for
    leaves that may be of another shape in the file (see `rg_jax.weights.vocabulary.adapters`);
    they get the array in its own dtype. Everything else is strict.

    Raises UserError for every key that is missing, unknown, misshapen or not floating point,
    naming each, and for a file that proves damaged on the way.
    """
    adapt = adapt or {}
    wanted = flatten(expected)
    if found := problems(source, wanted, adapt):
        raise UserError(f"{source.path}: these are not this model's weights; {'; '.join(found)}.")
    put = put or (lambda name, array: array)
    loaded = {}
    for name, target in wanted.items():
        leaf, shape = source.leaves[name], tuple(target.shape)
        if name in adapt:
            array = adapt[name](leaf.stored(), shape).astype(target.dtype, copy=False)
        else:
            array = leaf.read(np.dtype(target.dtype))
        loaded[name] = put(name, array)
        del array
    structure = jax.tree_util.tree_structure(expected)
    return jax.tree_util.tree_unflatten(structure, list(loaded.values()))
