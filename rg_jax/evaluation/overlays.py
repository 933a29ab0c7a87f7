"""Pictures to look at: a slice with the boxes and masks of reference and prediction drawn on it.

Reference boxes are green and solid, predicted ones red and dashed, so that the two can be told
apart without seeing colours. Under the picture stands a strip with the window and the legend.
"""

import io
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from rg_jax.grounding import anatomy
from rg_jax.grounding.spans import Entity

# Pillow's own font has no umlauts, hence one of ours.
FONT = Path(__file__).parent / "fonts" / "DejaVuSansCondensed-subset.ttf"
GREEN = (70, 214, 110)
RED = (255, 84, 78)
STRIP = (18, 22, 27)
STRIP_TEXT = (205, 212, 220)
LABEL_GROUND = (12, 14, 18, 205)

Number = int | float
Rect = tuple[Number, Number, Number, Number]  # x_min, y_min, x_max, y_max in output pixels


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT), size)


def label_of(entity: Entity, language: str, iou: float | None = None) -> str:
    """Mention, its class where that says something else, and the IoU of a matched entity."""
    label = entity.mention
    if entity.class_id:
        entry = anatomy.get(entity.class_id)
        name = entry.display.get(language, entry.name)
        if name.casefold() != entity.mention.casefold():
            label = f"{label} ({name})"
    return label if iou is None else f"{label}  IoU {iou:.2f}"


def output_size(
    height: int,
    width: int,
    spacing_mm: tuple[Number, Number] = (0.0, 0.0),
    min_side: int = 512,
    max_side: int = 1024,
) -> tuple[int, int]:
    """(width, height) at which a slice is drawn: true proportions, longer side within the limits.

    A small picture grows by a whole factor; spacing (row, column) of 0 is unknown, the pixels are
    then square. No side is under 1/8 of the longer one, or nothing could be read.
    """
    row, column = spacing_mm
    tall, wide = float(height), float(width)
    if row > 0 and column > 0 and not math.isclose(row, column, rel_tol=0.01):
        finest = min(row, column)
        tall, wide = tall * row / finest, wide * column / finest
    longer = max(tall, wide)
    scale = 1.0
    if longer < min_side:
        scale = math.ceil(min_side / longer)
    if longer * scale > max_side:
        scale = max_side / longer
    least = longer * scale / 8
    return round(max(wide * scale, least)), round(max(tall * scale, least))


def line_width(size: tuple[int, int]) -> int:
    """How thick lines are on a picture of this size."""
    return max(2, round(max(size) / 256))


def draw(
    image: UInt8[np.ndarray, "H W 3"],
    reference: Sequence[Entity],
    predicted: Sequence[Entity],
    *,
    matches: Sequence[tuple[int, int, float]] = (),
    reference_masks: Sequence[np.ndarray | None] = (),
    predicted_masks: Sequence[np.ndarray | None] = (),
    language: str = "en",
    window: str = "",
    spacing_mm: tuple[Number, Number] = (0.0, 0.0),
    min_side: int = 512,
    max_side: int = 1024,
    legend: bool = True,
) -> bytes:
    """One PNG. Entities without a box are left out of the picture.

    `matches` are (index in reference, index in predicted, box IoU); the IoU is written at the
    predicted box. Masks (booleans of any size, None for none) are tinted; where both agree, the
    colours mix to yellow. `window` names what the grey values show. Boxes are normalised, so they
    fit the picture at any size. Without `legend` nothing explains the lines (there is no
    prediction).
    """
    height, width = image.shape[:2]
    size = output_size(height, width, spacing_mm, min_side, max_side)
    smooth = Image.Resampling.BICUBIC if size[0] < width else Image.Resampling.BILINEAR
    picture = Image.fromarray(np.ascontiguousarray(image)).resize(size, smooth).convert("RGBA")

    for masks, colour in ((reference_masks, GREEN), (predicted_masks, RED)):
        picture = _tinted(picture, masks, colour)

    iou_of = {j: iou for _, j, iou in matches}
    items = [(e, GREEN, False, None) for e in reference if e.box is not None]
    items += [(e, RED, True, iou_of.get(j)) for j, e in enumerate(predicted) if e.box is not None]

    line = line_width(size)
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    rects = [on_picture(entity.box, size) for entity, *_ in items]
    for rect, (_, colour, dashed, _) in zip(rects, items, strict=True):
        _outline(pen, rect, colour, line, dashed)
    picture = Image.alpha_composite(picture, layer)

    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    texts = [label_of(entity, language, iou) for entity, _, _, iou in items]
    below = [dashed for _, _, dashed, _ in items]
    letters, places, texts = place_labels(texts, rects, below, size)
    for text, place, rect, (_, colour, _, _) in zip(texts, places, rects, items, strict=True):
        _leader(pen, place, rect, colour, line)
        pen.rectangle(place, fill=LABEL_GROUND)
        pen.rectangle((place[0], place[1], place[0] + line, place[3]), fill=(*colour, 255))
        at = (place[0] + line + pad_of(letters), (place[1] + place[3]) / 2)
        pen.text(at, text, font=font(letters), fill=(*_light(colour), 255), anchor="lm")
    picture = Image.alpha_composite(picture, layer).convert("RGB")

    out = io.BytesIO()
    lines = (bool(reference), bool(predicted)) if legend else (False, False)
    _with_strip(picture, window, *lines).save(out, "PNG")
    return out.getvalue()


def _tinted(picture: Image.Image, masks: Sequence[np.ndarray | None], colour) -> Image.Image:
    """The picture with the union of `masks` in a transparent colour, its rim less so."""
    found = [mask for mask in masks if mask is not None and mask.any()]
    if not found:
        return picture
    union = Image.fromarray(np.logical_or.reduce(found).astype(np.uint8) * 255)
    union = union.resize(picture.size, Image.Resampling.NEAREST)
    rim = ImageChops.subtract(union, union.filter(ImageFilter.MinFilter(5)))
    opacity = ImageChops.add(union.point(lambda v: v * 60 // 255), rim.point(lambda v: v // 2))
    layer = Image.new("RGBA", picture.size, (*colour, 255))
    layer.putalpha(opacity)
    return Image.alpha_composite(picture, layer)


def on_picture(box: Sequence[float], size: tuple[int, int]) -> Rect:
    """The box in output pixels, inside the picture and at least one pixel wide and high."""
    wide, tall = size
    x0, y0 = min(max(box[0], 0), 1) * (wide - 1), min(max(box[1], 0), 1) * (tall - 1)
    x1, y1 = min(max(box[2], 0), 1) * (wide - 1), min(max(box[3], 0), 1) * (tall - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def _outline(pen: ImageDraw.ImageDraw, rect: Rect, colour, line: int, dashed: bool) -> None:
    x0, y0, x1, y1 = rect
    halo = (0, 0, 0, 120)  # keeps a line visible on bright tissue
    pen.rectangle(
        (x0 - line / 2, y0 - line / 2, x1 + line / 2, y1 + line / 2), outline=halo, width=line + 2
    )
    if not dashed:
        pen.rectangle(rect, outline=(*colour, 255), width=line)
        return
    for start, end in (
        ((x0, y0), (x1, y0)),
        ((x1, y0), (x1, y1)),
        ((x1, y1), (x0, y1)),
        ((x0, y1), (x0, y0)),
    ):
        length = math.dist(start, end)
        dashes = max(1, round(length / (8 * line)))
        for k in range(dashes):
            a, b = k / dashes, (k + 0.62) / dashes
            pen.line(
                [
                    (start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * t)
                    for t in (a, b)
                ],
                fill=(*colour, 255),
                width=line,
            )


def _leader(pen: ImageDraw.ImageDraw, place: Rect, rect: Rect, colour, line: int) -> None:
    """A thin line from a label to its box, where the two do not touch."""
    ends = leader(place, rect, line)
    if ends:
        pen.line(ends, fill=(*colour, 190), width=max(1, line // 2))


def leader(place: Rect, rect: Rect, line: int) -> list[tuple[Number, Number]]:
    """The two ends of a line from a label to its box; none where the two nearly touch."""
    start = [min(max((rect[k] + rect[k + 2]) / 2, place[k]), place[k + 2]) for k in (0, 1)]
    end = [min(max(start[k], rect[k]), rect[k + 2]) for k in (0, 1)]
    return [tuple(start), tuple(end)] if math.dist(start, end) > 3 * line else []


def _light(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(round(c + (255 - c) * 0.35) for c in colour)


def pad_of(letters: int) -> int:
    """Room around letters of this size in their label."""
    return max(2, letters // 4)


def _overlaps(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Shared area of each rectangle of `a` with each of `b`."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.clip(high - low, 0, None), axis=-1)


def place_labels(
    texts: Sequence[str], rects: Sequence[Rect], below: Sequence[bool], size: tuple[int, int]
) -> tuple[int, list[Rect], list[str]]:
    """Letter size, one rectangle per label wholly inside the picture, and the texts as they fit.

    Labels hide neither each other nor a small box where there is room; `below` says which prefer
    the lower edge of their box. If they do not all find room the letters become smaller, down to a
    size that can still be read. A label wider than the picture is shortened with an ellipsis.
    """
    largest = max(11, round(max(size) / 31))
    best: tuple[float, int, list[Rect], list[str]] | None = None
    for letters in sorted({largest, round(largest * 0.85), max(10, round(largest * 0.72))})[::-1]:
        fitted = [_fit(text, letters, size[0]) for text in texts]
        places, hidden = _arrange(fitted, rects, below, size, letters)
        if best is None or hidden < best[0]:
            best = (hidden, letters, places, fitted)
        if hidden == 0:
            break
    assert best is not None
    return best[1:]


def _fit(text: str, letters: int, width: int) -> str:
    room = width - 4 * pad_of(letters)
    if font(letters).getlength(text) <= room:
        return text
    while text and font(letters).getlength(text + "…") > room:
        text = text[:-1]
    return text + "…"


def _arrange(
    texts: Sequence[str],
    rects: Sequence[Rect],
    below: Sequence[bool],
    size: tuple[int, int],
    letters: int,
) -> tuple[list[Rect], float]:
    """Greedy: small boxes first, since their labels have the fewest places to go."""
    if not texts:
        return [], 0.0
    wide, tall = size
    pad = pad_of(letters)
    line = line_width(size)
    boxes = np.asarray(rects, np.float64)
    areas = np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1.0)
    placed: dict[int, np.ndarray] = {}
    hidden = 0.0
    for k in np.argsort(areas, kind="stable").tolist():
        w = math.ceil(font(letters).getlength(texts[k])) + 2 * pad + line
        h = letters + 2 * pad
        corners = np.asarray(_candidates(rects[k], w, h, below[k], line, size), np.float64)
        rank = np.minimum(np.arange(len(corners)), 10)
        corners = np.clip(corners, 0, [max(wide - 1 - w, 0), max(tall - 1 - h, 0)])
        places = np.concatenate([corners, corners + [w, h]], axis=1)
        over = np.zeros(len(places))
        if placed:
            over = _overlaps(places, np.stack(list(placed.values()))).sum(1)
        # Covering a box matters by how much of that box is gone.
        covered = np.minimum((_overlaps(places, boxes) / areas).sum(1), 2)
        apart = np.maximum(places[:, :2] - boxes[k, 2:], boxes[k, :2] - places[:, 2:])
        gap = np.linalg.norm(np.maximum(apart, 0), axis=1) / max(size)
        best = int(np.argmin(10 * over / (w * h) + 3 * covered + 6 * gap + 0.02 * rank))
        placed[k] = places[best]
        hidden += float(over[best])
    return [tuple(placed[k].tolist()) for k in range(len(texts))], hidden


def _candidates(
    rect: Rect, w: Number, h: Number, below: bool, line: int, size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Upper left corners to try: along the edges outside, inside the box, then a raster."""
    x0, y0, x1, y1 = rect
    over = [(x0 - line, y0 - h - line), (x1 - w + line, y0 - h - line)]
    under = [(x0 - line, y1 + line), (x1 - w + line, y1 + line)]
    beside = [(x1 + line, y0), (x1 + line, y1 - h), (x0 - w - line, y0), (x0 - w - line, y1 - h)]
    inside = [(x0 + line, y0 + line), (x0 + line, y1 - h - line)]
    near = [*under, *over] if below else [*over, *under]
    steps_x = np.linspace(0, max(size[0] - 1 - w, 0), 12)
    steps_y = np.arange(0, max(size[1] - h, 1), h + 1)
    raster = [(float(x), float(y)) for y in steps_y for x in steps_x]
    return [*near, *beside, *(inside[::-1] if below else inside), *raster]


def _with_strip(picture: Image.Image, window: str, reference: bool, predicted: bool) -> Image.Image:
    """The picture over a strip that names the window and explains the lines."""
    wide, tall = picture.size
    letters = max(11, min(round(max(picture.size) / 34), wide // 28))
    high = letters + 2 * max(5, letters // 2)
    out = Image.new("RGB", (wide, tall + high), STRIP)
    out.paste(picture, (0, 0))
    pen = ImageDraw.Draw(out)
    middle = tall + high / 2
    x = wide - letters // 2
    dash = letters * 1.6
    legend = (("prediction", RED, True, predicted), ("reference", GREEN, False, reference))
    for name, colour, dashed, there in legend if reference or predicted else ():
        name = name if there else f"no {name}"
        x -= font(letters).getlength(name)
        pen.text((x, middle), name, font=font(letters), fill=STRIP_TEXT, anchor="lm")
        x -= dash + letters * 0.5
        for a, b in ((0, 0.4), (0.6, 1)) if dashed else ((0, 1),):
            span = [(x + a * dash, middle), (x + b * dash, middle)]
            pen.line(span, fill=colour, width=max(2, letters // 6))
        x -= letters
    if window:
        room = int(x)
        text = _fit(window, letters, room)
        pen.text((letters // 2, middle), text, font=font(letters), fill=STRIP_TEXT, anchor="lm")
    return out
