"""Tensors in files of PyTorch's world: `.safetensors`, and `.bin` / `.ckpt` without running them.

A `.bin` or `.ckpt` is a zip archive with a pickle that says how tensors lie in raw storages.
Unpickling can run any code, so ours knows the handful of names that describe tensors, answers
them with plain data and refuses every other name. Neither reader needs PyTorch.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from rg_jax.errors import UserError
from rg_jax.weights.source import BF16, Leaf

Tensors = dict[str, Leaf]

_SAFE = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BF16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


def read_folder(folder: Path) -> Tensors:
    """All tensors of a model's folder: one file, or shards under an index.

    Raises UserError for no weights, shards without their index, an index that names a file that
    is not there or a key that its file does not hold, and a damaged file.
    """
    for name in INDEXES:
        if (folder / name).is_file():
            return _sharded(folder, name)
    for name in SINGLES:
        if (folder / name).is_file():
            return read_file(folder / name)
    shards = sorted(p.name for p in folder.glob("*-of-*") if p.suffix in (".safetensors", ".bin"))
    if shards:
        raise UserError(
            f"{folder} holds shards ({shards[0]}, …) but not their index, "
            f"{INDEXES[0] if shards[0].endswith('.safetensors') else INDEXES[1]}; fetch it too"
        )
    raise UserError(f"{folder} holds no weights: none of {', '.join(INDEXES + SINGLES)}")


def _sharded(folder: Path, name: str) -> Tensors:
    try:
        places = json.loads((folder / name).read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / name} is not an index of shards ({error!r})") from error
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder / name} names shards that are not there: {', '.join(absent)}")
    held = {file: read_file(folder / file) for file in files}
    wrong = [f"{key} in {file}" for key, file in places.items() if key not in held[file]]
    if wrong:
        raise UserError(f"{folder / name} names what is not there: {', '.join(wrong)}")
    extra = [f"{key} in {file}" for file in files for key in held[file] if key not in places]
    if extra:
        raise UserError(f"{folder / name} does not name what its shards hold: {', '.join(extra)}")
    return {key: held[file][key] for key, file in places.items()}


def read_file(path: Path) -> Tensors:
    """The tensors of one file, by its ending, from headers alone. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such weights file.")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file. Raises UserError for a file that is not whole."""
    tensors = {}
    with _whole(path), safe_open(path, framework="np") as file:
        keys = file.keys()  # it is no dict, and cannot be walked over itself
        for key in keys:
            view = file.get_slice(key)
            kind = view.get_dtype()
            if kind not in _SAFE:
                raise UserError(f"{path}: {key} holds {kind}, which is not supported")
            read = partial(_read_safetensor, path, key)
            tensors[key] = Leaf(tuple(view.get_shape()), _SAFE[kind], read)
    return tensors


def _read_safetensor(path: Path, key: str, dtype: np.dtype) -> np.ndarray:
    with _whole(path), safe_open(path, framework="np") as file:
        return file.get_tensor(key).astype(dtype, copy=False)


class _whole:
    """A damaged file as one line for the user."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, SafetensorError | OSError):
            detail = " ".join(str(error).split())
            raise UserError(
                f"{self.path}: not a whole .safetensors file, perhaps cut short ({detail}); "
                "fetch it again"
            ) from error


def write_safetensors(path: Path, tensors: Mapping[str, Leaf]) -> int:
    """Writes tensors one after the other as they are read; returns the bytes of their data.

    The library's own writer wants all of a file's tensors in memory at once; the format is a
    length, a JSON header and the raw numbers, so they can just as well be written one by one.
    The file appears under its name only once it is whole.
    """
    codes = {dtype: code for code, dtype in _SAFE.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, leaf in tensors.items():
        start, end = end, end + leaf.size * leaf.dtype.itemsize
        header[key] = {
            "dtype": codes[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight
    aside = path.with_name(path.name + ".partial")
    try:
        with aside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for leaf in tensors.values():
                array = np.ascontiguousarray(leaf.stored())
                file.write(array.reshape(-1).view(np.uint8).data)
                del array
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return end


# ---------------------------------------------------------------- pickles, read but not run


class _Storage(NamedTuple):
    """Raw numbers in the archive: entry, dtype, how many."""

    entry: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A view of a storage; all four in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Knows what describes tensors, and nothing else."""

    def __init__(self, file, path: Path, root: str):
        super().__init__(file)
        self.path, self.root = path, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self._tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return self._parameter
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        raise UserError(
            f"{self.path} wants to run {module}.{name}; only tensors are read from such files, "
            "nothing is run. If you trust its source, save its state_dict alone with PyTorch "
            "(torch.save of the tensors) and use that file"
        )

    def persistent_load(self, given: Any) -> _Storage:
        kind, storage, key, _, size = given
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {given!r}")
        return _Storage(f"{self.root}/data/{key}", _STORAGES[storage], int(size))

    def _tensor(self, storage, offset, shape, strides, *_) -> _Tensor:
        # What the file claims is checked here: it was not written by us.
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or not all(
            isinstance(n, int) and n >= 0 for n in numbers
        ):
            raise pickle.UnpicklingError("a tensor without sense")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= storage.size:
            raise pickle.UnpicklingError(f"a tensor of {tuple(shape)} beyond its storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def _parameter(self, tensor, *_) -> _Tensor:
        return tensor


def read_pickled(path: Path) -> Tensors:
    """The tensors of a `.bin`, `.pt` or `.ckpt`: those of its `state_dict`, or of the whole.

    No code in the file is run. Raises UserError for one that tries, a damaged file, the format
    before PyTorch 1.6, and one that holds no tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip archive, but not one that PyTorch has written")
            root = pickles[0].removesuffix("/data.pkl")
            order = f"{root}/byteorder"
            if order in entries and archive.read(order) != b"little":
                raise UserError(f"{path} was written on a big-endian machine: not supported")
            with archive.open(pickles[0]) as file:
                content = _Unpickler(file, path, root).load()
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path}: not a whole PyTorch file: cut short, or written before PyTorch 1.6 "
            f"({error}); fetch it again, or save it anew with a newer PyTorch"
        ) from error
    except UserError:
        raise
    # A pickle that was tampered with fails in any way it likes; it has run nothing.
    except Exception as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    found = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in found if isinstance(value, _Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    _check_storages(path, entries, tensors.values())
    return {
        str(key): Leaf(t.shape, t.storage.dtype, partial(_read_tensor, path, t))
        for key, t in tensors.items()
    }


def _check_storages(path: Path, entries: Mapping[str, Any], tensors: Iterable[_Tensor]) -> None:
    for storage in {tensor.storage for tensor in tensors}:
        entry = entries.get(storage.entry)
        if entry is None or entry.file_size < storage.size * storage.dtype.itemsize:
            raise UserError(f"{path}: damaged: {storage.entry} is not there or cut short")


def _read_tensor(path: Path, tensor: _Tensor, dtype: np.dtype) -> np.ndarray:
    kept, size = tensor.storage.dtype, tensor.storage.dtype.itemsize
    count = math.prod(tensor.shape) and 1 + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    try:
        with zipfile.ZipFile(path) as archive, archive.open(tensor.storage.entry) as file:
            file.seek(tensor.offset * size)
            flat = np.frombuffer(file.read(count * size), kept)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: {tensor.storage.entry} is damaged ({error})") from error
    if len(flat) < count:
        raise UserError(f"{path}: {tensor.storage.entry} is cut short")
    strides = [step * size for step in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    return view.astype(dtype, copy=dtype != kept)
