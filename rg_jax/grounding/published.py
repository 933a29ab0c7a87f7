"""How the published evaluation reads marked text, for comparisons with its figures only.

It reads box marks regardless of case, takes bins as they stand (also beyond the grid), needs the
class but ignores it, does not read a mention with a line break, and its removers swallow text.
Ours, in `spans`, does none of that.
"""

from __future__ import annotations

import re

from rg_jax.grounding.boxes import Box

_BOX_ENTITY = re.compile(
    r"<p bbox=<loc(\d+)><loc(\d+)><loc(\d+)><loc(\d+)> id=<seg\d+>>(.*?)</p>", re.IGNORECASE
)
_MASK_ENTITY = re.compile(r"<seg>(.*?)</seg>", re.IGNORECASE)


def read_boxes_published(marked: str, bins: int = 512) -> list[tuple[str, Box]]:
    """(mention in lower case, box) of each box mark, x first, the box as loc / bins, unclipped."""
    found = []
    for match in _BOX_ENTITY.finditer(marked):
        x_min, y_min, x_max, y_max = (int(number) / bins for number in match.groups()[:4])
        found.append((match.group(5).lower(), (x_min, y_min, x_max, y_max)))
    return found


def read_masks_published(marked: str) -> list[str]:
    """Mentions of the mask marks in lower case, in text order, empty ones left out."""
    return [m.group(1).lower() for m in _MASK_ENTITY.finditer(marked) if m.group(1).strip()]


def strip_published(marked: str, boxes: bool, masks: bool) -> str:
    """Remove marks as the published text metrics do.

    For boxes everything from an opening `<p bbox=` to the next complete end of one goes, with the
    text between; for masks everything between `<` and `>`.
    """
    if boxes:
        marked = re.sub(r"<p bbox=.*?id=<seg\d+>>", "", marked)
        marked = marked.replace("</p>", "")
    if masks:
        marked = re.sub(r"<[^>]*>", "", marked)
    return marked
