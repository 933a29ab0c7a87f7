"""The official RefRad2D layout on disk: where its pieces lie, and its tables.

dicoms_anon/{id[:2]}/{id}.dcm.zst                     slices
refrad2d_vqa_dataset.parquet                          reports and questions by rsopid
refrad2d_segment/rsopid_2_segment_v3_{ct,mr}.json     boxes, mentions and masks of a slice
refrad2d_segment/refrad2d_sampled_dataset_v3_{ct,mr}.json   slices for grounded questions
split_v18/generated/filtered_{ct,mr}_splits/snippet2rsopids_{train,val,test}_{ct,mr}_only.json
"""

import contextlib
import dataclasses
import io
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from rg_jax.errors import UserError

SPLITS = ("train", "val", "test")
STRUCTS = {"en": "english", "de": "german"}
KEYWORDS = {"en": "keywords_eng", "de": "keywords_de"}
# Of the parquet, beside the id.
COLUMNS = ("modality", "body_part", *STRUCTS.values())
# Where mask and sampled paths of an index are cut if they were written on another machine.
SEGMENT_FOLDER = "refrad2d_segment"
# The tags that say whose slice it is stand at the beginning of the header.
_HEAD_BYTES = 1 << 17


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the pieces lie. Paths in messages are told from `source`."""

    source: Path
    dicoms: Path
    parquet: Path
    segment: Path
    splits: Path

    def dicom(self, slice_id: str) -> Path:
        return self.dicoms / slice_id[:2] / f"{slice_id}.dcm.zst"

    def index(self, kind: str) -> Path:
        return self.segment / f"rsopid_2_segment_v3_{kind}.json"

    def sampled(self, kind: str) -> Path:
        return self.segment / f"refrad2d_sampled_dataset_v3_{kind}.json"

    def split(self, split: str, kind: str) -> Path:
        return self.splits / f"filtered_{kind}_splits" / f"snippet2rsopids_{split}_{kind}_only.json"

    def listed(self, written: str) -> Path:
        """The file that an index names: absolute, or relative to the root or its own folder.

        An index that was written elsewhere names folders of that machine; what comes behind its
        segment folder counts. The first that exists is taken; if none does, the first that could.
        """
        path = Path(written)
        tries = [path] if path.is_absolute() else [self.source / path]
        parts = PurePosixPath(written.replace("\\", "/")).parts
        for name in (self.segment.name, SEGMENT_FOLDER):
            if name in parts:
                last = len(parts) - parts[::-1].index(name)
                tries.append(self.segment.joinpath(*parts[last:]))
        if not path.is_absolute():
            tries += [self.segment / path, self.segment.parent / path]
        return next((found for found in tries if found.is_file()), tries[0])

    def name(self, path: Path) -> str:
        """The path as it is told: from the source if it lies below it."""
        return str(path.relative_to(self.source)) if path.is_relative_to(self.source) else str(path)


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file (its `object_pairs_hook`). ValueError if two entries have one name.

    Python would drop all but the last. The name is not quoted: it may be a sentence of a report.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        number = next(i for i, (key, _) in enumerate(pairs, 1) if key in seen or seen.add(key))
        raise ValueError(f"entry {number} of an object has the name of an earlier one")
    return found


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, a dict or a list. Raises UserError naming the file.

    Also where an object names two of its entries alike, see `each_once`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a {kind.__name__}")
    return content


def is_slice_id(value: Any) -> bool:
    """Whether it can be a slice's id, which is a file's name too."""
    return isinstance(value, str) and value != "" and os.sep not in value and value[0] != "."


def read_split(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The slice ids of each caption of a split file, and what is wrong with others, by number.

    Captions are patients' texts: faults do not quote them. Raises UserError if it is no such file.
    """
    captions, faults = {}, []
    for number, (caption, ids) in enumerate(read_json(path, dict).items(), 1):
        if isinstance(ids, list) and all(map(is_slice_id, ids)):
            captions[caption] = ids
        else:
            faults.append(f"caption {number} does not hold a list of slice ids")
    return captions, faults


class Reports:
    """The parquet: one row per slice, by its id. The columns stay packed in memory.

    `repeated`: ids of several rows that differ; `foreign`: columns that the layout does not have.

    Raises UserError for a file that is none, or that lacks a column.
    """

    def __init__(self, path: Path, languages: tuple[str, ...]):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise UserError(
                'the parquet needs the package pyarrow: pip install -e ".[data]"'
            ) from error
        wanted = ["modality", "body_part", *(STRUCTS[language] for language in languages)]
        try:
            with pq.ParquetFile(path) as file:
                known = file.schema_arrow.names
                key = id_column(file.schema_arrow)
                for column in wanted:
                    if column not in known and column != "body_part":
                        other = [code for code, name in STRUCTS.items() if name in known]
                        hint = f" (--languages={','.join(other)})" if other else ""
                        raise UserError(
                            f"{path}: has no column {column}{hint}; it has {', '.join(known)}"
                        )
                self.foreign = [name for name in known if name not in (key, *COLUMNS)]
                columns = [key, *(column for column in wanted if column in known)]
                self._table = file.read(columns=columns).combine_chunks()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; --parquet names another place") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: not readable as parquet ({error})") from error
        ids = [str(value) for value in self._table.column(key).to_pylist()]
        self._rows: dict[str, int] = {}
        self.repeated: list[str] = []
        for row, slice_id in enumerate(ids):
            if self._rows.setdefault(slice_id, row) != row and not self._same(slice_id, row):
                self.repeated.append(slice_id)

    def _same(self, slice_id: str, row: int) -> bool:
        return self.get(slice_id) == self._at(row)

    def _at(self, row: int) -> dict[str, Any]:
        return self._table.slice(row, 1).to_pylist()[0]

    def __contains__(self, slice_id: str) -> bool:
        return slice_id in self._rows

    def get(self, slice_id: str) -> dict[str, Any] | None:
        """The row of a slice as plain Python, None if there is none."""
        row = self._rows.get(slice_id)
        return None if row is None else self._at(row)


def id_column(schema: Any) -> str:
    """The column of the ids: `rsopid`, or what pandas wrote its index to."""
    if "rsopid" in schema.names:
        return "rsopid"
    stored = (schema.metadata or {}).get(b"pandas")
    if stored:
        index = json.loads(stored).get("index_columns", [])
        if len(index) == 1 and isinstance(index[0], str) and index[0] in schema.names:
            return index[0]
    raise UserError(
        "the parquet has neither a column nor an index rsopid;"
        f" its columns are {', '.join(schema.names)}"
    )


def belongings(path: Path) -> dict[str, str] | None:
    """{"patient", "study", "image": key} of a slice, from its header; what is absent is left out.

    None for a file that cannot be read: that shows when its pixels are.
    """
    try:
        import pydicom
        import zstandard
    except ImportError as error:
        raise UserError(
            f'slices need the package {error.name}: pip install -e ".[data]"'
        ) from error
    keywords = {"patient": "PatientID", "study": "StudyInstanceUID", "image": "SOPInstanceUID"}

    def read(size: int) -> tuple[dict[str, str], bool]:
        """(keys, whether the file holds more) by its first bytes; a negative size: all of them."""
        with path.open("rb") as file:
            packed = file.read(4) == b"\x28\xb5\x2f\xfd"
            file.seek(0)
            stream = zstandard.ZstdDecompressor().stream_reader(file) if packed else file
            head = stream.read(size)
        if not head:
            raise EOFError
        with pydicom.config.disable_value_validation():
            header = pydicom.dcmread(
                io.BytesIO(head),
                stop_before_pixels=True,
                force=True,
                specific_tags=list(keywords.values()),
            )
            found = {kind: str(header.get(name) or "").strip() for kind, name in keywords.items()}
        return {kind: key for kind, key in found.items() if key}, len(head) == size

    # A damaged file fails in any way; it is told of when it is read whole.
    with contextlib.suppress(Exception):
        found, more = read(_HEAD_BYTES)
        if not more or len(found) == len(keywords):
            return found
    with contextlib.suppress(Exception):  # long private elements, or a header that is compressed
        return read(-1)[0]
    return None
