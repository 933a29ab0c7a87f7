"""Stage d: volumes, masks, mentions, reports → the official layout, whatever interrupts it."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import zstandard

from rg_jax.data.dicom import read_slice
from rg_jax.errors import UserError
from rg_jax.grounding.spans import tag
from tools import build_slices
from tools.layout import make_splits
from tools.slice_files import rescale_of
from tools.stages import Summary

sys.path.insert(0, str(Path(__file__).parent))
import small_archive  # noqa: E402
from small_archive import KEPT, SENTENCE, SLICES  # noqa: E402

REAL = os.environ.get("REFRAD2D_ROOT", "")
HERE = Path(__file__).parent


def build(root, out, *flags):
    """Runs the stage in this process; returns its summaries."""
    arguments = [f"--root={root}", f"--out={out}", *flags]
    return build_slices.run(build_slices.parser().parse_args(arguments))


def load(path):
    return json.loads(path.read_text("utf-8"))


def entries(out):
    found = {}
    for kind in ("ct", "mr"):
        found |= load(out / "refrad2d_segment" / f"rsopid_2_segment_v3_{kind}.json")
    return found


def splits(out):
    """split → {caption: ids} of both modalities."""
    found = {}
    for split in ("train", "val", "test"):
        found[split] = {}
        for kind in ("ct", "mr"):
            folder = out / "split_v18/generated" / f"filtered_{kind}_splits"
            found[split] |= {
                (kind, caption): ids
                for caption, ids in load(
                    folder / f"snippet2rsopids_{split}_{kind}_only.json"
                ).items()
            }
    return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    small_archive.write_archive(root)
    return root


@pytest.fixture(scope="module")
def built(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    return out, build(archive, out)


def looked_at(array, axis, index):
    """The slice of an LPS array by the rule of the layout, written out."""
    if axis == 2:
        return array[:, :, index].T
    return (array[:, index, ::-1] if axis == 1 else array[index, :, ::-1]).T


def test_kept_and_left_out_by_reason(built):
    out, (ct, mr) = built
    assert set(entries(out)) == KEPT
    assert sum(ct.kept.values()) == 5 and sum(mr.kept.values()) == 3
    assert dict(ct.left_out) == {
        "no mentioned structure on the slice": 2,
        "slice outside the volume": 1,
        "missing file": 1,
    }
    assert not mr.left_out
    listed = [id_ for groups in splits(out).values() for ids in groups.values() for id_ in ids]
    assert sorted(listed) == sorted(KEPT)


def test_pixels_masks_boxes_and_place(built):
    out, _ = built
    for id_, entry in entries(out).items():
        scan, axis, index, _ = SLICES[id_]
        read = read_slice(out / "dicoms_anon" / id_[:2] / f"{id_}.dcm.zst")
        expected = looked_at(small_archive.values(scan), axis, index)
        if scan == "three":
            expected = expected * 0.5 + 10
        np.testing.assert_array_equal(
            read.pixels * read.rescale[0] + read.rescale[1], expected, err_msg=id_
        )
        mask = looked_at(small_archive.classes(scan), axis, index)
        np.testing.assert_array_equal(np.load(out / entry["segment_slice_path"]), mask)
        boxes = {}
        for x_min, y_min, x_max, y_max, class_id in entry["bboxes"]:
            boxes[class_id] = (x_min, y_min, x_max, y_max)
        assert set(boxes) == set(np.unique(mask)) - {0}
        for class_id, box in boxes.items():
            rows, columns = np.nonzero(mask == class_id)
            assert box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert (read.modality, read.identifying) == (small_archive.MODALITY[scan], ())
        assert read.spacing_mm == ((2, 2) if axis == 2 else (3, 2))
        x, y, z = (0, 0, index) if axis == 2 else (0, index, 7) if axis == 1 else (index, 0, 7)
        np.testing.assert_allclose(read.position, [-20 + 2 * x, -30 + 2 * y, -40 + 3 * z])
        assert (
            read.orientation
            == {
                2: (1, 0, 0, 0, 1, 0),
                1: (1, 0, 0, 0, 0, -1),
                0: (0, 1, 0, 0, 0, -1),
            }[axis]
        )


def test_mentions_with_a_place(built):
    out, _ = built
    found = entries(out)
    both = [["liver", "liver", 5], ["left kidney", "kidney_left", 3]]
    assert found["aa02"]["keywords_eng"] == both
    assert found["aa01"]["keywords_eng"] == [["liver", "liver", 5]]  # kidney starts higher
    assert found["bb02"]["keywords_de"] == [["linke Niere", "kidney_left", 3]]
    # "aorta" is listed but neither in the sentence nor in a mask.
    assert not any("aorta" in str(entry["keywords_eng"]) for entry in found.values())
    assert found["cc03"]["keywords_eng"] == [] and found["cc03"]["keywords_de"]


def test_patients_and_that_no_id_of_an_archive_leaves_it(built):
    out, _ = built
    patients = {}
    for id_ in KEPT:
        path = out / "dicoms_anon" / id_[:2] / f"{id_}.dcm.zst"
        patients.setdefault(SLICES[id_][0], set()).add(read_slice(path).patient)
    assert {len(keys) for keys in patients.values()} == {1} and len(patients) == 3
    assert len(set.union(*patients.values())) == 3
    # A folder's name without a digit may be a person's: something else stands for it.
    assert all(key.startswith("scan-") for keys in patients.values() for key in keys)
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"H-123" not in content and b"K-77" not in content, path


def test_splits_by_patient(built, archive, tmp_path):
    out, _ = built
    whose = {split: set() for split in ("train", "val", "test")}
    for split, groups in splits(out).items():
        for (_, caption), ids in groups.items():
            whose[split] |= {SLICES[id_][0] for id_ in ids}
            assert all(caption in SLICES[id_][3] for id_ in ids)
    assert sorted(map(len, whose.values())) == [1, 1, 1]
    assert splits(out)["train"] or splits(out)["test"]
    seen = set()
    for seed in range(6):
        build(archive, tmp_path / str(seed), f"--seed={seed}")
        seen.add(str(splits(tmp_path / str(seed))))
        if seed == 0:
            assert splits(tmp_path / "0") == splits(out)
    assert len(seen) > 1  # the seed does something
    # Two scans of one patient stay together.
    same = tmp_path / "patients.json"
    same.write_text('{"one": "P1", "two": "P2", "three": "P1"}')
    for seed in range(4):
        build(archive, tmp_path / f"p{seed}", f"--seed={seed}", f"--patients={same}")
        groups = {
            frozenset(SLICES[id_][0] for ids in found.values() for id_ in ids)
            for found in splits(tmp_path / f"p{seed}").values()
        }
        assert groups <= {frozenset(), frozenset({"one", "three"}), frozenset({"two"})} | {
            frozenset({"one", "two", "three"})
        }


def test_given_splits_are_filtered(archive, tmp_path):
    for kind, lists in {
        "ct": {"train": {SENTENCE[0]: ["aa01", "ab03", "aa02"]}, "val": {"x": ["ab05"]}},
        "mr": {"test": {"y": ["cc01"]}},
    }.items():
        folder = tmp_path / "splits" / f"{kind}_splits"
        folder.mkdir(parents=True)
        for split in ("train", "val", "test"):
            name = f"snippet2rsopids_{split}_{kind}_only.json"
            (folder / name).write_text(json.dumps(lists.get(split, {})))
    ct, mr = build(archive, tmp_path / "out", f"--splits={tmp_path / 'splits'}")
    assert splits(tmp_path / "out") == {
        "train": {("ct", SENTENCE[0]): ["aa01", "aa02"]},
        "val": {},
        "test": {("mr", "y"): ["cc01"]},
    }
    assert ct.noted["in the split JSONs but not kept"] == 2
    assert ct.noted["kept, but in no split"] == 3 and mr.noted["kept, but in no split"] == 2


def test_existing_slices_are_taken_as_they_are(built, archive, tmp_path):
    out, _ = built
    dicoms = out / "dicoms_anon"
    build(archive, tmp_path / "out", f"--dicom_dir={dicoms}")
    assert set(entries(tmp_path / "out")) == KEPT
    for id_ in KEPT:
        name = f"{id_[:2]}/{id_}.dcm.zst"
        assert (tmp_path / "out/dicoms_anon" / name).read_bytes() == (dicoms / name).read_bytes()
    # One that belongs elsewhere is not.
    wrong = tmp_path / "wrong"
    for id_ in KEPT:
        path = wrong / id_[:2] / f"{id_}.dcm.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((dicoms / "aa" / "aa01.dcm.zst").read_bytes())
    ct, mr = build(archive, tmp_path / "other", f"--dicom_dir={wrong}")
    assert set(entries(tmp_path / "other")) == {"aa01"}
    assert ct.left_out["slice file unlike its place in the volume"] == 4


def test_a_name_in_a_slice_file_is_not_learnt(built, archive, tmp_path, capsys):
    """The file is taken as it is; the journal and the summary know the patient by a hash."""
    dicoms = shutil.copytree(built[0] / "dicoms_anon", tmp_path / "dicoms")
    for id_ in ("aa01", "aa02"):
        path = dicoms / id_[:2] / f"{id_}.dcm.zst"
        made = pydicom.dcmread(io.BytesIO(zstandard.decompress(path.read_bytes())))
        made.PatientID = "Doe^Jane^1960"
        out = io.BytesIO()
        pydicom.dcmwrite(out, made)
        path.write_bytes(zstandard.compress(out.getvalue()))
    folder = tmp_path / "splits" / "ct_splits"
    folder.mkdir(parents=True)
    mr = tmp_path / "splits" / "mr_splits"
    mr.mkdir()
    for split, ids in {"train": ["aa01"], "val": [], "test": ["aa02"]}.items():
        name = f"snippet2rsopids_{split}_%s_only.json"
        (folder / (name % "ct")).write_text(json.dumps({SENTENCE[0]: ids}))
        (mr / (name % "mr")).write_text("{}")
    flags = [f"--dicom_dir={dicoms}", f"--splits={tmp_path / 'splits'}"]
    build_slices.main([f"--root={archive}", f"--out={tmp_path / 'out'}", *flags])
    told = capsys.readouterr().out
    assert "patients in several splits, which no build takes: 1 (aa01 and aa02)" in told
    assert "Doe" not in told and "Jane" not in told
    for path in (tmp_path / "out").rglob("*.json*"):
        assert "Jane" not in path.read_text(), path


def test_the_reports_of_other_slices_and_other_columns_stay_behind(own_archive, tmp_path):
    path = own_archive / "refrad2d_vqa_dataset.parquet"
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["PatientName"] = "Doe^Jane"
        row["modality"] = row["modality"].lower()
    rows.append({**rows[0], "rsopid": "zz99", "body_part": "Mrs. Doe"})
    pq.write_table(pa.Table.from_pylist(rows, schema=None), path)
    build(own_archive, tmp_path / "out")
    made = pq.read_table(tmp_path / "out" / path.name)
    assert made.column_names == ["rsopid", "modality", "body_part", "english", "german"]
    assert set(made.column("rsopid").to_pylist()) == KEPT == set(entries(tmp_path / "out"))
    assert set(made.column("modality").to_pylist()) == {"CT", "MR"}


def test_two_reports_of_a_slice_that_differ(own_archive, tmp_path):
    path = own_archive / "refrad2d_vqa_dataset.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows += [{**rows[0], "body_part": "LEG"}, rows[1]]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    ct, _ = build(own_archive, tmp_path / "out")
    assert ct.left_out["reports that differ"] == 1
    assert set(entries(tmp_path / "out")) == KEPT - {rows[0]["rsopid"]}
    ids = pq.read_table(tmp_path / "out" / path.name).column("rsopid").to_pylist()
    assert len(ids) == len(set(ids))


def files_of(out):
    """{path: content} of all that a build left, but for the journal, whose order is its own."""
    return {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".jsonl"
    }


def test_a_withdrawn_scan_leaves_nothing_behind(own_archive, tmp_path):
    out = tmp_path / "out"
    build(own_archive, out)
    index = own_archive / "scans_index_ct.json"
    scans = json.loads(index.read_text())
    gone = set(scans.pop("one")["slices"])
    index.write_text(json.dumps(scans))
    build(own_archive, out, "--limit=1")  # a look at a part removes nothing
    assert (out / "dicoms_anon/aa/aa01.dcm.zst").exists()
    summaries = build(own_archive, out)
    assert summaries[-1].noted["slices of an earlier run removed"] == len(gone & KEPT)
    assert set(entries(out)) == KEPT - gone
    left = {path.name.partition(".")[0] for path in out.rglob("*") if path.is_file()}
    assert not left & gone
    for path in (*out.rglob("*.json"), *out.rglob("*.jsonl")):
        assert not [id_ for id_ in gone if id_ in path.read_text()], path
    # As if the scan had never been there: also among the slices for grounded questions.
    again = tmp_path / "again"
    build(own_archive, again)
    assert files_of(out) == files_of(again)


def test_a_volume_that_does_not_say_how_it_lies_is_left_out(own_archive, tmp_path):
    path = own_archive / "scans/one/scan_clean.nii.gz"
    image = nibabel.load(path)
    made = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    made.header.set_sform(None, 0)
    made.header.set_qform(None, 0)
    data = bytearray(made.to_bytes())
    data[252:256] = bytes(4)  # qform_code, sform_code
    path.write_bytes(gzip.compress(bytes(data)))
    ct, _ = build(own_archive, tmp_path / "out")
    assert ct.left_out["unreadable file"] == sum(scan == "one" for scan, *_ in SLICES.values())
    assert "does not say how it lies" in str(ct.places["unreadable file"])


def copy(archive, folder):
    import shutil

    shutil.copytree(archive, folder)
    return folder


@pytest.mark.parametrize("what", ["moved mask", "other shape", "class", "cut", "nan", "other size"])
def test_unusable_scans_are_left_out_and_counted(archive, tmp_path, what):
    import nibabel

    root = copy(archive, tmp_path / "in")
    mask, volume = root / "segmentations/one/seg_scan_clean.nii.gz", root / "scans/one/scan_clean"
    volume = volume.with_suffix(".nii.gz")
    image = nibabel.load(mask)
    array, affine = np.asarray(image.dataobj), image.affine.copy()
    reason = "mask of another shape"
    if what == "moved mask":
        affine[2, 3] += 3
    elif what == "other shape":
        array = array[:-1]
    elif what == "class":
        array[0, 0, 0], reason = 119, "unknown class"
    if what == "cut":
        volume.write_bytes(volume.read_bytes()[:-30])
        reason = "unreadable file"
    elif what == "nan":
        bad = nibabel.load(volume)
        values = bad.get_fdata().astype(np.float32)
        values[0, 0, 0] = np.nan
        nibabel.Nifti1Image(values, bad.affine).to_filename(volume)
        reason = "unreadable file"
    elif what == "other size":
        mask.unlink()
        reason = "missing file"
    else:
        nibabel.Nifti1Image(array, affine).to_filename(mask)
    ct, _ = build(root, tmp_path / "out")
    assert ct.left_out[reason] >= 5
    assert not any(entry["scan_rserid"] == "one" for entry in entries(tmp_path / "out").values())


def test_a_sentence_without_an_answer_is_not_one_without_mentions(archive, tmp_path):
    root = copy(archive, tmp_path / "in")
    for language in ("en", "de"):
        (root / f"keywords_{language}.json").write_text("{}")
    with pytest.raises(UserError, match="left out, sentence without an answer of stage b: 7"):
        build(root, tmp_path / "out")


def test_same_id_in_two_scans_is_left_out(archive, tmp_path):
    root = copy(archive, tmp_path / "in")
    index = load(root / "scans_index_mr.json")
    index["three"]["slices"]["aa01"] = {"slice_axis": 2, "slice_idx": 4}
    (root / "scans_index_mr.json").write_text(json.dumps(index))
    ct, mr = build(root, tmp_path / "out")
    assert "aa01" not in entries(tmp_path / "out")
    assert ct.left_out["duplicate id"] == mr.left_out["duplicate id"] == 1


@pytest.mark.parametrize("id_", ["../aa01", "a/b", ".hidden", ""])
def test_ids_that_are_no_file_names(archive, tmp_path, id_):
    root = copy(archive, tmp_path / "in")
    index = load(root / "scans_index_mr.json")
    index["three"]["slices"][id_] = {"slice_axis": 2, "slice_idx": 4}
    (root / "scans_index_mr.json").write_text(json.dumps(index))
    _, mr = build(root, tmp_path / "out")
    assert mr.left_out["id that is no file name"] == 1


def test_sampled_slices(built, archive, tmp_path):
    out, _ = built
    for kind, scans in (("ct", {"one", "two"}), ("mr", {"three"})):
        sampled = load(out / "refrad2d_segment" / f"refrad2d_sampled_dataset_v3_{kind}.json")
        assert {row["scan_rserid"] for row in sampled.values()} == scans
        for row in sampled.values():
            read = read_slice(out / f"dicoms_anon/{row['rsopid'][:2]}/{row['rsopid']}.dcm.zst")
            values = np.load(out / row["scan_slice_path"])
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, read.pixels * read.rescale[0] + read.rescale[1])
            assert row["bboxes"] == entries(out)[row["rsopid"]]["bboxes"]
    build(archive, tmp_path / "none", "--sampled=0")
    assert load(tmp_path / "none/refrad2d_segment/refrad2d_sampled_dataset_v3_ct.json") == {}


def test_a_second_run_does_nothing_and_a_change_is_seen(archive, tmp_path):
    root, out = copy(archive, tmp_path / "in"), tmp_path / "out"
    build(root, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    build(root, out)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    (root / "keywords_en.json").write_text("{}")
    build(root, out)
    assert set(entries(out)) == KEPT  # by their German mentions
    assert not any(entry["keywords_eng"] for entry in entries(out).values())
    (out / "dicoms_anon/aa/aa01.dcm.zst").unlink()
    build(root, out)
    assert (out / "dicoms_anon/aa/aa01.dcm.zst").is_file()


def test_limit_and_then_all(archive, built, tmp_path):
    out = tmp_path / "out"
    build(archive, out, "--limit=2")
    assert set(entries(out)) == {"aa01", "aa02"}
    build(archive, out)
    assert entries(out) == entries(built[0]) and splits(out) == splits(built[0])


def test_killed_at_any_moment_it_ends_the_same(archive, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, HERE / "interrupting.py", "tools.build_slices", tmp_path, "8"),
            *(f"--root={archive}", "--out={out}"),
        ],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed at 8" in done.stdout


def test_half_built_is_no_data_set(archive, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(archive, out)
    root = copy(archive, tmp_path / "in")
    (root / "keywords_de.json").unlink()

    class Cut(Exception):
        pass

    def cut(*args, **kwargs):
        raise Cut

    monkeypatch.setattr(build_slices, "union_boxes", cut)
    with pytest.raises(Cut):
        build(root, out)
    assert not (out / "split_v18").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modalities=xr"], "--modalities=xr"),
        (["--shares=1,1,1"], "--shares=1,1,1"),
        (["--dicom_dir=/nowhere"], "--dicom_dir=/nowhere"),
        (["--splits=/nowhere"], "--splits=/nowhere"),
        (["--parquet=/nowhere"], "/nowhere"),
        (["--keywords=/nowhere"], "keywords_en"),
        (["--index_dir=/nowhere"], "scans_index_ct"),
        (["--limit=-1"], "--limit=-1"),
    ],
)
def test_wrong_flags_are_one_line(archive, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        build(archive, tmp_path / "out", *flags)


def test_result_must_have_its_own_folder(archive, capsys):
    with pytest.raises(SystemExit) as stop:
        build_slices.main([f"--root={archive}", f"--out={archive}/../{archive.name}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --out=")


@pytest.mark.parametrize(
    ("values", "modality", "expected"),
    [
        (np.array([-1100, 1207], np.int16), "CT", (1, -1024, True)),
        (np.array([-32768, 32767], np.int16), "CT", (1, 0, True)),
        (np.array([-33, 801], np.int16), "MR", (1, 0, True)),
        (np.array([0.5, 3.0]), "MR", (0.5, 0, True)),
        (np.array([-7.0, 3.0], np.float32), "MR", (1, 0, True)),
    ],
)
def test_rescale_keeps_the_values(values, modality, expected):
    assert rescale_of(values, modality) == expected


def test_rescale_of_other_values_is_told_and_near():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * 1e5
    slope, intercept, exact = rescale_of(values, "MR")
    assert not exact
    stored = np.rint((values - intercept) / slope)
    assert abs(stored).max() <= 2**15 - 1
    assert abs(stored * slope + intercept - values).max() <= 0.51 * slope


# The real miniature: both ways must agree


@pytest.mark.skipif(not REAL, reason="REFRAD2D_ROOT is not set: no real volumes and layout")
def test_real_volumes_give_their_finished_layout(tmp_path):
    root, out = Path(REAL), tmp_path / "out"
    answers = load(root / "expected.json")["ids"]
    patients = tmp_path / "patients.json"
    patients.write_text(json.dumps({row["scan"]: row["patient"] for row in answers.values()}))
    sampled = root / "refrad2d_segment"
    build(root, out, f"--patients={patients}", f"--sampled_dir={sampled}")
    finished, made = entries(root), entries(out)
    assert list(made) == list(finished) and set(made) == set(answers)
    for id_, entry in made.items():
        name = f"dicoms_anon/{id_[:2]}/{id_}.dcm.zst"
        ours, theirs = read_slice(out / name), read_slice(root / name)
        for key in ("modality", "spacing_mm", "orientation", "patient"):
            assert getattr(ours, key) == getattr(theirs, key), (id_, key)
        np.testing.assert_allclose(ours.position, theirs.position, atol=1e-3)
        values = [s.pixels * s.rescale[0] + s.rescale[1] for s in (ours, theirs)]
        np.testing.assert_array_equal(*values)
        masks = [np.load(folder / entry["segment_slice_path"]) for folder in (out, root)]
        np.testing.assert_array_equal(*masks)
        assert entry["bboxes"] == finished[id_]["bboxes"]
        for language, key in (("en", "keywords_eng"), ("de", "keywords_de")):
            text = answers[id_]["text"][language]
            spans = []
            for source in (entry, finished[id_]):
                mentions = [(mention, class_id) for mention, _, class_id in source[key]]
                spans.append(tag(text, mentions, set(range(122)), ignore_case=True))
            assert spans[0] == spans[1], (id_, language)
            assert sorted(entry[key]) == sorted(finished[id_][key])
    assert splits(out) == splits(root)
    for kind in ("ct", "mr"):
        ours, theirs = (
            load(folder / f"refrad2d_segment/refrad2d_sampled_dataset_v3_{kind}.json")
            for folder in (out, root)
        )
        assert ours == theirs
        for row in ours.values():
            np.testing.assert_array_equal(
                *(np.load(folder / row["scan_slice_path"]) for folder in (out, root))
            )
    copied = build(root, tmp_path / "copied", f"--dicom_dir={root / 'dicoms_anon'}")
    assert sum(sum(summary.kept.values()) for summary in copied) == len(answers)


@pytest.fixture
def own_archive(archive, tmp_path):
    """To be changed."""
    return shutil.copytree(archive, tmp_path / "own")


def test_an_archive_of_one_modality_and_one_language(own_archive, tmp_path, capsys):
    """What is missing is named with the flag that leaves it out."""

    given = [f"--root={own_archive}", f"--out={tmp_path / 'out'}"]
    (own_archive / "scans_index_mr.json").unlink()
    with pytest.raises(SystemExit):
        build_slices.main(given)
    assert "--modalities=ct leaves mr out" in capsys.readouterr().err
    path = own_archive / "refrad2d_vqa_dataset.parquet"
    pq.write_table(pq.read_table(path).drop_columns("german"), path)
    with pytest.raises(SystemExit):
        build_slices.main([*given, "--modalities=ct"])
    assert "has no column german (--languages=en)" in capsys.readouterr().err
    build_slices.main([*given, "--modalities=ct", "--languages=en"])
    assert "kept" in capsys.readouterr().out
    index = tmp_path / "out" / "refrad2d_segment" / "rsopid_2_segment_v3_ct.json"
    assert json.loads(index.read_text())


@pytest.mark.parametrize("key", ["Mueller", "Mueller Hans", "Mueller^Hans 60", "Hans 1960-03-02"])
def test_a_key_that_may_be_a_name_is_refused(archive, tmp_path, capsys, key):
    keys = tmp_path / "patients.json"
    keys.write_text(json.dumps({"one": key}))
    with pytest.raises(SystemExit):
        build_slices.main([f"--root={archive}", f"--out={tmp_path / 'out'}", f"--patients={keys}"])
    text = capsys.readouterr().err
    assert "the patient key of one may be a name" in text
    assert "Hans" not in text and "Mueller" not in text


def test_a_key_that_may_be_a_hospitals_number_is_told(archive, tmp_path, capsys):
    """Its slices do not say that the identity was removed, so that a check lists them."""
    keys = tmp_path / "patients.json"
    keys.write_text(json.dumps({"one": "0012345678", "two": "pat-0012345678"}))
    out = tmp_path / "out"
    build_slices.main([f"--root={archive}", f"--out={out}", f"--patients={keys}"])
    assert "may be a hospital's own number" in capsys.readouterr().out
    told = {
        (s.patient, s.identifying)
        for s in map(read_slice, (out / "dicoms_anon").rglob("*.dcm.zst"))
    }
    assert ("0012345678", ("PatientID",)) in told and ("pat-0012345678", ()) in told


def test_splits_hold_every_modality():
    """A rare modality is in each split, where it has patients enough."""
    kept = {
        "ct": {f"c{i}": {"patient": f"p{i}"} for i in range(40)},
        "mr": {f"m{i}": {"patient": f"q{i}"} for i in range(4)},
    }
    captions = dict.fromkeys([*kept["ct"], *kept["mr"]], "text")
    summaries = [Summary("CT slices"), Summary("MR slices")]
    for seed in range(5):
        made = make_splits(kept, captions, (0.8, 0.1, 0.1), seed, summaries)
        sizes = {
            k: [len(made[k][s].get("text", [])) for s in ("train", "val", "test")] for k in made
        }
        assert sizes == {"ct": [32, 4, 4], "mr": [2, 1, 1]}
