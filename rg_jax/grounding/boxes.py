"""Boxes: pixels, shares, bins, overlap.

A box is (x_min, y_min, x_max, y_max) everywhere in code, x_max and y_max exclusive in pixels.
"Normalised" means share of the width (x) and of the height (y), in [0, 1]. The order in which a
model writes the four numbers is the business of `spans`, not of this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

Number = float | int
Box = tuple[Number, Number, Number, Number]
Bins = tuple[int, int, int, int]
# Four numbers in a row, of whatever number type a file or an array holds.
BoxLike = Sequence[Any] | np.ndarray


def check_box(box_px: BoxLike, width: Number, height: Number) -> None:
    """Raise ValueError unless the pixel box has an area and lies inside the image.

    This is the gate for boxes that come from outside; the functions below do not repeat it.
    """
    if len(box_px) != 4:
        raise ValueError(f"box {tuple(box_px)} needs four numbers: x_min, y_min, x_max, y_max")
    if not all(math.isfinite(value) for value in box_px):
        raise ValueError(f"box {tuple(box_px)} holds a number that is not finite")
    x_min, y_min, x_max, y_max = box_px
    if x_min > x_max or y_min > y_max:
        raise ValueError(f"box {tuple(box_px)} is swapped: a minimum lies beyond its maximum")
    if x_min == x_max or y_min == y_max:
        raise ValueError(f"box {tuple(box_px)} is degenerate: it has no area")
    if x_min < 0 or y_min < 0 or x_max > width or y_max > height:
        raise ValueError(f"box {tuple(box_px)} lies outside the image of {width} x {height} pixels")


def normalise(box_px: BoxLike, width: Number, height: Number) -> Box:
    """Pixel box → shares of width and height. Out-of-image boxes stay outside [0, 1]."""
    if width <= 0 or height <= 0:
        raise ValueError(f"an image of {width} x {height} pixels has no boxes")
    x_min, y_min, x_max, y_max = (float(value) for value in box_px)
    return x_min / width, y_min / height, x_max / width, y_max / height


def to_bins(box_norm: BoxLike, bins: int) -> Bins:
    """Normalised box → four bins in 0 … bins-1: floor(share · bins), clipped at both ends.

    The far border (share 1) would be bin `bins`, which does not exist; it becomes bins-1.
    """
    x_min, y_min, x_max, y_max = (
        min(max(math.floor(float(value) * bins), 0), bins - 1) for value in box_norm
    )
    return x_min, y_min, x_max, y_max


def _from_bin(index: int, bins: int) -> float:
    # index / bins can round to just below the edge of its bin (e.g. for 49 bins); the share
    # returned is the smallest float at or above the quotient that falls back into the same bin.
    share = index / bins
    while math.floor(share * bins) < index:
        share = math.nextafter(share, math.inf)
    return share


def from_bins(box_bins: BoxLike, bins: int) -> Box:
    """Four bins → normalised box at the lower edge of each bin: index / bins.

    `to_bins(from_bins(b, n), n) == b` for every bin count. Raises ValueError for a bin that does
    not exist.
    """
    for index in box_bins:
        if not 0 <= index < bins:
            raise ValueError(f"bin {index} is not in 0..{bins - 1}")
    x_min, y_min, x_max, y_max = (_from_bin(int(index), bins) for index in box_bins)
    return x_min, y_min, x_max, y_max


def area(box: BoxLike) -> float:
    """Area of a box; 0 for a degenerate or swapped one."""
    x_min, y_min, x_max, y_max = box
    return float(max(x_max - x_min, 0.0) * max(y_max - y_min, 0.0))


def iou(a: BoxLike, b: BoxLike) -> float:
    """Intersection over union of two boxes in the same units; 0 where neither has an area."""
    inner = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    intersection = area(inner)
    union = area(a) + area(b) - intersection
    return intersection / union if union > 0 else 0.0


def iou_matrix(
    a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]
) -> Float[np.ndarray, "n m"]:
    """IoU of every box of `a` with every box of `b`, float64."""
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.maximum(high - low, 0.0), axis=-1)
    area_a = np.prod(np.maximum(a[:, 2:] - a[:, :2], 0.0), axis=-1)
    area_b = np.prod(np.maximum(b[:, 2:] - b[:, :2], 0.0), axis=-1)
    union = area_a[:, None] + area_b[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def union_box(boxes: Iterable[BoxLike]) -> Box:
    """The smallest box around all of `boxes`. Raises ValueError for none."""
    boxes = list(boxes)
    if not boxes:
        raise ValueError("the union of no boxes is no box")
    x_min, y_min, x_max, y_max = zip(*boxes, strict=True)
    return min(x_min), min(y_min), max(x_max), max(y_max)


def boxes_of_mask(
    segmentation: Integer[np.ndarray, "H W"],
) -> dict[int, tuple[int, int, int, int]]:
    """Class map → {class id: union box in pixels, max exclusive}, ids rising, background left out.

    The box of a class spans all its pixels, which is the union of the boxes of its parts.
    Ids are taken at full width: a map holding 261 yields class 261, never 5. Ids below 0 are left
    out too.
    """
    segmentation = np.asarray(segmentation)
    if segmentation.ndim != 2:
        raise ValueError(f"a class map has two axes, not shape {segmentation.shape}")
    from scipy import ndimage  # comes with JAX; slow to import

    if segmentation.dtype == bool:
        segmentation = segmentation.astype(np.uint8)
    # One pass over the map, however many classes it holds.
    return {
        class_id: (x.start, y.start, x.stop, y.stop)
        for class_id, found in enumerate(ndimage.find_objects(segmentation), 1)
        if found is not None
        for y, x in [found]
    }
