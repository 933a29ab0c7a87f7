"""Pictures that can be looked into on the report page: a slice's own values, with layers on it.

The page's script paints the values through a window that its reader sets, and boxes, masks and
labels lie above as SVG that can be switched off. Everything is text inside the page, since a page
that was opened from disk may read no file beside it.
"""

import base64
import html
import io
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt16
from PIL import Image

from rg_jax.data.images import WINDOWS, display_range
from rg_jax.evaluation.overlays import (
    GREEN,
    RED,
    font,
    label_of,
    leader,
    line_width,
    on_picture,
    output_size,
    pad_of,
    place_labels,
)
from rg_jax.evaluation.results import Result
from rg_jax.grounding import anatomy
from rg_jax.grounding.spans import Entity

BUDGET = 8 * 2**20  # bytes of all pictures' values in one page
LARGEST_SIDE, SMALLEST_SIDE = 512, 128
NO_CLASS = "no_class"

Values = dict[str, Any]


class Pictures(NamedTuple):
    """Values of a gallery's pictures by record id, and what the budget did to them.

    `reduced`: pictures held smaller than they are; `left_out`: records without room for any.
    """

    values: dict[str, Values]
    reduced: int = 0
    left_out: tuple[str, ...] = ()


NO_PICTURES = Pictures({})


def gather(
    record_ids: Iterable[str],
    record_of: Callable[[str], Mapping[str, Any]],
    window: str = "soft",
    budget: int = BUDGET,
) -> Pictures:
    """The values of these records, all at one largest side, so that they fit into the budget.

    `record_of` gives the decoded record of an id, as for `gallery.write_overlays`. Where even the
    smallest side is too large, the last records go without.
    """
    ids = list(dict.fromkeys(record_ids))
    side = LARGEST_SIDE
    while True:
        held = {name: encode(record_of(name), side, window) for name in ids}
        used = sum(len(values["data"]) for values in held.values())
        if used <= budget or side == SMALLEST_SIDE:
            break
        # Size goes with the area, roughly; the step down is never too small to end.
        side = max(SMALLEST_SIDE, min(side - 32, int(side * math.sqrt(budget / used))))
    left_out = []
    while used > budget:
        left_out.append(ids.pop())
        used -= len(held.pop(left_out[-1])["data"])
    reduced = sum(values["reduced"] for values in held.values())
    return Pictures(held, reduced, tuple(reversed(left_out)))


def encode(record: Mapping[str, Any], side: int = LARGEST_SIDE, window: str = "soft") -> Values:
    """What the page's script needs of one record's picture, as plain JSON.

    A value is `low` + `step` · code: HU for CT, stored units otherwise. `data` are the codes, see
    `pack`; `view`: (width, height) in which layers are drawn, of true proportions; `window`: the
    (width, level) of the drawn picture; `windows`: those to choose from, for CT.
    """
    image = record["image"]
    height, width = image.shape[:2]
    slope, intercept = (float(v) for v in record["rescale"])
    if image.shape[2] == 3:
        slope, intercept = 1.0, 0.0
        grey = (image == image[..., :1]).all()
        planes = image[..., :1] if grey else image
    else:
        planes = image
    planes = np.moveaxis(planes, 2, 0).astype(np.float32) * slope + intercept
    scale = min(1.0, side / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        planes = np.stack(
            [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BOX)) for p in planes]
        )
    low, step = float(planes.min()), abs(slope) or 1.0
    codes = np.round((planes - low) / step)
    codes = np.clip(codes, 0, 65535).astype(np.uint16)
    ct = record["modality"] == "CT" and image.shape[2] == 1
    first, last = display_range(record, window)
    spacing = tuple(float(mm) for mm in record.get("spacing_mm", (0.0, 0.0)))
    data, size_of_code = pack(codes)
    return {
        "width": codes.shape[2],
        "height": codes.shape[1],
        "channels": codes.shape[0],
        "bytes": size_of_code,
        "low": low,
        "step": step,
        "view": list(output_size(height, width, spacing)),
        "window": [max(last - first, step), (first + last) / 2],
        "windows": {name: list(WINDOWS[name]) for name in WINDOWS} if ct else {},
        "unit": "HU" if ct else "",
        "reduced": bool(scale < 1),
        "data": data,
    }


def pack(codes: UInt16[np.ndarray, "C H W"]) -> tuple[str, int]:
    """Codes as base64 of zlib, and the bytes that one takes (1 where all are below 256).

    Neighbours in a row are alike, so differences are kept, with the sign in the lowest bit; their
    upper bytes, nearly all 0, stand before the lower ones.
    """
    size = 1 if codes.max(initial=0) < 256 else 2
    bits = 8 * size
    half, mask = 1 << (bits - 1), (1 << bits) - 1
    signed = ((np.diff(codes.astype(np.int32), axis=-1, prepend=0) + half) & mask) - half
    folded = ((signed << 1) ^ (signed >> 31)) & mask
    planes = [folded >> 8, folded & 255] if size == 2 else [folded]
    content = zlib.compress(np.stack(planes).astype(np.uint8).tobytes(), 9)
    return base64.b64encode(content).decode(), size


def script_of(number: int, values: Values) -> str:
    """The element of the page that holds one picture's values; nothing in it is run."""
    text = json.dumps(values, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="px-{number}">{text}</script>'


# --- layers ----------------------------------------------------------------------------------


def class_key(entity: Entity) -> str:
    """The class's schema name, under which layers are switched."""
    return anatomy.name_of(entity.class_id) if entity.class_id else NO_CLASS


def class_label(key: str, language: str = "en") -> str:
    """A class for people; a name that the schema does not know stays as it is."""
    try:
        return anatomy.display(anatomy.id_of(key), language)
    except ValueError:
        return key.replace("_", " ")


def layers(result: Result, view: Sequence[int]) -> str:
    """Masks, boxes and labels of one result as an SVG over a picture of `view` (width, height).

    Every layer says what it is (`mask`, `box`, `label`), whose (`r` reference, `p` predicted) and
    of which class. Labels lie where the drawn picture has them.
    """
    size = (int(view[0]), int(view[1]))
    line = line_width(size)
    ious = {m.predicted: m.iou for m in result.score.matches}
    sides = (
        ("r", result.sample.entities, result.reference_masks),
        ("p", result.entities, result.masks),
    )
    parts, items = [], []
    for side, entities, masks in sides:
        for k, entity in enumerate(entities):
            key = html.escape(class_key(entity), quote=True)
            if masks and masks[k] is not None and masks[k].any():
                parts.append(
                    f'<image class="mask {side}" data-class="{key}" width="{size[0]}" '
                    f'height="{size[1]}" preserveAspectRatio="none" '
                    f'href="data:image/png;base64,{_mask_png(masks[k], side)}"/>'
                )
            if entity.box is not None:
                iou = ious.get(k) if side == "p" else None
                text = label_of(entity, result.sample.language, iou)
                items.append((side, key, on_picture(entity.box, size), text))
    for side, key, (x0, y0, x1, y1), _ in items:
        rect = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        parts.append(
            f'<g class="box {side}" data-class="{key}"><rect class="halo" {rect}/>'
            f"<rect {rect}/></g>"
        )
    letters, places, texts = place_labels(
        [item[3] for item in items],
        [item[2] for item in items],
        [item[0] == "p" for item in items],
        size,
    )
    for (side, key, rect, _), place, text in zip(items, places, texts, strict=True):
        parts.append(_label(side, key, rect, place, text, letters, line))
    return (
        f'<svg class="layers" viewBox="0 0 {size[0]} {size[1]}" aria-hidden="true" '
        f'style="--line:{line};--letters:{letters}px">{"".join(parts)}</svg>'
    )


def _label(side, key, rect, place, text: str, letters: int, line: int) -> str:
    x0, y0, x1, y1 = place
    ends = leader(place, rect, line)
    lead = ""
    if ends:
        (ax, ay), (bx, by) = ends
        lead = f'<path class="lead" d="M{ax:.1f} {ay:.1f}L{bx:.1f} {by:.1f}"/>'
    # The letters are measured in our font; a browser's own is squeezed into the same width.
    wide = font(letters).getlength(text)
    return (
        f'<g class="label {side}" data-class="{key}">{lead}'
        f'<rect class="ground" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" '
        f'height="{y1 - y0:.1f}"/><rect class="edge" x="{x0:.1f}" y="{y0:.1f}" width="{line}" '
        f'height="{y1 - y0:.1f}"/><text x="{x0 + line + pad_of(letters):.1f}" '
        f'y="{(y0 + y1) / 2:.1f}" textLength="{wide:.1f}" lengthAdjust="spacingAndGlyphs">'
        f"{html.escape(text)}</text></g>"
    )


def _mask_png(mask: Bool[np.ndarray, "H W"], side: str) -> str:
    """A mask in its side's colour, transparent inside and less so at its rim, as base64."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    # A rim of one pixel would be most of a coarse mask.
    rim = mask & ~inner if min(mask.shape) >= 48 else np.zeros_like(mask)
    picture = Image.fromarray((mask.astype(np.uint8) + rim).astype(np.uint8), "P")
    colour = GREEN if side == "r" else RED
    picture.putpalette([0, 0, 0, *colour, *colour])
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=bytes([0, 64, 170]), optimize=True, bits=2)
    return base64.b64encode(out.getvalue()).decode()
