"""SLAKE 1.0 as it lies on disk: questions, pictures, masks and boxes, read and checked.

Every defect raises `Found`, a UserError with the file's name and the kind of the problem.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rg_jax.grounding.boxes import union_box
from tfds_builders.problems import Found, Problem
from tfds_builders.slake.labels import Label, label_of

Box = tuple[float, float, float, float]

SPLIT_FILES = {"train": "train.json", "val": "validate.json", "test": "test.json"}
MODALITIES = {"ct": "CT", "mri": "MR", "mr": "MR", "x-ray": "XR", "xray": "XR", "x ray": "XR"}
_FIELDS = ("img_name", "question", "answer", "q_lang", "answer_type", "modality", "location")


@dataclass(frozen=True)
class Question:
    """One question of SLAKE; `type` is "open" or "closed"."""

    image: str  # folder below imgs/, e.g. "xmlab102"
    language: str
    question: str
    answer: str
    type: str
    modality: str
    location: str


def read_questions(
    path: Path, counts: Counter[str], report: Callable[[Problem], None] | None = None
) -> list[Question]:
    """The questions of one split in file order; those without an answer are left out, counted.

    A question that is damaged goes to `report` and is left out; without `report` it raises.
    """
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise Found("unreadable file", path, "must hold a list of questions")
    questions = []
    for i, row in enumerate(rows):
        try:
            question = _question(row, f"{path}: question {i}")
        except Found as error:
            if report is None:
                raise
            report(error.problem)
            continue
        if question.question and question.answer:
            questions.append(question)
        else:
            what = f"questions without text or answer in {path.name} ({question.language})"
            counts[f"{what}, left out"] += 1
    return questions


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise Found("unreadable file", where, "is no object with fields")
    for field in _FIELDS:
        if not isinstance(row.get(field), str):
            raise Found("unreadable file", where, f"has no text in field {field}")
    kind = row["answer_type"].strip().lower()
    if kind not in ("open", "closed"):
        text = f"answer_type {row['answer_type']!r} is not OPEN or CLOSED"
        raise Found("unknown question type", where, text)
    modality = MODALITIES.get(row["modality"].strip().lower())
    if modality is None:
        raise Found("unsupported modality", where, f"unknown modality {row['modality']!r}")
    name = Path(row["img_name"])
    if len(name.parts) != 2 or name.name != "source.jpg" or name.parts[0].startswith("."):
        text = f"img_name {row['img_name']!r} is not <folder>/source.jpg"
        raise Found("unreadable file", where, text)
    return Question(
        name.parts[0],
        row["q_lang"].strip().lower(),
        row["question"].strip(),
        row["answer"].strip(),
        kind,
        modality,
        row["location"].strip(),
    )


def read_mask_table(path: Path) -> dict[int, Label]:
    """mask.txt: value → label."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Found("unreadable file", path, f"cannot be read ({error})") from error
    table = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        value, colon, name = line.partition(":")
        if not colon or not value.strip().isdecimal() or not name.strip():
            raise Found("unreadable file", path, f"line {number} is {line!r}, not <value>:<label>")
        if not 1 <= int(value) <= 255 or int(value) in table:
            text = f"line {number}: value {value} is not in 1..255, or repeated"
            raise Found("unreadable file", path, text)
        table[int(value)] = label_of(name)
    return table


def read_picture(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as 8-bit RGB, whatever its mode."""
    return np.array(_open(path).convert("RGB"))


def read_mask(path: Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """The values of a mask; `size` is (height, width) of its picture.

    The value stands in one or in all of the colour channels; alpha says nothing.
    """
    image = _open(path)
    if image.mode in ("RGB", "RGBA", "P", "LA"):
        channels = np.asarray(image.convert("RGBA"))[..., :3]
    elif image.mode == "L":
        channels = np.asarray(image)[..., None]
    else:
        raise Found("unreadable file", path, f"a mask of mode {image.mode} cannot be read")
    values = channels.max(axis=-1)
    if ((channels != 0) & (channels != values[..., None])).any():
        text = "colour channels hold different values; which one is the label?"
        raise Found("unreadable file", path, text)
    if values.shape != size:
        raise Found(
            "mask of another shape",
            path,
            f"the mask is {values.shape[1]} x {values.shape[0]} pixels, its picture"
            f" {size[1]} x {size[0]}",
        )
    return values


def read_boxes(path: Path, size: tuple[int, int], counts: Counter[str]) -> dict[str, Box]:
    """detection.json: label name → the box around all its boxes, in pixels, max exclusive.

    `size` is (height, width). A box that leaves the picture by at most a pixel is clipped and
    counted; one that leaves it further raises UserError.
    """
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise Found("unreadable file", path, "must hold a list of boxes")
    height, width = size
    found: dict[str, list[Box]] = {}
    for row in rows:
        if not isinstance(row, dict):
            text = f"{row!r} is not {{label: [x, y, width, height]}}"
            raise Found("unreadable file", path, text)
        for name, box in row.items():
            try:
                x, y, w, h = (float(value) for value in box)
            except (TypeError, ValueError):
                text = f"box {box!r} of {name} is not x, y, width, height"
                raise Found("unreadable file", path, text) from None
            if not (w > 0 and h > 0):
                raise Found("box outside the image", path, f"box {box} of {name} is empty")
            if not (x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1):
                text = f"box {box} of {name} leaves the picture of {width} x {height} pixels"
                raise Found("box outside the image", path, text)
            x_max, y_max = min(x + w, float(width)), min(y + h, float(height))
            clipped = (max(x, 0.0), max(y, 0.0), x_max, y_max)
            if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
                text = f"box {box} of {name} lies outside the picture"
                raise Found("box outside the image", path, text)
            counts["boxes read"] += 1
            counts["boxes clipped by up to a pixel"] += clipped != (x, y, x + w, y + h)
            found.setdefault(label_of(name).name, []).append(clipped)
    counts["boxes merged into the box around all of one label"] += sum(
        len(boxes) for boxes in found.values() if len(boxes) > 1
    )
    return {name: union_box(boxes) for name, boxes in found.items()}


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise Found("missing file", path, "no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Found("unreadable file", path, f"the picture cannot be read ({error})") from error
    return image


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Found("missing file", path, "no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Found("unreadable file", path, f"not readable as JSON ({error})") from error
