"""What can be wrong with records: why they are refused, and what stands in two places.

`record.encode` decides what a record may be; what it refuses is told apart here by kind. What it
lets through is looked at again by `doubts`. No detail quotes a text: a data check's output may
travel further than the data.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rg_jax.data import record
from rg_jax.data.record import Record
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import NUM_CLASSES
from tfds_builders.doubts import Finding, doubts, guarded
from tfds_builders.problems import Problem
from tfds_builders.splits import level

LEAK = "leakage between splits"


def examine(item: Record, file: str) -> tuple[list[Problem], bool]:
    """All problems of a record, and whether it can be built at all. Never raises.

    `file` is where its reader is to look.
    """
    try:
        record.encode(item)
        refused = ""
    except UserError as error:
        refused = str(error)
    except Exception as error:  # a check goes on to the end, whatever it meets
        refused = f"cannot be encoded ({type(error).__name__}: {error})"
    found = list(guarded(item, _FAULTS)) if refused else []
    if refused and not any(harmful for _, _, harmful in found):
        found.append(("not a valid record", refused, True))
    found += doubts(item)
    problems = [Problem(kind, file, detail, harmful) for kind, detail, harmful in found]
    return problems, not refused


class Seen:
    """Ids, pictures and groups met so far, and where: finds what stands in two places."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        # Words of the leaks that the builder has told of: what it knows is not told twice.
        self.told: set[str] = set()
        # Hashes, so that a million records cost some hundred MB, and group keys are not kept.
        self.images: dict[bytes, tuple[str, str]] = {}
        self.groups: dict[bytes, dict[str, str]] = {}

    def look(self, item: Record, split: str, file: str) -> list[Problem]:
        """Problems of a record of `split` with those before it. Never raises.

        Group keys (patients) are never written down.
        """
        found = guarded(item, [lambda item: self._look(item, split)])
        return [
            Problem(kind, file, detail, harmful)
            for kind, detail, harmful, others in found
            if kind != LEAK or not self.told.issuperset(others)
        ]

    def tell(self, problem: Problem) -> None:
        """A problem that the builder has found."""
        if problem.kind == LEAK:
            self.told.update(re.findall(r"[\w.-]+", problem.detail))

    def _look(self, item: Record, split: str) -> Iterator[tuple[str, str, bool, tuple[str, ...]]]:
        """Findings, each with the ids of the records that it is about."""
        name = item["id"]
        if name in self.ids:
            if self.ids[name] == split:
                yield "duplicate id", f"{name} occurs twice in {split}", True, (name,)
            else:
                places = f"{self.ids[name]} and {split}"
                yield LEAK, f"the same id is in {places}: {name}", True, (name,)
            return
        self.ids[name] = split
        places = self.groups.setdefault(_digest(str(item["source"]["group"]).encode()), {})
        if split not in places:
            for other, record_id in places.items():
                yield (
                    LEAK,
                    f"{name} ({split}): its patient or study is in {other} too, as in {record_id}",
                    True,
                    (name, record_id),
                )
            places[split] = name
        image = item["image"]
        if image.min() == image.max():  # blank pictures are alike without being the same
            return
        key = _digest(f"{image.shape} {image.dtype}".encode(), level(image).tobytes())
        other, record_id = self.images.setdefault(key, (split, name))
        if other != split:
            yield (
                LEAK,
                f"{name} ({split}) is the same picture, pixel by pixel, as {record_id} ({other})",
                True,
                (name, record_id),
            )
        elif record_id != name:
            detail = f"{name} and {record_id} in {split}"
            yield "same picture twice in a split", detail, False, (name, record_id)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


# --- faults: why `encode` refuses --------------------------------------------------------------


def _mask_shape(item: Record) -> Iterator[Finding]:
    mask, size = item["segmentation"], item["image"].shape[:2]
    if mask.shape not in ((0, 0), size):
        yield (
            "mask of another shape",
            f"the mask is {mask.shape} where the image is {size} (height, width)",
            True,
        )


def _mask_classes(item: Record) -> Iterator[Finding]:
    unknown = [int(c) for c in np.unique(item["segmentation"]) if not 0 <= c <= NUM_CLASSES]
    if unknown:
        yield (
            "unknown class",
            f"the mask holds {unknown[:5]}; classes go from 1 to {NUM_CLASSES}",
            True,
        )


def _entities(item: Record) -> Iterator[Finding]:
    height, width = item["image"].shape[:2]
    for index, entity in enumerate(item["entities"]):
        for kind, detail in _entity(item, entity, height, width):
            yield kind, f"entities/{index}: {detail}", True


def _entity(
    item: Record, entity: dict[str, Any], height: int, width: int
) -> Iterator[tuple[str, str]]:
    where = f"{entity['language']} {entity['field']}"
    try:
        length = len(record.text_of(item, entity["language"], entity["field"]))
    except (KeyError, IndexError, TypeError):
        yield "span outside its text", f"there is no text {where}"
    else:
        start, end = entity["start"], entity["end"]
        if not 0 <= start < end <= length:
            detail = f"{where} has {length} characters, the span is {start}:{end}"
            yield "span outside its text", detail
    if not 0 <= entity["class_id"] <= NUM_CLASSES:
        detail = f"class {entity['class_id']}; classes go from 0 (none) to {NUM_CLASSES}"
        yield "unknown class", detail
    x_min, y_min, x_max, y_max = box = tuple(float(edge) for edge in entity["box"] or ())
    if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
        detail = f"{box} is empty, or not inside the image of {width} x {height} pixels"
        yield "box outside the image", detail


def _negative_spacing(item: Record) -> Iterator[Finding]:
    if not all(np.isfinite(item["spacing_mm"])) or min(item["spacing_mm"]) < 0:
        yield "bad spacing", f"spacing_mm is {tuple(item['spacing_mm'])}", True


def _empty_questions(item: Record) -> Iterator[Finding]:
    for index, row in enumerate(item["qa"]):
        for field in ("question", "answer"):
            if not row[field].strip():
                yield "empty field", f"qa/{index}/{field} is empty", True


_FAULTS = (_mask_shape, _mask_classes, _entities, _negative_spacing, _empty_questions)
