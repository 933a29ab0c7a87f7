"""How TFDS writes, mended in three places.

A data set beyond one gigabyte is shuffled through files, which TFDS opens with TensorFlow: here
Python opens them, in pieces, so that a thousand of them need not be open at once. And an example's
fields come in no particular order, other in every run: here sorted, so that two builds of the same
source are equal byte by byte. And files are compressed at the level that is read fastest.
"""

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tensorflow_datasets.core import example_serializer, file_adapters, shuffle

_HEAD = struct.Struct("=16sQ")
_PIECE = 1 << 16
# How files are compressed, by the number of channels. Slices, whose noise lies apart (see
# `rg_jax.data.planes`), at a level that leaves noise as it is: a tenth larger than at level 3,
# TFDS's own, and read in half the time. Pictures would be half larger and read no faster.
COMPRESSION = {1: "zstd:-1", 3: "zstd:3"}


class Bucket:
    """(hash key, bytes) pairs in a file, in the order in which they were added."""

    def __init__(self, path: Any):
        self._path = Path(path)
        self._waiting: list[bytes] = []
        self._held = 0
        self._length = 0
        self._size = 0

    @property
    def size(self) -> int:
        return self._size

    def __len__(self) -> int:
        return self._length

    def add(self, key: int, data: bytes) -> None:
        self._waiting += (_HEAD.pack(key.to_bytes(16, "little"), len(data)), data)
        self._held += len(data)
        self._length += 1
        self._size += len(data)
        if self._held >= _PIECE:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.writelines(self._waiting)
        self._waiting, self._held = [], 0

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        self.flush()
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            while head := file.read(_HEAD.size):
                key, size = _HEAD.unpack(head)
                yield int.from_bytes(key, "little"), file.read(size)

    def del_file(self) -> None:
        self._path.unlink(missing_ok=True)


class Serializer(example_serializer.ExampleSerializer):
    """The same bytes for the same example."""

    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


def _writes(compression: str) -> Callable[[Any, Any], None]:
    def write(path: Any, iterator: Any) -> None:
        """Examples (key, bytes) into an array_record file."""
        options = f"group_size:1,{compression}"
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), options)
        for _, example in iterator:
            writer.write(example)
        writer.close()

    return write


@contextlib.contextmanager
def mended(compression: str) -> Iterator[None]:
    """Within it, TFDS writes with `Bucket` and `Serializer`, and files of that compression."""
    kept = shuffle._Bucket, example_serializer.ExampleSerializer
    adapter = file_adapters.ArrayRecordFileAdapter
    usual = adapter.__dict__["write_examples"]
    shuffle._Bucket, example_serializer.ExampleSerializer = Bucket, Serializer
    adapter.write_examples = staticmethod(_writes(compression))
    try:
        yield
    finally:
        adapter.write_examples = usual
        shuffle._Bucket, example_serializer.ExampleSerializer = kept
