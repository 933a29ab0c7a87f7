"""Volumes: orientation, slices, boxes of their parts, labels of a segmentation task.

A volume is an array (X, Y, Z) and an affine from voxel indices to RAS+ millimetres, as NIfTI
stores it. Slices are cut from volumes in LPS orientation: x grows to the patient's left, y to the
back, z to the head.
"""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, Shaped

from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import NUM_CLASSES, SEGMENTED_IN, TOTAL_MR_TO_OURS
from rg_jax.grounding.boxes import boxes_of_mask

TASK_OF = {"CT": "total", "MR": "total_mr"}
AXES = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Volume:
    """Values (X, Y, Z) after slope and intercept (HU for CT), affine to RAS+ mm, modality."""

    array: Shaped[np.ndarray, "X Y Z"]
    affine: Float[np.ndarray, "4 4"]
    modality: str = ""


def read_nifti(path: str | Path, modality: str = "") -> Volume:
    """Read a NIfTI file; values after the header's slope and intercept.

    Whole numbers stay in the type in which they are stored where the header holds no slope.
    Raises UserError, naming the file, if it is unreadable or truncated, not of three axes (axes
    of length 1 beyond the third are dropped, missing ones added), or has no usable affine.
    """
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ImportError as error:
        raise UserError(f'{path}: needs the package nibabel: pip install -e ".[data]"') from error
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            # All of it, with its checksum: nibabel stops reading before the end.
            content = gzip.decompress(content)
        second = content[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # header length 540
        kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
        image = kind.from_bytes(content)
        array = np.asanyarray(image.dataobj)
        affine = np.asarray(image.affine, np.float64)
        placed = int(image.header["sform_code"]) or int(image.header["qform_code"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (
        *(ImageFileError, HeaderDataError, WrapStructError),
        *(OSError, EOFError, ValueError, zlib.error),
    ) as error:
        raise UserError(
            f"{path}: cannot be read as NIfTI ({' '.join(str(error).split())})"
        ) from error
    if not placed:  # nibabel would make an orientation up
        raise UserError(
            f"{path}: does not say how it lies (sform_code and qform_code are 0), so left may be"
            " right; write it again with its orientation, or give the DICOM series"
        )
    if array.dtype.fields is not None or not np.issubdtype(array.dtype, np.number):
        raise UserError(f"{path}: holds {array.dtype}, not one number per voxel")
    if any(length != 1 for length in array.shape[3:]):
        raise UserError(f"{path}: has shape {array.shape}; only single volumes are read")
    if 0 in array.shape:
        raise UserError(f"{path}: has shape {array.shape} and so holds no voxel")
    array = array.reshape((*array.shape, 1, 1, 1)[:3])
    _check_affine(affine, str(path))
    return Volume(array, affine, modality)


def _check_affine(affine: np.ndarray, name: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise UserError(f"{name}: its affine holds values that are not finite")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() == 0 or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise UserError(f"{name}: its affine is degenerate; the orientation is unknown")


def orientation(affine: Float[np.ndarray, "4 4"]) -> tuple[tuple[int, int], ...]:
    """For each voxel axis the nearest world axis and its direction: (0 … 2, ±1), RAS+.

    Oblique volumes: the axes of the nearest rotation are compared, and the pairs that agree best
    are made first, so that no world axis is taken twice.
    """
    _check_affine(affine, "the volume")
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(directions)
    rotation = left @ right
    strength = np.abs(rotation)
    pairs: dict[int, tuple[int, int]] = {}
    for axis in np.argsort(-strength.max(axis=0), kind="stable"):
        world = int(np.argmax(strength[:, axis]))
        pairs[int(axis)] = (world, 1 if rotation[world, axis] > 0 else -1)
        strength[world] = -1
    return tuple(pairs[axis] for axis in AXES)


def to_lps(volume: Volume) -> Volume:
    """The same voxels with axes permuted and flipped so that they run to L, P and S.

    No resampling: an oblique volume keeps its tilt in the affine. The result may be a view.
    """
    pairs = orientation(volume.affine)
    order = [next(i for i, (world, _) in enumerate(pairs) if world == w) for w in AXES]
    array = volume.array.transpose(order)
    # Columns of the new affine: voxel axes in their new order; origin: the new first voxel.
    affine = np.array(volume.affine, np.float64)
    affine[:, :3] = affine[:, order]
    for axis, target in zip(AXES, (-1, -1, 1), strict=True):
        if pairs[order[axis]][1] != target:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return Volume(array, affine, volume.modality)


def slice_of(volume: Volume, axis: int, index: int) -> Shaped[np.ndarray, "H W"]:
    """A slice of a volume in LPS as it is looked at: front or head up, patient's right on the left.

    Axis 2 gives axial, 1 coronal, 0 sagittal slices. A negative index counts from the end. Raises
    UserError for another axis, IndexError for an index outside the volume.
    """
    if axis not in AXES:
        raise UserError(f"slice axis {axis}: it is 0 (sagittal), 1 (coronal) or 2 (axial)")
    length = volume.array.shape[axis]
    if not -length <= index < length:
        raise IndexError(f"slice {index} of axis {axis}, which has {length}")
    piece = volume.array.take(index, axis)
    return (piece if axis == 2 else piece[:, ::-1]).T


@dataclasses.dataclass(frozen=True)
class Plane:
    """Where a slice lies, in the terms of DICOM: LPS, mm, rows first in `spacing_mm`."""

    spacing_mm: tuple[float, float]
    thickness_mm: float
    orientation: tuple[float, ...]
    position: tuple[float, ...]


def plane_of(volume: Volume, axis: int, index: int) -> Plane:
    """The place of `slice_of(volume, axis, index)`; the same errors."""
    height, width = slice_of(volume, axis, index).shape
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    column_axis, row_axis = [a for a in AXES if a != axis]  # x runs along the first of the two
    start = np.zeros(4)
    start[3] = 1
    start[axis] = index % volume.array.shape[axis]
    right, down = lps[:3, column_axis], lps[:3, row_axis]
    if axis != 2:  # the head is up, so rows run against z
        start[row_axis] = height - 1
        down = -down
    spacing = np.linalg.norm(down), np.linalg.norm(right)
    return Plane(
        (float(spacing[0]), float(spacing[1])),
        float(np.linalg.norm(lps[:3, axis])),
        tuple(float(value) for value in (*(right / spacing[1]), *(down / spacing[0]))),
        tuple(float(value) for value in (lps @ start)[:3]),
    )


def remap_labels(
    mask: Integer[np.ndarray, "*shape"] | Float[np.ndarray, "*shape"], task: str
) -> Integer[np.ndarray, "*shape"]:
    """Labels of a TotalSegmentator task ("total", "total_mr") → class ids of the schema, uint8.

    Labels that the task does not know become background in `total_mr`, as published; in `total`
    118 to 121 raise, since they would be taken for classes of MR. Raises UserError for labels
    that are negative, no whole numbers, or above 121, and ValueError for another task.
    """
    if task not in TASK_OF.values():
        raise ValueError(f"task {task!r} is not one of {', '.join(TASK_OF.values())}")
    labels = _whole(mask)
    last = max(SEGMENTED_IN["CT"]) if task == "total" else NUM_CLASSES
    if labels.size and labels.max() > last:
        raise UserError(f"label {labels.max()} is unknown to the task {task}, which ends at {last}")
    table = np.zeros(NUM_CLASSES + 1, np.uint8)
    if task == "total":
        table[: last + 1] = np.arange(last + 1)
    else:
        table[list(TOTAL_MR_TO_OURS)] = list(TOTAL_MR_TO_OURS.values())
    return table[labels]


def check_classes(mask: Shaped[np.ndarray, "H W"]) -> Integer[np.ndarray, "H W"]:
    """A class map of any number type → uint8. UserError unless all are whole, 0 … 121."""
    labels = _whole(mask)
    if labels.size and labels.max() > NUM_CLASSES:
        raise UserError(f"class {labels.max()} is not in the schema, which ends at {NUM_CLASSES}")
    return labels.astype(np.uint8)


def _whole(mask: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    if np.issubdtype(mask.dtype, np.floating):
        # NaN fails the comparison too.
        if not (mask == np.floor(mask)).all() or (mask.size and np.abs(mask).max() > 2**31):
            raise UserError("the mask holds numbers that are not whole")
        mask = mask.astype(np.int64)
    if mask.size and mask.min() < 0:
        raise UserError(f"the mask holds the negative label {mask.min()}")
    return mask


def _cut(mask: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    return np.trunc(mask) if np.issubdtype(mask.dtype, np.floating) else mask


def component_boxes(mask: Shaped[np.ndarray, "H W"]) -> list[tuple[int, int, int, int, int]]:
    """[(x_min, y_min, x_max, y_max, class id)] of the 8-connected parts, max exclusive.

    Sorted by class id, then top to bottom. Fractions are cut, as in published class maps of
    floats; who wants them refused calls `check_classes` first. Raises UserError for a class
    outside the schema.
    """
    from scipy import ndimage  # comes with JAX; slow to import

    labels = check_classes(_cut(mask))
    boxes = []
    for class_id in np.unique(labels[labels > 0]):
        parts, _ = ndimage.label(labels == class_id, structure=np.ones((3, 3)))
        found = [
            (columns.start, rows.start, columns.stop, rows.stop, int(class_id))
            for rows, columns in ndimage.find_objects(parts)
        ]
        boxes += sorted(found, key=lambda box: (box[1], box[0], box[3], box[2]))
    return boxes


def union_boxes(mask: Shaped[np.ndarray, "H W"]) -> list[tuple[int, int, int, int, int]]:
    """[(x_min, y_min, x_max, y_max, class id)], one box around all parts of a class, ids rising.

    Fractions and classes outside the schema as in `component_boxes`.
    """
    return [(*box, id_) for id_, box in boxes_of_mask(check_classes(_cut(mask))).items()]
