"""Data sets on disk as random access to decoded records, and what each record can be used for.

A data set is a TFDS directory `<data_dir>/<name>/…/<version>` in array_record files, as the
builders of `tfds_builders` write it. Nothing here imports TensorFlow.
"""

import hashlib
import json
import logging
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data import record as records
from rg_jax.data import tasks
from rg_jax.data.tasks import TASK_NAMES, drafts
from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat

_log = logging.getLogger(__name__)

# From this many records on, what a scan found is kept in a file beside the data set.
SCAN_FILE_FROM = 2_000

PIXELS = ("image", "segmentation")

# The bytes of an array, its dtype and shape → the array.
_Unpack = Callable[[bytes, np.dtype, tuple[int, ...]], np.ndarray]


class RecordSource:
    """Random access to the decoded records of one split. Make one with `open_source`.

    `source[i]` is the record (see `rg_jax.data.record`); `light(i)` is the same without reading
    its pixels: image and segmentation are zeros of the right size. Both raise UserError naming
    record and data set if it cannot be read. With `cache` every record read stays in memory. Can
    be pickled; a worker process opens the files again.
    """

    def __init__(
        self, directory: Path, name: str, split: str, cache: bool = False, command: str = ""
    ):
        self.directory, self.name, self.split, self.cache = directory, name, split, cache
        self.build_command = command
        self._open()

    def _open(self) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.decode import DeserializeMethod

        builder = tfds.builder_from_directory(self.directory)
        features = builder.info.features
        self._stored = {key: (features[key].np_dtype, _unpacking(features[key])) for key in PIXELS}
        self._raw = builder.as_data_source(
            self.split, deserialize_method=DeserializeMethod.RAW_BYTES
        )
        self._records: dict[int, records.Record] = {}
        self._scans: dict[tuple, Scan] = {}
        self._rows_of_ids: dict[str, int] | None = None
        self._lock = threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key[0] != "_"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._raw)

    def __repr__(self) -> str:
        return f"{self.name}/{self.split} ({len(self)} records)"

    def __getitem__(self, row: int) -> records.Record:
        record = self._read(row, PIXELS)
        if self.cache:
            self._records[row] = record
        return record

    def without_masks(self, row: int) -> records.Record:
        """The record with its image but zeros for its segmentation, which need not be unpacked."""
        return self[row] if self.cache else self._read(row, PIXELS[:1])

    def light(self, row: int) -> records.Record:
        """The record without its pixels; much cheaper to read."""
        return self._read(row, ())

    def _read(self, row: int, wanted: Sequence[str]) -> records.Record:
        known = self._records.get(row)
        if known is not None:
            return known
        try:
            return records.decode(_example(self._raw[row], self._stored, wanted))
        except Exception as error:
            raise self._unreadable(row, error) from error

    def row_of(self, record_id: str) -> int:
        """The row of a record. Raises UserError for an id that is not in the split."""
        with self._lock:
            if self._rows_of_ids is None:
                self._rows_of_ids = {self.light(row)["id"]: row for row in range(len(self))}
        if record_id not in self._rows_of_ids:
            raise UserError(f"data set {self.name}, split {self.split}: no record {record_id!r}")
        return self._rows_of_ids[record_id]

    def scan(self, languages: Sequence[str], fmt: GroundingFormat) -> "Scan":
        """What every record can be used for, in these languages and with this format.

        Reads all texts once (no pixels); kept in memory and, for a large set, in a file.
        """
        key = (tuple(languages), fmt.has_boxes, fmt.id_required)
        with self._lock:
            if key not in self._scans:
                self._scans[key] = _scan(self, key, fmt)
            return self._scans[key]

    def _unreadable(self, row: int, error: Exception) -> UserError:
        try:
            name = records.decode(_example(self._raw[row], self._stored, ()))["id"]
        except Exception:
            name = f"number {row}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return UserError(
            f"record {name} of data set {self.name}, split {self.split} cannot be read"
            f" ({reason}): its file in {self.directory} is damaged; build the data set again with"
            f" {self.build_command}"
        )


class Scan:
    """What the records of a source can be used for.

    `counts[row, task, language]`: number of drafts, tasks in the order of TASK_NAMES. `marked`:
    number of texts that no task can use since they hold something that looks like a mark.
    `captions[row]`: a number for each different caption, in all its languages; records without
    one have numbers of their own.
    """

    def __init__(
        self, counts: np.ndarray, languages: tuple[str, ...], marked: int, captions: np.ndarray
    ):
        self.counts, self.languages, self.marked = counts, languages, marked
        self.captions = captions

    def usable(self, wanted: Sequence[str]) -> np.ndarray:
        """Rows of the records for which at least one of the wanted tasks applies."""
        columns = [TASK_NAMES.index(task) for task in wanted]
        return np.flatnonzero(self.counts[:, columns].any(axis=(1, 2)))

    def questions(self, wanted: Sequence[str]) -> int:
        """How many things the wanted tasks can ask of all records together."""
        columns = [TASK_NAMES.index(task) for task in wanted]
        return int(self.counts[:, columns].sum())

    def available(self, row: int) -> dict[str, dict[str, int]]:
        """Per task and language how many drafts a record has; what has none is left out."""
        table = self.counts[row].tolist()
        return {
            task: {lang: n for lang, n in zip(self.languages, line, strict=True) if n}
            for task, line in zip(TASK_NAMES, table, strict=True)
        }


def open_source(
    name: str, split: str, data_dir: str | os.PathLike, cache: bool = False
) -> RecordSource:
    """Opens a split of a built data set. `name` may be `name/config` and carry a `:version`.

    `cache` keeps every record in memory once it is read: for small sets. Raises UserError, naming
    the command that builds it, for a data set that is not there, and for an unknown or empty split.
    """
    data_dir = Path(data_dir)
    directory = _find(name, data_dir)
    short = name.partition(":")[0]
    command = _build_command(short, data_dir)
    try:
        import tensorflow_datasets as tfds

        splits = tfds.builder_from_directory(directory).info.splits
        sizes = {key: splits[key].num_examples for key in splits}
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set '{short}' in {directory} cannot be opened ({reason}): build it again with"
            f" {command}"
        ) from error
    base = re.split(r"[\[+]", split)[0]
    if base not in sizes:
        known = ", ".join(sizes) or "none"
        raise UserError(f"data set '{short}' has no split '{split}'; it has: {known}")
    try:
        size = splits[split].num_examples
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set '{short}': '{split}' names no part of a split ({reason}); write for"
            f" example '{base}[:80%]'"
        ) from error
    if size == 0:
        raise UserError(
            f"data set '{short}', split '{split}' is empty: build it with {command}, or name a"
            " larger part"
        )
    try:
        source = RecordSource(directory, short, split, cache, command)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data set '{short}', split '{split}' in {directory} cannot be read ({reason}): build"
            f" it again with {command}"
        ) from error
    return source


def _find(name: str, data_dir: Path) -> Path:
    """The version directory of a data set; the newest if several are there."""
    path, _, version = name.partition(":")
    found = sorted((data_dir / path).glob("**/dataset_info.json")) if path else []
    # A build under way or broken off lies in a directory of its own, named so by TFDS.
    directories = [p.parent for p in found if not p.parent.name.startswith("incomplete")]
    if version:
        directories = [d for d in directories if d.name == version]
    if not directories:
        raise UserError(
            f"data set '{name}' is not in {data_dir}: build it with"
            f" {_build_command(path, data_dir)}, or say where it lies (training:"
            " --config.data.dir=DIR, evaluation: --data_dir=DIR)"
        )
    if len({d.parent for d in directories}) > 1:
        configs = ", ".join(sorted({str(d.parent.relative_to(data_dir)) for d in directories}))
        raise UserError(f"data set '{name}' has several configurations, name one of: {configs}")

    def number(directory: Path) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", directory.name)]

    return max(directories, key=number)


def _build_command(name: str, data_dir: Path) -> str:
    short = name.partition("/")[0] or "NAME"
    source = "" if short == "phantom" else " --source=DIR"  # phantoms need none
    return f"python -m tfds_builders {short}{source} --data_dir={data_dir}"


def _unpacking(feature: Any) -> _Unpack:
    """How the arrays of a TFDS feature are stored; sets that are older have others."""
    from rg_jax.data import planes

    if isinstance(feature, planes.Planes):
        return planes.join
    return _inflated if feature.to_json_content().encoding == "zlib" else _plain


def _plain(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape)


def _inflated(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return _plain(zlib.decompress(data), dtype, shape)


def _example(
    raw: bytes, arrays: Mapping[str, tuple[np.dtype, _Unpack]], wanted: Collection[str]
) -> dict[str, Any]:
    """A stored example as TFDS would decode it; arrays that are not `wanted` are zeros.

    `arrays`: the dtype of each, and what reads it from its bytes. Reads the protocol buffer itself:
    TFDS turns every field into arrays on the way, which takes several times as long, and reads the
    pixels where only texts are wanted.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    stored: dict[str, Any] = {}
    for key, feature in tf_example_pb2.Example.FromString(raw).features.feature.items():
        kind = feature.WhichOneof("kind")
        stored[key] = getattr(feature, kind).value if kind else ()

    def values(key: str) -> Sequence:
        return stored.get(key, ())

    def first(key: str) -> bytes:
        return values(key)[0]

    def columns(group: str, names: Sequence[str]) -> dict[str, Sequence]:
        return {name: values(f"{group}/{name}") for name in names}

    entities = columns("entities", ("language", "field", "start", "end", "class_id"))
    boxes = list(values("entities/box"))
    entities["box"] = [boxes[i : i + 4] for i in range(0, len(boxes), 4)]
    example = {
        "texts": columns("texts", ("language", *records.TEXT_FIELDS)),
        "qa": columns("qa", records.QA_FIELDS),
        "entities": entities,
        "source": {name: first(f"source/{name}") for name in records.SOURCE_FIELDS},
    }
    for key in ("id", "modality", "body_part"):
        example[key] = first(key)
    for key in ("rescale", "spacing_mm"):
        example[key] = np.frombuffer(first(key), np.float64)
    for key, (dtype, unpack) in arrays.items():
        shape = tuple(values(f"{key}/shape"))
        if key in wanted:
            example[key] = unpack(first(f"{key}/value"), dtype, shape)
        else:
            zero = bytes(dtype.itemsize)
            example[key] = np.ndarray(shape, dtype, zero, strides=(0,) * len(shape))
    return example


def _scan(source: RecordSource, key: tuple, fmt: GroundingFormat) -> Scan:
    languages = key[0]
    path = _scan_path(source, key) if len(source) >= SCAN_FILE_FROM else None
    if path is not None and path.exists():
        try:
            with np.load(path) as stored:
                return Scan(stored["counts"], languages, int(stored["marked"]), stored["captions"])
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
            _log.warning("%s cannot be read; the data set is scanned again", path)
    counts = np.zeros((len(source), len(TASK_NAMES), len(languages)), np.uint16)
    captions, numbers = np.zeros(len(source), np.int64), {}
    marked = 0
    # A source that keeps its records reads them whole at once: it will need them anyway.
    read = source.__getitem__ if source.cache else source.light
    for row in range(len(source)):
        record = read(row)
        said = tuple(sorted((lang, t["caption"]) for lang, t in record["texts"].items()))
        said = said if any(caption for _, caption in said) else row
        captions[row] = numbers.setdefault(_digest(said), len(numbers))
        for t, task in enumerate(TASK_NAMES):
            for i, language in enumerate(languages):
                found, left_out = drafts(record, task, language, fmt)
                counts[row, t, i] = len(found)
                marked += left_out
    if marked:
        _log.warning("%r: %d texts look like grounding marks and are left out", source, marked)
    scan = Scan(counts, languages, marked, captions)
    if path is not None:
        _keep(path, scan)
    return scan


def _digest(value: Any) -> bytes:
    # A million captions as 16 bytes each, instead of themselves.
    return hashlib.blake2b(repr(value).encode(), digest_size=16).digest()


def _scan_path(source: RecordSource, key: tuple) -> Path:
    # A set that is built again has other file sizes and times, and thus another name here.
    files = sorted(source.directory.glob("*array_record*"))
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    # What a record is good for is decided by the code of the tasks: its scans are its own.
    code = hashlib.sha256(Path(tasks.__file__).read_bytes()).hexdigest()
    facts = json.dumps([2, source.split, key, stats, code])
    return source.directory / f"scan-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.npz"


def _keep(path: Path, scan: Scan) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(
                file, counts=scan.counts, marked=scan.marked, captions=scan.captions
            )
        os.replace(temporary, path)
    except OSError as error:
        _log.info("the scan is not kept: %s cannot be written (%s)", path, error.strerror)
    finally:
        temporary.unlink(missing_ok=True)
