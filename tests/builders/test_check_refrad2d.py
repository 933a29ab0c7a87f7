"""Defects planted in the RefRad2D layout: the check names each with its file, the build refuses or
counts it. On a made-up layout always, on a copy of a real one where $REFRAD2D_ROOT points."""

import io
import json
import os
import shutil
from pathlib import Path

import mini_refrad2d as mini
import numpy as np
import pydicom
import pytest
import tensorflow_datasets as tfds
import zstandard
from pydicom.uid import ImplicitVRLittleEndian, RLELossless

from rg_jax.data import record
from rg_jax.errors import UserError
from tfds_builders import __main__ as command
from tfds_builders.check import page
from tfds_builders.check.command import check
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig

VARIABLE = "REFRAD2D_ROOT"
NO_ROOT = f"{VARIABLE} is not set: it names a folder in the RefRad2D layout"


class Layout:
    """A layout on disk that may be spoiled. `ids("ct")` are the slices of train with mentions."""

    def __init__(self, folder: Path):
        self.folder = folder

    def ids(self, kind: str, split: str = "train") -> list[str]:
        listed = json.loads(mini.split_path(self.folder, split, kind).read_text())
        index = self.index(kind)
        ids = [i for ids in listed.values() for i in ids if i in index]
        return [i for i in dict.fromkeys(ids) if index[i]["bboxes"] and index[i]["keywords_eng"]]

    def index(self, kind: str):
        return json.loads(mini.index_path(self.folder, kind).read_text())

    def edit_index(self, kind: str, slice_id: str, change) -> str:
        path = mini.index_path(self.folder, kind)
        mini.edit_json(path, lambda rows: change(rows[slice_id]))
        return f"{self.name(path)}: {slice_id}"

    def dicom(self, slice_id: str) -> Path:
        return mini.dicom_path(self.folder, slice_id)

    def edit_dicom(self, slice_id: str, change, syntax=None) -> str:
        path = self.dicom(slice_id)
        data = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        header = pydicom.dcmread(io.BytesIO(data))
        change(header)
        if syntax == ImplicitVRLittleEndian:
            header.file_meta.TransferSyntaxUID = syntax
        elif syntax is not None:
            header.compress(syntax, generate_instance_uid=False)
        out = io.BytesIO()
        pydicom.dcmwrite(out, header, implicit_vr=syntax == ImplicitVRLittleEndian or None)
        path.write_bytes(zstandard.ZstdCompressor().compress(out.getvalue()))
        return self.name(path)

    def mask(self, kind: str, slice_id: str) -> Path:
        return self.folder / self.index(kind)[slice_id]["segment_slice_path"]

    def edit_mask(self, kind: str, slice_id: str, change) -> str:
        path = self.mask(kind, slice_id)
        np.save(path, change(np.load(path)))
        return self.name(path)

    def list_too(self, kind: str, slice_id: str, split: str) -> str:
        path = mini.split_path(self.folder, split, kind)
        mini.edit_json(path, lambda rows: rows.update({"once more": [slice_id]}))
        return self.name(path)

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def check(self, out: Path, pictures: int = 0, **values):
        """(report, problems) of the data check."""
        out.mkdir(exist_ok=True)
        config = RefRad2DConfig(**values)
        builder = command.make_builder(Builder, config, str(out / "none"))
        report = check(builder, self.folder, out, pictures=pictures)
        lines = (out / page.PROBLEMS).read_text().splitlines()
        return report, [json.loads(line) for line in lines]

    def build(self, folder: Path, capsys, **values):
        """({id: record}, what was printed) of a build."""
        place = command.build(Builder, RefRad2DConfig(**values), str(folder), str(self.folder))
        builder = tfds.builder_from_directory(place)
        items = [
            record.decode(item)
            for split in builder.info.splits
            for item in builder.as_data_source(split=split)
        ]
        return {item["id"]: item for item in items}, capsys.readouterr().out


@pytest.fixture
def layout(tmp_path) -> Layout:
    mini.write_mini(tmp_path / "layout")
    return Layout(tmp_path / "layout")


@pytest.fixture
def real(tmp_path) -> Layout:
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(NO_ROOT)
    shutil.copytree(root, tmp_path / "layout", ignore=shutil.ignore_patterns("scans"))
    for path in (tmp_path / "layout").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Layout(tmp_path / "layout")


# --- planted defects: each plants one and returns the file that must be named --------------------


def missing_dicom(layout, slice_id, kind):
    layout.dicom(slice_id).unlink()
    return layout.name(layout.dicom(slice_id))


def truncated_dicom(layout, slice_id, kind):
    path = layout.dicom(slice_id)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return layout.name(path)


def no_intercept(layout, slice_id, kind):
    return layout.edit_dicom(slice_id, lambda header: delattr(header, "RescaleIntercept"))


def mask_of_another_shape(layout, slice_id, kind):
    return layout.edit_mask(kind, slice_id, lambda mask: mask[:-1])


def class_in_mask(layout, slice_id, kind):
    def change(mask):
        mask = mask.astype(np.int64)
        mask[0, 0] = 122
        return mask

    return layout.edit_mask(kind, slice_id, change)


def class_in_boxes(layout, slice_id, kind):
    return layout.edit_index(kind, slice_id, lambda row: row["bboxes"][0].__setitem__(4, 122))


def class_in_mentions(layout, slice_id, kind):
    return layout.edit_index(
        kind, slice_id, lambda row: row["keywords_de"].append(["Pfote", "paw", 122])
    )


def box_outside(layout, slice_id, kind):
    return layout.edit_index(kind, slice_id, lambda row: row["bboxes"][0].__setitem__(2, 9999))


def broken_text(layout, slice_id, kind):
    def change(rows):
        row = next(row for row in rows if row["rsopid"] == slice_id)
        row["german"]["CleanedSentence"] = "Keine LÃ¤sion der Leber."

    mini.edit_parquet(layout.folder, change)
    return f"refrad2d_vqa_dataset.parquet: {slice_id} german/CleanedSentence"


def blank(layout, slice_id, kind):
    def change(header):
        header.PixelData = bytes(len(header.PixelData))

    return layout.edit_dicom(slice_id, change)


def box_beside_its_mask(layout, slice_id, kind):
    def change(row):
        row["bboxes"] = [[0, 0, 1, 1, class_id] for *_, class_id in row["bboxes"]]

    layout.edit_index(kind, slice_id, change)
    return layout.name(layout.dicom(slice_id))


def other_modality(layout, slice_id, kind):
    return layout.edit_dicom(slice_id, lambda header: setattr(header, "Modality", "US"))


def fit(report) -> int:
    """The records of a check that a build can hold."""
    return report.statistics.records.total() - report.statistics.unfit.total()


# name: (kind of problem, function that plants it)
REFUSED = {
    "missing dicom": ("missing file", missing_dicom),
    "truncated dicom": ("unreadable file", truncated_dicom),
    "no intercept": ("no rescale intercept", no_intercept),
    "mask shape": ("mask of another shape", mask_of_another_shape),
    "class in mask": ("unknown class", class_in_mask),
    "class in boxes": ("unknown class", class_in_boxes),
    "class in mentions": ("unknown class", class_in_mentions),
    "box outside": ("box outside the image", box_outside),
    "blank": ("blank image", blank),
    "box beside": ("box does not fit its mask", box_beside_its_mask),
    "broken text": ("encoding damage", broken_text),
    "modality": ("unsupported modality", other_modality),
}


@pytest.mark.parametrize("name", REFUSED)
def test_found_by_the_check_refused_by_the_build(layout, tmp_path, capsys, name):
    kind, plant = REFUSED[name]
    slice_id = layout.ids("ct")[0]
    options = {"templates": "none"}  # a sampled slice shares the mask
    file = plant(layout, slice_id, "ct")
    report, problems = layout.check(tmp_path / "out", **options)
    harmful = [problem for problem in problems if problem["harmful"]]
    assert [(p["kind"], p["file"]) for p in harmful] == [(kind, file)]
    assert fit(report) == 5  # it went on to the end
    with pytest.raises(UserError) as refusal:
        layout.build(tmp_path / "data", capsys, **options)
    assert str(refusal.value).startswith(file) and "--skip_bad" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    items, out = layout.build(tmp_path / "data", capsys, skip_bad=True, **options)
    assert slice_id not in items and len(items) == 5
    assert f"left out: {kind}: 1" in out


def test_nothing_is_wrong_before(layout, tmp_path, capsys):
    report, problems = layout.check(tmp_path / "out")
    assert report.harmful == 0 and report.statistics.records.total() == 8
    assert len(layout.build(tmp_path / "data", capsys)[0]) == 8


def test_the_same_id_in_two_splits(layout, tmp_path, capsys):
    slice_id = layout.ids("ct")[0]
    file = layout.list_too("ct", slice_id, "val")
    report, problems = layout.check(tmp_path / "out", templates="none")
    leaks = [p for p in problems if p["kind"] == "leakage between splits"]
    assert report.harmful == len(leaks) >= 1
    assert leaks[0]["file"] == file and slice_id in leaks[0]["detail"]
    with pytest.raises(UserError, match=slice_id) as refusal:
        layout.build(tmp_path / "data", capsys)
    assert file in str(refusal.value) and "--leaks=move" in str(refusal.value)
    items, out = layout.build(tmp_path / "data", capsys, leaks="move", templates="none")
    assert len(items) == 6 and "moved from val to train" in out


def test_the_same_patient_in_two_splits(layout, tmp_path, capsys):
    first, other = layout.ids("mr")[0], layout.ids("mr", "val")[0]
    patient = pydicom.dcmread(
        io.BytesIO(zstandard.decompress(layout.dicom(first).read_bytes()))
    ).PatientID
    layout.edit_dicom(other, lambda header: setattr(header, "PatientID", patient))
    report, problems = layout.check(tmp_path / "out", templates="none")
    leaks = [p for p in problems if p["kind"] == "leakage between splits"]
    assert report.harmful == len(leaks) == 1
    assert first in leaks[0]["detail"] and other in leaks[0]["detail"]
    assert leaks[0]["file"] == layout.name(mini.split_path(layout.folder, "val", "mr"))
    for name in (page.NAME, page.PROBLEMS, page.FIGURES):
        assert patient not in (tmp_path / "out" / name).read_text(), name
    with pytest.raises(UserError, match="patient") as refusal:
        layout.build(tmp_path / "data", capsys)
    assert patient not in str(refusal.value)
    items, out = layout.build(tmp_path / "data", capsys, leaks="move", templates="none")
    assert len(items) == 6 and "moved from val to train: 1" in out


def test_the_same_picture_under_two_ids_in_two_splits(layout, tmp_path, capsys):
    first, other = layout.ids("mr")[0], layout.ids("mr", "val")[0]

    def copy(header):
        header.PixelData = mini.stored_pixels(first).tobytes()
        header.Rows, header.Columns = mini.stored_pixels(first).shape

    layout.edit_dicom(other, copy)
    _, problems = layout.check(tmp_path / "out", templates="none")
    leaks = [p for p in problems if p["kind"] == "leakage between splits"]
    assert len(leaks) == 1 and leaks[0]["file"] == layout.name(layout.dicom(other))
    assert first in leaks[0]["detail"]
    with pytest.raises(UserError, match="same picture"):
        layout.build(tmp_path / "data", capsys)


def test_the_same_picture_twice_in_a_split_is_counted_and_kept(layout, tmp_path, capsys):
    first, other = layout.ids("ct")[:2]

    def copy(header):
        header.PixelData = mini.stored_pixels(first).tobytes()
        header.Rows, header.Columns = mini.stored_pixels(first).shape

    layout.edit_dicom(other, copy)
    report, problems = layout.check(tmp_path / "out", templates="none")
    kinds = [p["kind"] for p in problems]
    assert report.harmful == 0 and kinds.count("same picture twice in a split") == 1
    items, out = layout.build(tmp_path / "data", capsys, templates="none")
    assert len(items) == 6 and "same picture twice in a split: 1" in out


def test_a_mention_that_is_not_in_its_caption(layout, tmp_path, capsys):
    slice_id = layout.ids("ct")[0]
    file = layout.edit_index(
        "ct", slice_id, lambda row: row["keywords_eng"].append(["paw", "spleen", 1])
    )
    report, problems = layout.check(tmp_path / "out")
    found = [(p["file"], p["harmful"]) for p in problems if p["kind"] == "mention not in its text"]
    assert found == [(file, False)] and report.harmful == 0
    items, out = layout.build(tmp_path / "data", capsys)
    assert "mention not in its text: 1" in out
    mentions = {
        items[slice_id]["texts"]["en"]["caption"][e["start"] : e["end"]]
        for e in items[slice_id]["entities"]
        if e["language"] == "en" and e["field"] == "caption"
    }
    assert mentions == {"liver"}


def test_identifying_tags(layout, tmp_path, capsys):
    def change(header):
        header.PatientName, header.PatientBirthDate = "Doe^Jane", "19600312"

    slice_id = layout.ids("mr")[0]
    file = layout.edit_dicom(slice_id, change)
    report, problems = layout.check(tmp_path / "out")
    found = [p for p in problems if p["kind"] == "identifying tags"]
    assert [p["file"] for p in found] == [file]
    assert "PatientName" in found[0]["detail"] and "PatientBirthDate" in found[0]["detail"]
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            assert "Doe" not in path.read_text() and "19600312" not in path.read_text()
    try:
        items, out = layout.build(tmp_path / "data", capsys)
    except UserError as refusal:
        assert file in str(refusal)
    else:
        assert "identifying tags: 1" in out and "Doe" not in repr(items[slice_id])


# --- repairs: built, counted, and the values right -----------------------------------------------


def values(item):
    slope, intercept = item["rescale"]
    return item["image"][..., 0] * np.float64(slope) + intercept


def monochrome1(header):
    header.PhotometricInterpretation = "MONOCHROME1"


def no_slope(header):
    del header.RescaleSlope


STORED = mini.stored_pixels("aaaa11111111")
# name: (change, transfer syntax, kind that is counted, the values that come out)
REPAIRED = {
    "monochrome1": (
        monochrome1,
        None,
        "MONOCHROME1 inverted",
        float(STORED.min()) + STORED.max() - STORED - 1024,
    ),
    "no slope": (no_slope, None, "missing slope taken as 1", STORED - 1024.0),
    "rle": (lambda header: None, RLELossless, "stored as RLE Lossless", STORED - 1024.0),
    "implicit vr": (
        lambda header: None,
        ImplicitVRLittleEndian,
        "stored as Implicit VR Little Endian",
        STORED - 1024.0,
    ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_repaired_and_counted(layout, tmp_path, capsys, name):
    change, syntax, kind, expected = REPAIRED[name]
    file = layout.edit_dicom("aaaa11111111", change, syntax)
    report, problems = layout.check(tmp_path / "out", templates="none")
    assert report.harmful == 0
    told = [(p["kind"], p["file"]) for p in problems]
    assert told.count((kind, file)) == 1
    items, out = layout.build(tmp_path / "data", capsys, templates="none")
    assert f"{kind}: 1" in out
    assert np.array_equal(values(items["aaaa11111111"]), expected)


def test_boxes_are_merged_and_empty_texts_are_counted(layout, tmp_path, capsys):
    def change(rows):
        row = next(row for row in rows if row["rsopid"] == "aabb22222222")
        row["english"]["ReportKlinischeAngabenCleaned"] = " "
        row["german"]["ReportFragestellungCleaned"] = None

    mini.edit_parquet(layout.folder, change)
    report, problems = layout.check(tmp_path / "out", templates="none")
    assert report.harmful == 0
    kinds = {kind: n for kind, n, _ in report.kinds(False)}
    assert kinds["empty field"] == 2 and kinds["boxes merged"] == 1
    figures = json.loads((tmp_path / "out" / page.FIGURES).read_text())
    assert figures["empty_fields"] == {"clinical_information en": 1, "clinical_question de": 1}
    items, out = layout.build(tmp_path / "data", capsys, templates="none")
    assert "boxes merged: 1" in out and "empty field: 2" in out
    boxes = {e["class_id"]: e["box"] for e in items["aaaa11111111"]["entities"]}
    assert boxes == {5: (2.0, 3.0, 15.0, 12.0)}
    assert items["aabb22222222"]["texts"]["en"]["clinical_information"] == ""


# --- all at once in real data --------------------------------------------------------------------


def test_real_layout_is_fit(real, tmp_path):
    report, _ = real.check(tmp_path / "out", pictures=1)
    assert report.harmful == 0 and report.statistics.records.total() > 0


def test_real_layout_with_all_defects_at_once(real, tmp_path, capsys):
    """One defect a slice: every one is found with its file, none hides another."""
    ids = real.ids("ct")
    planted = {}
    for slice_id, (name, (kind, plant)) in zip(ids, REFUSED.items(), strict=False):
        planted[plant(real, slice_id, "ct")] = (kind, name)
    assert len(planted) == len(REFUSED), f"train holds only {len(ids)} CT slices with mentions"
    tagged = real.edit_dicom(real.ids("mr")[0], lambda h: setattr(h, "PatientName", "Doe^Jane"))
    lost = real.edit_index(
        "mr", real.ids("mr")[1], lambda row: row["keywords_de"].append(["Pfote", "spleen", 1])
    )
    report, problems = real.check(tmp_path / "out", templates="none")
    harmful = {p["file"]: p["kind"] for p in problems if p["harmful"]}
    assert harmful == {file: kind for file, (kind, _) in planted.items()}
    assert report.harmful == len(planted)
    harmless = {(p["file"], p["kind"]) for p in problems if not p["harmful"]}
    assert (tagged, "identifying tags") in harmless and (
        lost,
        "mention not in its text",
    ) in harmless
    items, out = real.build(tmp_path / "data", capsys, templates="none", skip_bad=True)
    assert not set(items) & set(ids[: len(planted)])
    assert len(items) == fit(report)
    for kind in {kind for kind, _ in planted.values()}:
        count = sum(other == kind for other, _ in planted.values())
        assert f"left out: {kind}: {count}" in out
    leak = real.list_too("ct", real.ids("ct")[-1], "test")
    _, problems = real.check(tmp_path / "out", templates="none")
    assert any(p["kind"] == "leakage between splits" and p["file"] == leak for p in problems)


def test_a_name_twice_in_a_list_is_a_damaged_list(layout, tmp_path, capsys):
    """Python would keep the last of the two and say nothing of the slices of the other."""
    path = mini.split_path(layout.folder, "train", "ct")
    (caption, ids), *_ = json.loads(path.read_text()).items()
    twice = f"{json.dumps(caption)}: [], "
    path.write_text(path.read_text().replace("{", "{" + twice, 1))
    _, problems = layout.check(tmp_path / "out", templates="none")
    (told,) = [p for p in problems if p["harmful"]]
    assert told["kind"] == "unreadable file" and told["file"] == layout.name(path)
    assert "entry" in told["detail"] and caption not in told["detail"]
    with pytest.raises(UserError, match="has the name of an earlier one"):
        layout.build(tmp_path / "data", capsys)


def test_leaks_are_told_beside_a_damaged_index(layout, tmp_path):
    slice_id = layout.ids("ct")[0]
    layout.list_too("ct", slice_id, "val")
    mini.index_path(layout.folder, "ct").write_text("{")
    _, problems = layout.check(tmp_path / "out", templates="none")
    kinds = [p["kind"] for p in problems if p["harmful"]]
    assert kinds.count("unreadable file") == 1 and "leakage between splits" in kinds


def test_mentions_that_contradict_their_class_are_told_and_left_out(layout, tmp_path, capsys):
    slice_id = layout.ids("ct")[0]
    entry = layout.index("ct")[slice_id]
    class_id = entry["bboxes"][0][4]
    mention, other = entry["keywords_eng"][0][0], "spleen" if class_id != 1 else "liver"
    number = {"spleen": 1, "liver": 5}[other]

    def change(row):
        row["keywords_eng"] = [[mention, other, number]]
        row["bboxes"].append([0, 0, 3, 3, number])

    file = layout.edit_index("ct", slice_id, change)
    _, problems = layout.check(tmp_path / "out", templates="none")
    kind = "mention names another class, left out"
    assert [(p["file"], p["harmful"]) for p in problems if p["kind"] == kind] == [(file, False)]
    items, out = layout.build(tmp_path / "data", capsys, templates="none")
    assert f"{kind}: 1" in out
    english = [e for e in items[slice_id]["entities"] if e["language"] == "en"]
    assert not [e for e in english if e["field"] == "caption"]


def test_the_same_picture_with_another_intercept_is_the_same(layout, tmp_path, capsys):
    first, other = layout.ids("mr")[0], layout.ids("mr", "val")[0]

    def copy(header):
        pixels = mini.stored_pixels(first) + 24
        header.PixelData, (header.Rows, header.Columns) = pixels.tobytes(), pixels.shape
        header.RescaleSlope, header.RescaleIntercept = 1, -24

    layout.edit_dicom(other, copy)
    _, problems = layout.check(tmp_path / "out", templates="none")
    assert "leakage between splits" in {p["kind"] for p in problems if p["harmful"]}
    with pytest.raises(UserError, match="same picture"):
        layout.build(tmp_path / "data", capsys, templates="none")


def test_columns_that_the_layout_does_not_have_are_told(layout, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = layout.folder / "refrad2d_vqa_dataset.parquet"
    table = pq.read_table(path)
    names = pa.array(["Doe^Jane"] * table.num_rows)
    pq.write_table(table.append_column("PatientName", names), path)
    report, problems = layout.check(tmp_path / "out", templates="none")
    (told,) = [p for p in problems if p["kind"] == "column that the layout does not have"]
    assert told["file"] == path.name and told["detail"].startswith("PatientName")
    assert report.harmful == 0 and "Doe" not in json.dumps(problems)


def test_damaged_lists_are_told_and_the_check_goes_on(tmp_path):
    """A split file that is no JSON, an entry that is no list: told with the file, no text of it."""
    source = tmp_path / "source"
    mini.write_mini(source)
    folder = source / "split_v18" / "generated"
    torn = next(folder.rglob("*train_ct*.json"))
    torn.write_text("{")
    bad = next(folder.rglob("*train_mr*.json"))
    content = json.loads(bad.read_text())
    content["The liver of Mrs Smith."] = "no list"
    bad.write_text(json.dumps(content))
    builder = Builder(data_dir=tmp_path / "none", config=RefRad2DConfig())
    report = check(builder, source, tmp_path)
    problems = [
        json.loads(line) for line in (tmp_path / page.PROBLEMS).read_text().splitlines() if line
    ]
    told = {p["kind"]: p for p in problems}
    assert told["unreadable file"]["file"].endswith(torn.name)
    assert told["unreadable entry"]["file"].endswith(bad.name)
    assert "does not hold a list" in told["unreadable entry"]["detail"]
    assert "Smith" not in json.dumps(problems) and report.complete
    assert report.statistics.records["test"] > 0
