"""What may be wrong with a record that `record.encode` lets through. Imports no TFDS.

Damage that no program stumbles over: broken letters, boxes that do not fit their mask, pixel
values that are no HU. The data check and every build ask here, so that the one refuses what the
other fails, and counts what the other lists. No detail quotes a text: what is told may travel
further than the data.
"""

import functools
import re
from collections.abc import Iterator
from math import ceil, floor

import numpy as np

from rg_jax.data import record
from rg_jax.data.identifying import NAME_IN_TEXT
from rg_jax.data.record import Record
from rg_jax.grounding.anatomy import NUM_CLASSES
from rg_jax.grounding.boxes import boxes_of_mask, iou
from rg_jax.grounding.spans import has_marks
from tfds_builders.letters import broken_letters, is_learnt, texts_of

# Pixels finer or coarser than this (mm) are no CT, MR or X-ray but a mistake of units.
SPACING_MM = (0.02, 20.0)
# A box and its mask that overlap less than this do not show the same thing.
LEAST_OVERLAP = 0.5
# Less than this is no matter of edges: such a box teaches a wrong place.
NO_OVERLAP = 0.1

# Nearly every CT slice has some pixels of fat or air, and some of tissue (HU).
_SOFT_HU, _AIR_HU, _SHARE = -30, -200, 0.001

Finding = tuple[str, str, bool]  # kind, detail, harmful


def doubts(item: Record, places: bool = True) -> Iterator[Finding]:
    """All that is doubtful about a record: (kind, detail, whether it harms). Never raises.

    `places`: compare boxes with masks; a reader that has done so need not do it twice.
    """
    return guarded(item, _DOUBTS if places else _DOUBTS_BUT_PLACES)


def guarded(item: Record, looks) -> Iterator[Finding]:
    """Each look on its own: a record that is not even of the right form breaks some of them."""
    for look in looks:
        try:
            yield from look(item)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            continue


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
        # By shares of the pixels: noise of a wrong scale reaches anywhere.
        soft, air = (
            np.count_nonzero(image < ceil(bound) if slope > 0 else image > floor(bound))
            / image.size
            for bound in ((_SOFT_HU - intercept) / slope, (_AIR_HU - intercept) / slope)
        )
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        if soft < _SHARE or air > 1 - _SHARE:
            yield (
                "implausible CT values",
                f"from {low:g} to {high:g} HU, {soft:.1%} of the pixels below {_SOFT_HU} HU: a CT"
                " holds air or fat as well as tissue; are RescaleSlope and RescaleIntercept right?",
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


def _answers(item: Record) -> Iterator[Finding]:
    for index, row in enumerate(item["qa"]):
        answer = row["answer"].strip().rstrip(".").casefold()
        if row["type"] == "yesno" and not _YES_OR_NO.match(answer):
            yield "yes/no question with another answer", f"qa/{index}", False
        choices = {choice.strip().rstrip(".").casefold() for choice in row["choices"]}
        if row["type"] == "multiple" and choices and answer not in choices:
            yield "answer that is none of the choices", f"qa/{index}", False


_YES_OR_NO = re.compile(r"(?:yes|no|ja|nein)\b")


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


_DOUBTS_BUT_PLACES = (_spacing, _pixels, _cut_words, _answers, _nothing_to_learn, _texts)
_DOUBTS = (_places, *_DOUBTS_BUT_PLACES)


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
    "a name": re.compile(NAME_IN_TEXT),
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
