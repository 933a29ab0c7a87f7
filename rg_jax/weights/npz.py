"""Flat `.npz` weights with the original checkpoints' names: `params/img/…`, `params/llm/…`."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rg_jax.errors import UserError
from rg_jax.weights.source import BF16, Adapt, Leaf, Put, Source, flatten, load

__all__ = ["PREFIX", "flatten", "load_npz", "open_npz", "read_shapes", "save_leaves", "save_npz"]

PREFIX = "params/"
# np.load does not know bfloat16 and hands it over as two bytes of anything.
_VOID_BF16 = np.dtype("V2")
# One layer of the encoder where a file keeps its layers apart, as SigLIP's own checkpoints do.
_LAYER = re.compile(r"(.*/encoderblock)_(\d+)/(.*)")
# Parts of a SigLIP checkpoint that PaliGemma does not have.
_SIGLIP_ONLY = re.compile(r"(img/MAPHead_0/.*|txt/.*|t|b)")


def load_npz(
    path: str | os.PathLike, expected: Any, *, put: Put | None = None, adapt: Adapt | None = None
) -> Any:
    """The weights in `path` as the tree `expected`; see `source.load`, which this calls.

    Raises UserError for a file that is missing, damaged or cut short, and for every key that is
    missing, unknown, misshapen or not floating point, naming each.
    """
    return load(open_npz(path), expected, put=put, adapt=adapt)


def open_npz(path: str | os.PathLike) -> Source:
    """The arrays of a `.npz` by their names without `params/`, from the headers alone.

    Encoder layers that are kept apart (`encoderblock_0`, …) are stacked; what a SigLIP file holds
    beside the encoder (text tower, attention pool, temperature) is left out and told.
    Raises UserError for a file that is missing or damaged.
    """
    headers = read_shapes(path)
    leaves: dict[str, Leaf] = {}
    unknown, left_out = [], []
    layers: dict[str, dict[int, Leaf]] = {}
    for key, (shape, dtype) in headers.items():
        name = key.removeprefix(PREFIX)
        stored = BF16 if dtype == _VOID_BF16 else dtype
        leaf = Leaf(shape, stored, partial(_read, path, key))
        if not key.startswith(PREFIX):
            unknown.append(key)
        elif _SIGLIP_ONLY.fullmatch(name):
            left_out.append(key)
        elif found := _LAYER.fullmatch(name):
            layers.setdefault(f"{found[1]}/{found[3]}", {})[int(found[2])] = leaf
        else:
            leaves[name] = leaf
    missing = {}
    depth = 1 + max((i for parts in layers.values() for i in parts), default=-1)
    for name, parts in layers.items():
        before, _, after = name.partition("/encoderblock/")
        lacking = [
            f"{PREFIX}{before}/encoderblock_{i}/{after}" for i in range(depth) if i not in parts
        ]
        if lacking or len({part.shape for part in parts.values()}) > 1:
            missing[name] = lacking or [f"{PREFIX}{name} (its layers differ in shape)"]
        else:
            leaves[name] = stacked([parts[i] for i in range(depth)])
    if unknown and len(unknown) == len(headers):
        unknown = [f"keys without the leading {PREFIX!r}: {', '.join(unknown)}"]
    return Source(
        str(path),
        "npz",
        leaves,
        missing=missing,
        unknown=unknown,
        left_out=left_out,
        label=lambda name: PREFIX + name,
    )


def stacked(parts: list[Leaf]) -> Leaf:
    """Layers of one shape as one leaf, read one after the other into their place."""

    def read(dtype: np.dtype) -> np.ndarray:
        out = np.empty((len(parts), *parts[0].shape), dtype)
        for i, part in enumerate(parts):
            out[i] = part.stored()
        return out

    return Leaf((len(parts), *parts[0].shape), parts[0].dtype, read)


def _read(path: str | os.PathLike, key: str, dtype: np.dtype) -> np.ndarray:
    with _reading(path), np.load(path, allow_pickle=False) as file:
        array = file[key]
    array = array.view(ml_dtypes.bfloat16) if array.dtype == _VOID_BF16 else array
    return array.astype(dtype, copy=False)


def read_shapes(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Key → (shape, dtype as stored) of every array in the file, from the headers alone."""
    headers = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    header = np.lib.format.read_array_header_1_0(file)
                else:
                    header = np.lib.format.read_array_header_2_0(file)
            shape, _, dtype = header
            headers[entry.removesuffix(".npy")] = (tuple(shape), dtype)
    return headers


def save_npz(path: str | os.PathLike, params: Any) -> None:
    """Write a tree of parameters under `params/…`, bfloat16 as two-byte void like the originals.

    Leaves are fetched one at a time. The file appears under its name only once it is whole.
    """

    def leaf(array) -> Leaf:
        return Leaf(array.shape, array.dtype, lambda _: np.asarray(jax.device_get(array)))

    save_leaves(path, {name: leaf(array) for name, array in flatten(params).items()})


def save_leaves(
    path: str | os.PathLike, leaves: Mapping[str, Leaf], dtype: np.dtype | None = None
) -> None:
    """As `save_npz`, from leaves that are read when their turn comes; `dtype`: None as stored."""
    path = Path(path)
    aside = path.with_name(path.name + ".partial")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, leaf in leaves.items():
                array = leaf.read(dtype or leaf.dtype)
                if array.dtype == ml_dtypes.bfloat16:
                    array = array.view(_VOID_BF16)
                with archive.open(f"{PREFIX}{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
                del array
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


class _reading:
    """Turns the many ways in which a damaged file fails into one line for the user."""

    def __init__(self, path: str | os.PathLike):
        self.path = path

    def __enter__(self):
        if not Path(self.path).is_file():
            raise UserError(f"{self.path}: there is no such weights file.")

    def __exit__(self, kind, error, trace):
        if isinstance(error, UserError):
            return
        if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError | ValueError | OSError):
            detail = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.path}: not a whole .npz file, perhaps cut short ({detail}); fetch it again."
            ) from error
