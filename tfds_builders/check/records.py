"""What can be wrong with records: faults that harm training, and things worth a look.

`record.encode` decides what a record may be; what it refuses is told apart here by kind. What it
lets through is looked at again for damage that no program stumbles over: broken letters, boxes
that do not fit their mask, pixel values that are no HU. No detail quotes a text: a data check's
output may travel further than the data.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from rg_jax.data import record
from rg_jax.data.record import Record
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import NUM_CLASSES
from rg_jax.grounding.boxes import boxes_of_mask, iou
from rg_jax.grounding.spans import has_marks
from tfds_builders.common import Problem
from tfds_builders.letters import broken_letters, is_learnt, texts_of

# Pixels finer or coarser than this (mm) are no CT, MR or X-ray but a mistake of units.
SPACING_MM = (0.02, 20.0)
# A box and its mask that overlap less than this do not show the same thing.
LEAST_OVERLAP = 0.5
# Less than this is no matter of edges: such a box teaches a wrong place.
NO_OVERLAP = 0.1
LEAK = "leakage between splits"

Finding = tuple[str, str, bool]  # kind, detail, harmful


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
    found = list(_guarded(item, _FAULTS)) if refused else []
    if refused and not any(harmful for _, _, harmful in found):
        found.append(("not a valid record", refused, True))
    found += _guarded(item, _DOUBTS)
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
        found = _guarded(item, [lambda item: self._look(item, split)])
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
        key = _digest(f"{image.shape} {image.dtype}".encode(), image.tobytes())
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


def _guarded(item: Record, looks) -> Iterator[Finding]:
    """Each look on its own: a record that is not even of the right form breaks some of them."""
    for look in looks:
        try:
            yield from look(item)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            continue


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


# --- doubts: a valid record that may be wrong all the same -------------------------------------


def _spacing(item: Record) -> Iterator[Finding]:
    spacing = tuple(float(mm) for mm in item["spacing_mm"])
    low, high = SPACING_MM
    if spacing == (0, 0):
        if item["image"].shape[2] == 1:  # an ordinary picture seldom knows its pixels' size
            yield "bad spacing", "spacing_mm is (0, 0): unknown", False
    elif min(spacing) >= 0 and not all(low <= mm <= high for mm in spacing):
        yield (
            "bad spacing",
            f"spacing_mm is {spacing}; {low:g} to {high:g} mm would be credible",
            False,
        )


def _pixels(item: Record) -> Iterator[Finding]:
    image = item["image"]
    low, high = int(image.min()), int(image.max())
    if low == high:
        yield "blank image", f"every pixel is {low}: nothing on it can be told or found", True
        return
    if image.shape[2] == 1 and item["modality"] == "CT":
        slope, intercept = item["rescale"]
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        if low >= 0 or high <= -200:
            yield (
                "implausible CT values",
                f"from {low:g} to {high:g} HU: a CT holds air or fat as well as tissue; are"
                " RescaleSlope and RescaleIntercept right?",
                False,
            )


def _places(item: Record) -> Iterator[Finding]:
    """Entities beside the mask of their class: another orientation or another slice shows here."""
    mask = item["segmentation"]
    if mask.shape != item["image"].shape[:2]:
        return
    marked = boxes_of_mask(mask)
    seen: set[tuple[int, tuple[float, ...]]] = set()
    for entity in item["entities"]:
        class_id, box = int(entity["class_id"]), tuple(float(edge) for edge in entity["box"])
        x_min, y_min, x_max, y_max = box
        inside = 0 <= x_min < x_max <= mask.shape[1] and 0 <= y_min < y_max <= mask.shape[0]
        if not inside or not 0 < class_id <= NUM_CLASSES or (class_id, box) in seen:
            continue  # told already
        seen.add((class_id, box))
        if class_id not in marked:
            yield "mention without mask", f"class {class_id} has a box, but no pixel of mask", False
        elif (overlap := iou(box, marked[class_id])) < LEAST_OVERLAP:
            yield (
                "box does not fit its mask",
                f"class {class_id}: box {box}, the mask spans {marked[class_id]}, IoU"
                f" {overlap:.2f}; are both of this slice and this way round?",
                overlap < NO_OVERLAP,
            )


def _cut_words(item: Record) -> Iterator[Finding]:
    for index, entity in enumerate(item["entities"]):
        text = record.text_of(item, entity["language"], entity["field"])
        for edge in (entity["start"], entity["end"]):
            if 0 < edge < len(text) and text[edge - 1].isalnum() and text[edge].isalnum():
                yield "span cuts a word", f"entities/{index}, at character {edge}", False
                break


def _nothing_to_learn(item: Record) -> Iterator[Finding]:
    captions = [row["caption"] for row in item["texts"].values()]
    if not item["qa"] and not any(caption.strip() for caption in captions):
        yield "no text to learn", "no caption and no question: no task can use it", False


def _texts(item: Record) -> Iterator[Finding]:
    for where, text in texts_of(item):
        damage, marked, hints = _look_at(text)
        if damage:
            yield "encoding damage", f"{where}: {damage}", is_learnt(where)
        if marked:
            yield (
                "looks like a grounding mark",
                f"{where} holds a piece of a mark; no task will use it",
                False,
            )
        for what, at in hints:
            yield f"perhaps {what} in a text", f"{where}, at character {at}", False


# Questions are often the same.
@functools.lru_cache(maxsize=4096)
def _look_at(text: str) -> tuple[str, bool, list[tuple[str, int]]]:
    return broken_letters(text), has_marks(text), personal(text)


_DOUBTS = (_spacing, _pixels, _places, _cut_words, _nothing_to_learn, _texts)


# --- texts -------------------------------------------------------------------------------------


_MONTHS = (
    "jan(?:uary|uar)?|feb(?:ruary|ruar)?|mar(?:ch)?|märz|apr(?:il)?|may|mai|june?|juni|july?|juli"
    "|aug(?:ust)?|sep(?:t(?:ember)?)?|o[ck]t(?:ober)?|nov(?:ember)?|de[cz](?:ember)?"
)
_PERSONAL = {
    "a date": re.compile(
        r"(?<![\d.])(?:0?[1-9]|[12]\d|3[01])\.\s?(?:0?[1-9]|1[0-2])\.\s?(?:(?:19|20)\d\d|\d\d)"
        r"(?![\d.]\d|\d)"
        r"|(?<!\d)(?:19|20)\d\d-(?:0\d|1[0-2])-[0-3]\d(?!\d)"
        r"|(?<!\d)[0-3]?\d/[0-3]?\d/(?:19|20)?\d\d(?!\d)"
        rf"|\b(?:{_MONTHS})\.?\s+(?:\d{{1,2}},?\s+)?(?:19|20)\d\d\b",
        re.IGNORECASE,
    ),
    "a name": re.compile(
        r"\b(?:Dr|Prof)\.\s?(?:med\.\s?)?[A-ZÄÖÜ][a-zäöüß]+"
        r"|\b(?:Herrn?|Frau|Mr\.?|Mrs\.?|Ms\.?)\s(?:Dr\.\s?)?[A-ZÄÖÜ][a-zäöüß]+"
        r"|\b(?:Patient(?:in)?|[Nn]ame)\s?:\s?[A-ZÄÖÜ][a-zäöüß]+"
    ),
    "an identifier": re.compile(
        r"(?<![\d.,])\d{6,}(?![\d.,]\d)|\b\S+@\S+\.\w{2,}|\b\d+(?:\.\d+){5,}\b"
        r"|\b(?:MRN|PID|Pat(?:ienten)?\.?-?(?:Nr|ID)|Fallnummer)\b",
        re.IGNORECASE,
    ),
}


def personal(text: str) -> list[tuple[str, int]]:
    """("a date" | "a name" | "an identifier", character) that a text may hold. Only a hint."""
    return [
        (what, match.start())
        for what, pattern in _PERSONAL.items()
        if (match := pattern.search(text))
    ]
