"""The common record: the one form in which every data set reaches the trainer.

A builder hands a plain dict (see `encode`) to TFDS; the pipeline gets the same dict back from
`decode`. `encode` is the gate: whatever passes it can be tagged, cropped and tokenised without
another look, so everything that could only show up as a crash or a wrong target in the middle of a
run is refused here, with the record and the field named.

The record
    id            str, unique within the data set
    image         (H, W, 1) int16 or uint16 as stored, or (H, W, 3) uint8
    rescale       (slope, intercept): stored value * slope + intercept = HU for CT
    modality      "CT", "MR", "XR", ...
    body_part     str, may be empty
    spacing_mm    (row, column) distance of pixels; (0, 0) = unknown
    texts         {"en": {"caption", "clinical_information", "clinical_question"}, ...}
    qa            [{"language", "question", "answer", "type", "choices": [str]}]
    segmentation  (H, W) uint8 class ids, 0 = background; shape (0, 0) = there is none
    entities      [{"language", "field", "start", "end", "class_id", "box"}]; field is "caption" or
                  "qa/<index>/answer", start and end are characters of that text, box is
                  (x_min, y_min, x_max, y_max) in pixels of the image, max exclusive
    source        {"dataset", "group", "licence"}; group = the patient or study to split by
"""

import math
import re
from typing import Any

import numpy as np

from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import NUM_CLASSES

Record = dict[str, Any]

QA_TYPES = ("open", "closed", "yesno", "multiple", "grounded")
TEXT_FIELDS = ("caption", "clinical_information", "clinical_question")
QA_FIELDS = ("language", "question", "answer", "type", "choices")
ENTITY_FIELDS = ("language", "field", "start", "end", "class_id", "box")
SOURCE_FIELDS = ("dataset", "group", "licence")
RECORD_FIELDS = (
    "id",
    "image",
    "rescale",
    "modality",
    "body_part",
    "spacing_mm",
    "texts",
    "qa",
    "segmentation",
    "entities",
    "source",
)
_CHANNELS = {"int16": 1, "uint16": 1, "uint8": 3}
_LANGUAGE = re.compile(r"[a-z]{2}")
_ANSWER_FIELD = re.compile(r"qa/(0|[1-9]\d*)/answer")


def features(image_dtype: str, channels: int):
    """The TFDS features of a data set whose images are all of one dtype.

    `image_dtype`: "int16" or "uint16" (with `channels` 1) or "uint8" (with `channels` 3). Another
    pair raises ValueError: it is a mistake of the builder, not of its user.
    """
    if _CHANNELS.get(image_dtype) != channels:
        raise ValueError(
            f"images are int16 or uint16 with 1 channel or uint8 with 3, not {image_dtype} with"
            f" {channels}"
        )
    import tensorflow_datasets as tfds  # slow to import, and only builders need it

    text = tfds.features.Text
    from rg_jax.data.planes import Planes

    tensor = tfds.features.Tensor
    # The array_record files compress what they hold, by Zstandard, which is read three times as
    # fast as zlib.
    image = tensor if image_dtype == "uint8" else Planes
    # TFDS keeps float64 as float32 without a word unless the bytes are stored. A slope must come
    # back as it was.
    pair = tensor(shape=(2,), dtype=np.float64, encoding="bytes")
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "image": image(
                shape=(None, None, channels), dtype=np.dtype(image_dtype), encoding="bytes"
            ),
            "rescale": pair,
            "modality": text(),
            "body_part": text(),
            "spacing_mm": pair,
            "texts": tfds.features.Sequence(
                {"language": text(), **{name: text() for name in TEXT_FIELDS}}
            ),
            "qa": tfds.features.Sequence({name: text() for name in QA_FIELDS}),
            # But for this one: TFDS does not read a plain tensor back that is empty.
            "segmentation": tensor(shape=(None, None), dtype=np.uint8, encoding="zlib"),
            "entities": tfds.features.Sequence(
                {
                    "language": text(),
                    "field": text(),
                    "start": np.int32,
                    "end": np.int32,
                    "class_id": np.int32,
                    "box": tensor(shape=(4,), dtype=np.float32),
                }
            ),
            "source": tfds.features.FeaturesDict({name: text() for name in SOURCE_FIELDS}),
        }
    )


def encode(record: Record) -> dict[str, Any]:
    """Check a record and turn it into the example that TFDS writes.

    Raises UserError with the record's id and the field: a field missing or unknown, an empty id, an
    image of another dtype or rank, a segmentation of another size than the image or with an unknown
    class, a span outside its text, spans that overlap or occur twice, a box that is empty or leaves
    the image, an unknown class id or question type, a language that is no two-letter code.
    """
    name = record.get("id")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"record: field id is {name!r}; every record needs a non-empty text as id")
    check = _Checker(name)
    check.keys("", record, RECORD_FIELDS)
    check.text("id", name)
    height, width = check.image(record["image"])
    rescale = check.floats("rescale", record["rescale"], 2)
    if rescale[0] == 0:
        check.fail("rescale", "has slope 0, which makes every pixel the same")
    spacing = check.floats("spacing_mm", record["spacing_mm"], 2)
    if min(spacing) < 0:
        check.fail("spacing_mm", f"is {spacing}; a distance cannot be negative")
    check.text("modality", record["modality"], empty=False)
    check.text("body_part", record["body_part"])
    check.keys("source", record["source"], SOURCE_FIELDS)
    for field in SOURCE_FIELDS:
        check.text(f"source/{field}", record["source"][field], empty=False)

    for field, kind in (("texts", dict), ("qa", list), ("entities", list)):
        if not isinstance(record[field], kind):
            check.fail(field, f"is a {type(record[field]).__name__}, not a {kind.__name__}")
    texts = []
    for language, row in record["texts"].items():
        check.language(f"texts/{language}", language)
        check.keys(f"texts/{language}", row, TEXT_FIELDS)
        for field in TEXT_FIELDS:
            check.text(f"texts/{language}/{field}", row[field])
        texts.append({"language": language, **{field: row[field] for field in TEXT_FIELDS}})

    qa = [check.question(f"qa/{i}", row) for i, row in enumerate(record["qa"])]
    segmentation = check.segmentation(record["segmentation"], (height, width))
    entities = [
        check.entity(f"entities/{i}", entity, record, (height, width))
        for i, entity in enumerate(record["entities"])
    ]
    check.overlaps(entities)
    return {
        "id": name,
        "image": record["image"],
        "rescale": np.array(rescale, np.float64),
        "modality": record["modality"],
        "body_part": record["body_part"],
        "spacing_mm": np.array(spacing, np.float64),
        "texts": texts,
        "qa": qa,
        "segmentation": segmentation,
        "entities": entities,
        "source": {field: record["source"][field] for field in SOURCE_FIELDS},
    }


def decode(example: dict[str, Any]) -> Record:
    """The record from an example as TFDS reads it (texts are bytes, sequences dicts of lists)."""
    texts = {
        row["language"]: {field: row[field] for field in TEXT_FIELDS}
        for row in _rows(example["texts"])
    }
    qa = _rows(example["qa"])
    for row in qa:
        row["choices"] = row["choices"].split("\n") if row["choices"] else []
    entities = _rows(example["entities"])
    for row in entities:
        row["start"], row["end"] = int(row["start"]), int(row["end"])
        row["class_id"] = int(row["class_id"])
        row["box"] = tuple(map(float, row["box"]))
    return {
        "id": _text(example["id"]),
        "image": np.asarray(example["image"]),
        "rescale": tuple(float(value) for value in example["rescale"]),
        "modality": _text(example["modality"]),
        "body_part": _text(example["body_part"]),
        "spacing_mm": tuple(float(value) for value in example["spacing_mm"]),
        "texts": texts,
        "qa": qa,
        "segmentation": np.asarray(example["segmentation"], np.uint8),
        "entities": entities,
        "source": {field: _text(example["source"][field]) for field in SOURCE_FIELDS},
    }


def text_of(record: Record, language: str, field: str) -> str:
    """The text that an entity's language and field name; KeyError or IndexError if there is none.

    `field` is "caption" or "qa/<index>/answer". A question in another language than asked for
    raises KeyError too: such an entity would point into the wrong text.
    """
    if field == "caption":
        return record["texts"][language]["caption"]
    match = _ANSWER_FIELD.fullmatch(field)
    if match is None:
        raise KeyError(f"field {field!r} is neither caption nor qa/<index>/answer")
    row = record["qa"][int(match[1])]
    if row["language"] != language:
        raise KeyError(f"{field} is in language {row['language']!r}, not {language!r}")
    return row["answer"]


class _Checker:
    """The checks of one record; `fail` names the record and the field."""

    def __init__(self, record_id: str):
        self.record_id = record_id

    def fail(self, field: str, problem: str):
        raise UserError(f"record {self.record_id}: field {field} {problem}")

    def keys(self, field: str, value: Any, expected: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            self.fail(field, f"is a {type(value).__name__}, not a dict of {', '.join(expected)}")
        prefix = f"{field}/" if field else ""
        for key in expected:
            if key not in value:
                self.fail(f"{prefix}{key}", "is missing; absent parts are empty, not missing")
        for key in value:
            if key not in expected:
                self.fail(f"{prefix}{key}", f"is not part of the record ({', '.join(expected)})")

    def text(self, field: str, value: Any, empty: bool = True) -> None:
        if not isinstance(value, str):
            self.fail(field, f"is a {type(value).__name__}, not a text")
        if not empty and not value.strip():
            self.fail(field, "is empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(field, f"is not valid Unicode at character {error.start}")

    def language(self, field: str, value: Any) -> None:
        if not isinstance(value, str) or not _LANGUAGE.fullmatch(value):
            self.fail(field, f"has language {value!r}; languages are codes such as en or de")

    def floats(self, field: str, value: Any, count: int) -> tuple[float, ...]:
        try:
            numbers = tuple(float(number) for number in value)
        except (TypeError, ValueError):
            numbers = ()
        if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
            self.fail(field, f"is {value!r}, not {count} finite numbers")
        return numbers

    def image(self, image: Any) -> tuple[int, int]:
        if not isinstance(image, np.ndarray) or image.ndim != 3 or 0 in image.shape:
            self.fail("image", f"has shape {np.shape(image)}, not (height, width, channels)")
        dtype = image.dtype.name
        if dtype not in _CHANNELS:
            self.fail("image", f"has dtype {dtype}; store int16, uint16 or uint8")
        if image.shape[2] != _CHANNELS[dtype]:
            self.fail(
                "image", f"has {image.shape[2]} channels; {dtype} goes with {_CHANNELS[dtype]}"
            )
        return image.shape[0], image.shape[1]

    def segmentation(self, value: Any, size: tuple[int, int]) -> np.ndarray:
        if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype != np.uint8:
            self.fail("segmentation", "is not a (height, width) array of uint8")
        if value.shape == (0, 0):
            return value
        if value.shape != size:
            self.fail("segmentation", f"is {value.shape} where the image is {size} (height, width)")
        if value.max() > NUM_CLASSES:
            self.fail("segmentation", f"holds class {value.max()}; classes go to {NUM_CLASSES}")
        return value

    def question(self, field: str, row: Any) -> dict[str, str]:
        self.keys(field, row, QA_FIELDS)
        self.language(field, row["language"])
        self.text(f"{field}/question", row["question"], empty=False)
        self.text(f"{field}/answer", row["answer"], empty=False)
        if row["type"] not in QA_TYPES:
            self.fail(f"{field}/type", f"is {row['type']!r}, not one of {', '.join(QA_TYPES)}")
        if not isinstance(row["choices"], list):
            self.fail(f"{field}/choices", "is not a list of texts")
        for choice in row["choices"]:
            self.text(f"{field}/choices", choice, empty=False)
            if "\n" in choice:  # choices are stored as one text with a line each
                self.fail(f"{field}/choices", f"holds {choice!r} with a line break in it")
        return {**row, "choices": "\n".join(row["choices"])}

    def entity(self, field: str, row: Any, record: Record, size: tuple[int, int]) -> dict[str, Any]:
        self.keys(field, row, ENTITY_FIELDS)
        try:
            text = text_of(record, row["language"], row["field"])
        except (KeyError, IndexError, TypeError):
            self.fail(field, f"points to {row['language']!r} {row['field']!r}: no such text")
        start, end, class_id = row["start"], row["end"], row["class_id"]
        for number in (start, end, class_id):
            if not isinstance(number, int | np.integer):
                self.fail(field, f"has {number!r} where start, end and class_id are whole numbers")
        if not 0 <= start < end <= len(text):
            self.fail(field, f"has span {start}:{end}, not inside its {len(text)} characters")
        if not 0 <= class_id <= NUM_CLASSES:
            self.fail(field, f"has class_id {class_id}; it goes from 0 (none) to {NUM_CLASSES}")
        height, width = size
        stored = np.array(self.floats(f"{field}/box", row["box"], 4), np.float32)
        x_min, y_min, x_max, y_max = stored.tolist()  # judged as it will be read back
        if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
            self.fail(
                f"{field}/box",
                f"is {tuple(stored.tolist())}: empty, or not inside {width} x {height} pixels",
            )
        return {
            "language": row["language"],
            "field": row["field"],
            "start": int(start),
            "end": int(end),
            "class_id": int(class_id),
            "box": stored,
        }

    def overlaps(self, entities: list[dict[str, Any]]) -> None:
        order = sorted(
            range(len(entities)),
            key=lambda i: (entities[i]["language"], entities[i]["field"], entities[i]["start"]),
        )
        for i, j in zip(order, order[1:], strict=False):
            first, second = entities[i], entities[j]
            same = all(first[key] == second[key] for key in ("language", "field"))
            if same and second["start"] < first["end"]:
                self.fail(
                    f"entities/{j}",
                    f"span {second['start']}:{second['end']} overlaps or repeats entities/{i}",
                )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """TFDS reads a sequence of dicts as a dict of lists: back to rows, texts decoded."""
    decoded = (
        list(map(bytes.decode, values)) if len(values) and isinstance(values[0], bytes) else values
        for values in columns.values()
    )
    return [dict(zip(columns, row, strict=True)) for row in zip(*decoded, strict=True)]
