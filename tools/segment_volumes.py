"""Stage a: volumes → masks of TotalSegmentator (CT: task total, MR: task total_mr).

    python -m tools.segment_volumes --index=DIR/scans_index_ct.json --root=DIR

Volumes are NIfTI files or folders of a DICOM series: scans/{rel_dir}/{file} below the root. Masks
go to segmentations/{scan}/seg_{file}, on the grid of their volume and with TotalSegmentator's own
label ids. Masks that are there already, from whatever source, are taken as they are, if they lie
on that grid; so a stopped run goes on where it was. TotalSegmentator is the extra "segment"; it
fetches its weights by itself when first used, and its terms apply.

Note: names and arguments of its Python API were compared with release 2.18, and the call is tested
against a stand-in; the real network has not been run through this tool. Look at the first masks
before you segment an archive.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.data.volume import TASK_OF, Volume, read_nifti, remap_labels, to_lps
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import TOTAL_MR_TO_OURS
from tools.scans import Scan, load, modality_named, read_index
from tools.stages import Parser, Summary, clear_aside, command, progress, write_aside

# Grids are the same if no voxel lies farther off than this.
GRID_TOLERANCE_MM = 0.1


def parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.segment_volumes")
    parser.add_argument("--index", required=True, help="scans_index_ct.json or scans_index_mr.json")
    parser.add_argument("--root", required=True, help="folder of scans/ and segmentations/")
    parser.add_argument("--scans", default="", help="folder of the volumes (default: ROOT/scans)")
    parser.add_argument(
        "--segmentations", default="", help="folder of the masks (default: ROOT/segmentations)"
    )
    parser.add_argument(
        "--modality", default="", choices=TASK_OF, help="default: by the name of the index"
    )
    parser.add_argument("--fast", action="store_true", help="the 3 mm model: faster, coarser")
    parser.add_argument("--device", default="gpu", help="gpu, gpu:1, mps or cpu (default: gpu)")
    return parser


def run(options: argparse.Namespace) -> Summary:
    root, index = Path(options.root), Path(options.index)
    if not root.is_dir():
        raise UserError(f"--root={root}: no such folder")
    modality = options.modality or modality_named(index)
    scans = read_index(
        index,
        modality,
        Path(options.scans or root / "scans"),
        Path(options.segmentations or root / "segmentations"),
    )
    if options.limit:
        scans = scans[: options.limit]
    summary = Summary(f"{modality} scans")
    segment: Callable[..., Any] | None = None
    for scan in progress(scans, f"segment {modality}", "scan"):
        clear_aside(scan.mask.parent)
        try:
            volume, _ = load(scan)
            if scan.mask.exists():
                checked_mask(scan, volume)
                summary.keep("masks that were there")
                continue
        except UserError as error:
            summary.fail("unusable volume or mask", error)
            continue
        segment = segment or _totalsegmentator()
        try:
            mask = _segment(segment, volume, options)
        except UserError as error:
            summary.fail("unusable result of TotalSegmentator", f"{scan.name}: {error}")
            continue
        except Exception as error:  # one volume that it cannot do must not cost the others
            summary.fail("TotalSegmentator failed", f"{scan.name}: {_words(error)}")
            continue
        with write_aside(scan.mask) as aside:
            _nifti(mask, volume.affine).to_filename(aside)
        summary.keep("segmented")
    return summary


def checked_mask(scan: Scan, volume: Volume) -> Volume:
    """The mask of a scan in LPS, its labels remapped to our class ids.

    Raises UserError if it is missing, unreadable, on another grid than `volume` (which may be
    oriented otherwise), or holds labels that its task does not know.
    """
    mask = to_lps(read_nifti(scan.mask, scan.modality))
    ours = to_lps(volume)
    if mask.array.shape != ours.array.shape:
        raise UserError(
            f"{scan.mask}: is {mask.array.shape} voxels, its volume {ours.array.shape} (in LPS)"
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float64)
    corners[:, :3] *= np.array(mask.array.shape) - 1
    off = np.abs((mask.affine - ours.affine) @ corners.T).max()
    if off > GRID_TOLERANCE_MM:
        raise UserError(f"{scan.mask}: lies {off:.3g} mm beside its volume; segment it again")
    if scan.modality == "MR":
        unknown = sorted(set(np.unique(mask.array).tolist()) - {0} - TOTAL_MR_TO_OURS.keys())
        if unknown:
            raise UserError(
                f"{scan.mask}: holds label {unknown[0]:g}, which task total_mr does not have; is it"
                " of another task, or in our numbers already?"
            )
    try:
        labels = remap_labels(mask.array, TASK_OF[scan.modality])
    except UserError as error:
        raise UserError(f"{scan.mask}: {error}") from error
    return Volume(labels, ours.affine, scan.modality)


def _totalsegmentator() -> Callable[..., Any]:
    try:
        from totalsegmentator.python_api import totalsegmentator
    except ImportError as error:
        raise UserError(
            "there are volumes without a mask, and TotalSegmentator is not installed:"
            ' pip install -e ".[segment]"'
        ) from error
    return totalsegmentator


def _segment(segment: Callable[..., Any], volume: Volume, options: argparse.Namespace):
    """Labels (X, Y, Z) uint8 on the grid of `volume`."""
    # It prints of itself and its progress, which would tear our bar apart.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        result = segment(
            _nifti(volume.array, volume.affine),
            output=None,
            ml=True,
            task=TASK_OF[volume.modality],
            fast=options.fast,
            device=options.device,
            quiet=True,
        )
    labels = np.asarray(result.dataobj)
    if labels.shape != volume.array.shape or not np.allclose(
        result.affine, volume.affine, atol=GRID_TOLERANCE_MM
    ):
        raise UserError(f"it is on another grid: {labels.shape} for {volume.array.shape} voxels")
    remap_labels(labels, TASK_OF[volume.modality])  # refuses what the task does not know
    return labels.astype(np.uint8)


def _nifti(array: np.ndarray, affine: np.ndarray):
    import nibabel

    if array.dtype == np.int32 and np.abs(array).max(initial=0) < 2**15:
        array = array.astype(np.int16)  # what tools expect of a CT
    image = nibabel.Nifti1Image(np.ascontiguousarray(array), affine)
    image.header.set_xyzt_units("mm")
    return image


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(argv: list[str] | None = None) -> None:
    command(run, parser(), argv)


if __name__ == "__main__":
    main(sys.argv[1:])
