"""Masks of an evaluation: from class maps and generated text to entities, and to and from JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from rg_jax.data.masks import class_map
from rg_jax.data.tasks import Record, Sample
from rg_jax.grounding.boxes import Box

Mask = Bool[np.ndarray, "H W"]


def reference_masks(record: Record, sample: Sample, size: int) -> tuple[Mask | None, ...]:
    """The mask of each of the sample's entities at (size, size); None for those without one."""
    classes = class_map(record, size)
    if classes is None:
        return (None,) * len(sample.entities)
    return tuple(classes == e.class_id if e.mask else None for e in sample.entities)


def predicted_masks(
    masks: Bool[np.ndarray, "K M M"], mask_indices: Sequence[int]
) -> tuple[Mask | None, ...]:
    """The mask of each entity that was read; None for those without, or beyond the slots.

    `mask_indices` as `spans.parse` gives them: which `</seg>` of the text an entity's mask is.
    """
    return tuple(masks[k] if 0 <= k < len(masks) else None for k in mask_indices)


def box_of(mask: Mask) -> Box | None:
    """The normalised box around all pixels of a mask, x first; None for an empty one."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return None
    height, width = mask.shape
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )


def to_runs(mask: Mask) -> dict[str, Any]:
    """A mask as {"size": [rows, columns], "runs": lengths of equal pixels in reading order}.

    The first run is of background, and may be 0.
    """
    flat = np.concatenate([[False], mask.ravel(), [not mask.ravel()[-1]]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges]))
    return {"size": list(mask.shape), "runs": [int(run) for run in runs]}


def from_runs(data: dict[str, Any]) -> Mask:
    """The inverse of `to_runs`. Raises ValueError for runs that do not fill the size."""
    runs = np.asarray(data["runs"], np.int64)
    values = np.arange(len(runs)) % 2 == 1
    flat = np.repeat(values, runs)
    if (runs < 0).any() or len(flat) != int(np.prod(data["size"])):
        raise ValueError(f"mask runs of {len(flat)} pixels do not fill {data['size']}")
    return flat.reshape(data["size"])


def dice(iou: float) -> float:
    """The Dice coefficient of two masks whose IoU is known."""
    return 2 * iou / (1 + iou)
