"""Stage a: the call of TotalSegmentator, tried on a stand-in; masks that exist; interruption."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from rg_jax.data.volume import read_nifti, to_lps
from rg_jax.errors import UserError
from tools import segment_volumes

sys.path.insert(0, str(Path(__file__).parent))
import small_archive  # noqa: E402

HERE = Path(__file__).parent
EXAMPLES = os.environ.get("TOTALSEG_EXAMPLES", "")

# What the real one does as far as it is used: takes an image, gives labels on its grid. It labels
# all voxels above the mean, writes down how it was called, and talks.
STAND_IN = """
import json, os
import nibabel
import numpy as np

def totalsegmentator(input, output=None, ml=False, fast=False, task="total", quiet=False,
                     device="gpu"):
    assert isinstance(input, nibabel.Nifti1Image) and output is None and ml
    print("If you use this tool please cite")
    with open(os.environ["STAND_IN_LOG"], "a") as log:
        log.write(json.dumps([task, device, fast, quiet, list(input.shape),
                              str(input.get_data_dtype())]) + "\\n")
    data = input.get_fdata()
    labels = (data > data.mean()) * 5
    mode = os.environ.get("STAND_IN_MODE", "")
    if mode == "fails":
        raise RuntimeError("CUDA out of memory\\non two lines")
    if mode == "label":
        labels[0, 0, 0] = 118 if task == "total" else 122
    if mode == "grid":
        labels = labels[:-1]
    return nibabel.Nifti1Image(labels.astype(np.uint8), input.affine)
"""


@pytest.fixture
def archive(tmp_path):
    small_archive.write_archive(tmp_path / "in", masks=False)
    return tmp_path / "in"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The stand-in on the path; returns the calls it was given so far."""
    package = tmp_path / "stand_in" / "totalsegmentator"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "python_api.py").write_text(STAND_IN)
    log = tmp_path / "calls.jsonl"
    log.touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    for name in [n for n in sys.modules if n.split(".")[0] == "totalsegmentator"]:
        monkeypatch.delitem(sys.modules, name)
    yield lambda: log.read_text().splitlines()
    for name in [n for n in sys.modules if n.split(".")[0] == "totalsegmentator"]:
        del sys.modules[name]


def segment(root, kind, *flags):
    arguments = [f"--index={root}/scans_index_{kind}.json", f"--root={root}", *flags]
    return segment_volumes.run(segment_volumes.parser().parse_args(arguments))


def test_every_volume_gets_a_mask_on_its_grid(archive, stand_in, capsys):
    summary = segment(archive, "ct", "--device=cpu")
    assert dict(summary.kept) == {"segmented": 2}
    assert list(summary.left_out) == ["unusable volume or mask"]  # the scan without files
    assert stand_in() == [
        '["total", "cpu", false, true, [12, 10, 8], "int16"]',
        '["total", "cpu", false, true, [12, 10, 8], "int16"]',
    ]
    assert "cite" not in capsys.readouterr().out
    # Of the NIfTI file and of the DICOM series alike: the upper half in LPS order of values.
    for scan, file in (("one", "seg_scan_clean.nii.gz"), ("two", "seg_series.nii.gz")):
        mask = to_lps(read_nifti(archive / "segmentations" / scan / file))
        values = small_archive.values(scan)
        np.testing.assert_array_equal(mask.array, (values > values.mean()) * 5)
        np.testing.assert_allclose(mask.affine, small_archive.LPS_AFFINE, atol=1e-4)
    segment(archive, "mr", "--fast")
    assert stand_in()[2] == '["total_mr", "gpu", true, true, [8, 10, 12], "float32"]'


def test_masks_that_exist_are_taken_as_they_are(archive, stand_in):
    small_archive.write_archive_masks(archive)
    before = {path: path.read_bytes() for path in archive.rglob("seg_*")}
    assert dict(segment(archive, "ct").kept) == {"masks that were there": 2}
    assert stand_in() == []
    assert before == {path: path.read_bytes() for path in archive.rglob("seg_*")}


def test_existing_masks_need_no_totalsegmentator(archive, monkeypatch):
    monkeypatch.setitem(sys.modules, "totalsegmentator", None)
    with pytest.raises(UserError, match=r"-e ..\[segment\]"):
        segment(archive, "ct")
    small_archive.write_archive_masks(archive)
    assert dict(segment(archive, "ct").kept) == {"masks that were there": 2}


@pytest.mark.parametrize("defect", ["cut", "moved", "label"])
def test_unusable_masks_are_told_and_not_overwritten(archive, stand_in, defect):
    small_archive.write_archive_masks(archive)
    path = archive / "segmentations/one/seg_scan_clean.nii.gz"
    image = nibabel.load(path)
    array, affine = np.asarray(image.dataobj).copy(), image.affine.copy()
    if defect == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        affine[0, 3] += 1 if defect == "moved" else 0
        array[0, 0, 0] = 119 if defect == "label" else 0
        nibabel.Nifti1Image(array, affine).to_filename(path)
    before = path.read_bytes()
    summary = segment(archive, "ct")
    assert summary.left_out["unusable volume or mask"] == 2
    assert any(str(path) in place for place in summary.places["unusable volume or mask"])
    assert path.read_bytes() == before and stand_in() == []


@pytest.mark.parametrize("label", [51, 100, 121])
def test_mr_masks_of_another_task_are_refused(archive, stand_in, label):
    """As background their organs would be lost without a word."""
    small_archive.write_archive_masks(archive)
    path = archive / "segmentations/three/seg_scan_clean.nii.gz"
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[0, 0, 0] = label
    nibabel.Nifti1Image(array, image.affine).to_filename(path)
    summary = segment(archive, "mr")
    assert summary.left_out["unusable volume or mask"] == 1 and not summary.kept
    (place,) = summary.places["unusable volume or mask"]
    assert str(path) in place and f"label {label}" in place and "total_mr" in place


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("fails", "TotalSegmentator failed"),
        ("label", "unusable result of TotalSegmentator"),
        ("grid", "unusable result of TotalSegmentator"),
    ],
)
def test_a_failure_leaves_no_mask_and_costs_no_other_scan(
    archive, stand_in, monkeypatch, mode, reason
):
    monkeypatch.setenv("STAND_IN_MODE", mode)
    summary = segment(archive, "ct")
    assert summary.left_out[reason] == 2 and not summary.kept
    assert not any("\n" in line for line in summary.lines())
    assert not list((archive / "segmentations").rglob("*.nii.gz"))
    monkeypatch.delenv("STAND_IN_MODE")
    assert dict(segment(archive, "ct").kept) == {"segmented": 2}


def test_modality_of_file_and_index_must_agree(archive, stand_in):
    index = archive / "scans_index_ct.json"
    (archive / "other.json").write_text(index.read_text())
    with pytest.raises(UserError, match="--modality"):
        segment_volumes.run(
            segment_volumes.parser().parse_args(
                [f"--index={archive}/other.json", f"--root={archive}"]
            )
        )
    summary = segment(archive, "ct", "--modality=MR")  # the series says CT, the NIfTI nothing
    assert summary.left_out["unusable volume or mask"] == 2 and stand_in()[0].count("total_mr")


def test_limit(archive, stand_in):
    assert sum(segment(archive, "ct", "--limit=1").kept.values()) == 1
    assert len(stand_in()) == 1


def test_killed_at_any_moment_it_ends_the_same(archive, stand_in, tmp_path):
    """The masks are written below the archive itself, so the archive is what is compared."""
    (tmp_path / "runs").mkdir()
    archive.rename(tmp_path / "runs" / "prepared")
    done = subprocess.run(
        [
            *(sys.executable, HERE / "interrupting.py", "tools.segment_volumes"),
            *(tmp_path / "runs", "4", "--index={out}/scans_index_ct.json", "--root={out}"),
        ],
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{tmp_path / 'stand_in'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "moments 4, in a second run 0; killed at 4" in done.stdout


@pytest.mark.skipif(not EXAMPLES, reason="TOTALSEG_EXAMPLES is not set: no real volumes")
def test_real_volumes_and_masks_fit(tmp_path):
    import json

    names = {"ct": ("example_ct_sm.nii.gz", "example_seg.nii.gz"), "mr": ()}
    names["mr"] = ("example_mr_sm.nii.gz", "example_seg_mr.nii.gz")
    series = ("example_ct_dicom", "example_seg_dicom.nii.gz")
    for kind, pairs in (("ct", [names["ct"], series]), ("mr", [names["mr"]])):
        index = {}
        for volume, mask in pairs:
            scan = volume.split(".")[0]
            index[scan] = {"rel_dir": "", "file": volume, "slices": {}}
            target = tmp_path / "segmentations" / scan / f"seg_{scan}.nii.gz"
            target.parent.mkdir(parents=True)
            target.symlink_to(Path(EXAMPLES) / mask)
        (tmp_path / f"scans_index_{kind}.json").write_text(json.dumps(index))
        summary = segment(tmp_path, kind, f"--scans={EXAMPLES}")
        assert dict(summary.kept) == {"masks that were there": len(pairs)}, summary.lines()
