"""Masks of a batch: class maps of the shown part, in fixed slots that follow their spans.

A mask belongs to its span: the k-th slot of a row holds the class of the k-th `</seg>` of its
target, whatever the order in which a record lists its entities.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rg_jax.data.augment import Crop
from rg_jax.data.images import resize_classes
from rg_jax.data.packing import Row
from rg_jax.data.tasks import COUNTER_NAMES
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import MASK_CLOSE


def classes_in(record: dict[str, Any], crop: Crop | None = None) -> frozenset[int]:
    """The classes that have pixels in the shown part of a record."""
    segmentation = record["segmentation"]
    part = segmentation if crop is None else crop.masks(segmentation)
    # Counting takes a fraction of the time of sorting a quarter of a million pixels.
    return frozenset(np.flatnonzero(np.bincount(part.ravel())).tolist()) - {0}


def class_map(
    record: dict[str, Any], size: int, crop: Crop | None = None
) -> UInt8[np.ndarray, "M M"] | None:
    """The shown part of a record's class map, M = `size`; None for size 0 or without a map."""
    segmentation = record["segmentation"]
    if not size or not segmentation.size:
        return None
    return resize_classes(segmentation if crop is None else crop.masks(segmentation), size)


def mask_close_id(tokenizer: Tokenizer) -> int:
    """The id of `</seg>`. Raises UserError for a tokenizer without it."""
    if MASK_CLOSE not in tokenizer.extra_tokens:
        raise UserError(f"masks need the extra token {MASK_CLOSE}, which the tokenizer lacks")
    return tokenizer.extra_ids[tokenizer.extra_tokens.index(MASK_CLOSE)]


class MaskSlots:
    """Lays masks out as arrays of `slots` masks per row, `size` pixels a side; 0 slots: none."""

    def __init__(self, slots: int, size: int, tokenizer: Tokenizer):
        self.slots, self.size = slots, size
        self.close_id = mask_close_id(tokenizer) if slots else -1

    def fill(
        self,
        rows: Sequence[Row],
        maps: Sequence[np.ndarray | None],
        batch: dict[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """The masks of rows that are packed in `batch`, taken from their class maps.

        masks (B, K, M, M) uint8; mask_at (B, K) int32, the position of the `</seg>` in the row's
        text; mask_valid (B, K) bool. What finds no slot, or has no pixel at this size, is added to
        `batch["counts"]`.
        """
        if not self.slots:
            return {}
        masks = np.zeros((len(rows), self.slots, self.size, self.size), np.uint8)
        at = np.zeros((len(rows), self.slots), np.int32)
        valid = np.zeros((len(rows), self.slots), bool)
        for i, (row, classes) in enumerate(zip(rows, maps, strict=True)):
            if not row.mask_classes:
                continue
            in_target = (batch["text"][i] == self.close_id) & (batch["mask_loss"][i] > 0)
            places = np.flatnonzero(in_target)
            if classes is None or len(places) != len(row.mask_classes):
                raise AssertionError("a mask without its </seg>, or the reverse")
            used = min(self.slots, len(places))
            masks[i, :used] = classes == np.array(row.mask_classes[:used])[:, None, None]
            at[i, :used] = places[:used]
            valid[i, :used] = masks[i, :used].any(axis=(1, 2))
            counts = batch["counts"][i]
            counts[COUNTER_NAMES.index("masks_without_slot")] += len(places) - used
            counts[COUNTER_NAMES.index("masks_without_pixel")] += used - int(valid[i].sum())
        return {"masks": masks, "mask_at": at, "mask_valid": valid}
