"""refrad2d: a made-up folder in the official layout through the builder."""

import io
import json
import shutil
import sys
from pathlib import Path

import mini_refrad2d as mini
import numpy as np
import pydicom
import pytest
import tensorflow_datasets as tfds
import zstandard
from pydicom.uid import DeflatedExplicitVRLittleEndian

from rg_jax.data import record
from rg_jax.data.sources import open_source
from rg_jax.data.tasks import make_sample
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import display
from rg_jax.grounding.format import OURS
from tfds_builders import __main__ as command
from tfds_builders.refrad2d import files, slices
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    mini.write_mini(folder)
    return folder


def read(place: Path):
    """{split: {id: record}}, as a reader without our code gets them."""
    builder = tfds.builder_from_directory(place)
    return {
        split: {
            item["id"]: item for item in map(record.decode, builder.as_data_source(split=split))
        }
        for split in builder.info.splits
    }


def make(source: Path, **values):
    data_dir = source.parent / "data"
    return read(command.build(Builder, RefRad2DConfig(**values), str(data_dir), str(source)))


def named(item, language, field="caption"):
    """(text, class id, box) of the entities of a text."""
    text = record.text_of(item, language, field)
    return [
        (text[e["start"] : e["end"]], e["class_id"], e["box"])
        for e in item["entities"]
        if e["field"] == field and e["language"] == language
    ]


def own(item):
    return [row for row in item["qa"] if row["type"] != "grounded"]


def test_groups_are_patients(source):
    """One group per patient, the same in every build, and nothing of the PatientID in it."""
    group_of = {}
    for items in make(source).values():
        for slice_id in items.keys() & mini.SLICES.keys():
            patient = mini.SLICES[slice_id]["patient"]
            group = items[slice_id]["source"]["group"]
            assert group_of.setdefault(patient, group) == group
    assert len(set(group_of.values())) == len(group_of) > 1
    assert not any(patient in group for patient, group in group_of.items())
    shutil.rmtree(source.parent / "data")
    # Also in a variant that has a part of the slices: what was seen in training is told by this.
    for items in make(source, modalities="mr").values():
        for slice_id in items.keys() & mini.SLICES.keys():
            patient = mini.SLICES[slice_id]["patient"]
            assert items[slice_id]["source"]["group"] == group_of[patient]


def test_another_source_is_not_taken_for_the_same(source, tmp_path):
    make(source)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    with pytest.raises(UserError, match="was built from another --source than"):
        command.build(Builder, RefRad2DConfig(), str(tmp_path / "data"), str(other))


def test_one_record_per_slice_in_its_split(source):
    splits = make(source)
    ids = {split: {i for i in items if i in mini.SLICES} for split, items in splits.items()}
    want = {}
    for slice_id, made in mini.SLICES.items():
        want.setdefault(made["split"], set()).add(slice_id)
    assert ids == want
    for items in splits.values():
        for slice_id in items.keys() & mini.SLICES.keys():
            item, made = items[slice_id], mini.SLICES[slice_id]
            np.testing.assert_array_equal(item["image"][..., 0], mini.stored_pixels(slice_id))
            assert item["rescale"] == ((1, -1024) if made["modality"] == "CT" else (0.5, -50))
            assert item["modality"] == made["modality"] and item["body_part"] == "abdomen"
            assert item["spacing_mm"] == (3.0, 2.0)
            np.testing.assert_array_equal(item["segmentation"], mini.mask_of(slice_id)[0])
            assert [item["texts"][code]["caption"] for code in ("en", "de")] == list(made["text"])
            assert item["texts"]["en"]["clinical_question"] == "Mass?"
            assert item["texts"]["de"]["clinical_information"] == "Schmerzen."
            assert item["source"] == {
                "dataset": "RefRad2D",
                "group": item["source"]["group"],
                "licence": "private",
            }


def test_mentions_become_spans_with_the_box_of_their_class(source):
    train = make(source)["train"]
    # Two parts of one class: the box around both.
    assert named(train["aaaa11111111"], "en") == [("liver", 5, (2.0, 3.0, 15.0, 12.0))]
    # The sentence begins with a mention, which occurs twice; the spleen is not on the slice.
    left = (19.0, 9.0, 27.0, 21.0)
    item = train["aabb22222222"]
    assert named(item, "en") == [("Left kidney", 3, left), ("left kidney", 3, left)]
    assert named(item, "de") == [("Linke Niere", 3, left)]
    assert "1.2 cm" in item["texts"]["en"]["caption"]


def test_questions_of_both_kinds_and_languages(source):
    item = make(source)["val"]["eeee55555555"]
    assert [(q["language"], q["type"], q["choices"]) for q in own(item)] == [
        ("en", "open", []),
        ("en", "yesno", []),
        ("en", "multiple", ["yes", "no"]),
        ("de", "open", []),
        ("de", "yesno", []),
        ("de", "multiple", ["ja", "nein"]),
    ]
    assert own(item)[0]["answer"] == "MR"  # no full stop is added to an answer


def test_sampled_slices_ask_and_never_claim_what_is_absent(source):
    splits = make(source)
    for kind, split in (("ct", "train"), ("mr", "test")):
        slice_id = mini.SAMPLED[kind]
        item = splits[split][f"{mini.SLICES[slice_id]['scan']}_2_000"]  # in the split of its slice
        slope, intercept = item["rescale"]
        values = mini.stored_pixels(slice_id) * (1 if kind == "ct" else 0.5)
        values += -1024 if kind == "ct" else -50
        np.testing.assert_array_equal(item["image"][..., 0] * slope + intercept, values)
        assert item["texts"] == {} and item["spacing_mm"] == (3.0, 2.0)
        present = set(mini.SLICES[slice_id]["boxes"])
        kinds = set()
        for index, qa in enumerate(item["qa"]):
            found = named(item, qa["language"], f"qa/{index}/answer")
            kinds.add((qa["language"], bool(found), len(found) == len(present)))
            assert qa["type"] == "grounded"
            assert {class_id for _, class_id, _ in found} <= present
            if not found:
                assert qa["answer"].startswith(("No,", "Nein,"))
                name = qa["question"].rpartition(": ")[2].rstrip("?")
                assert name not in {display(c, qa["language"]) for c in present}
        assert {(code, True, True) for code in ("en", "de")} <= kinds
        assert {(code, False, False) for code in ("en", "de")} <= kinds


def test_templates_on_request(source):
    none = make(source, templates="none")
    assert {i for items in none.values() for i in items} == set(mini.SLICES)
    assert all(q["type"] != "grounded" for q in none["train"]["aaaa11111111"]["qa"])
    every = make(source, templates="all")["train"]["aabb22222222"]
    assert any(q["type"] == "grounded" for q in every["qa"])
    again = make(source, templates="all", name="again")["train"]["aabb22222222"]
    assert again["qa"] == every["qa"]  # the same draw each time


def test_the_recipe_can_be_fed(source):
    make(source)
    opened = open_source("refrad2d", "train", source.parent / "data")
    item = opened[opened.row_of("aaaa11111111")]
    target = make_sample(item, "detect", "en", None, OURS).target
    # y first, bins of 512: 3/24, 2/32, 12/24, 15/32 of the slice's own sides.
    box = "<loc0064><loc0032><loc0256><loc0240>"
    assert target == f"The <p bbox={box} id=<seg005>>liver</p> is normal in size."
    for task in ("report", "vqa"):
        assert make_sample(item, task, "de", None, OURS).target
    sampled = opened[opened.row_of("scan1_2_000")]
    assert make_sample(sampled, "detect_vqa", "de", None, OURS).target


def test_each_piece_can_lie_elsewhere(source, tmp_path):
    whole = make(source)
    other = tmp_path / "elsewhere"
    other.mkdir()
    pieces = {
        "dicom_dir": "dicoms_anon",
        "parquet": "refrad2d_vqa_dataset.parquet",
        "segment_dir": "refrad2d_segment",
        "split_dir": "split_v18/generated",
    }
    for flag, piece in pieces.items():
        shutil.move(source / piece, other / flag)
    moved = make(source, name="moved", **{flag: str(other / flag) for flag in pieces})
    assert equal(whole, moved)


def equal(one, two):
    return one.keys() == two.keys() and all(
        one[split].keys() == two[split].keys()
        and all(
            np.array_equal(item[key], two[split][name][key])
            for name, item in one[split].items()
            for key in item
        )
        for split in one
    )


@pytest.mark.parametrize(
    "form", ["absolute", "absolute of another machine", "from its own folder", "{root}"]
)
def test_forms_of_mask_paths(source, form):
    def change(index):
        for entry in index.values():
            path = entry["segment_slice_path"]
            entry["segment_slice_path"] = {
                "absolute": str(source / path),
                "absolute of another machine": f"/mnt/disk7/{path}",
                "from its own folder": path.removeprefix("refrad2d_segment/"),
                "{root}": path,
            }[form]

    for kind in ("ct", "mr"):
        mini.edit_json(mini.index_path(source, kind), change)
    for items in make(source).values():
        for slice_id in items.keys() & mini.SLICES.keys():
            mask = mini.mask_of(slice_id)[0]
            np.testing.assert_array_equal(items[slice_id]["segmentation"], mask)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64", "uint64"])
def test_masks_of_any_numeric_dtype(source, dtype):
    path = mini.mask_path(source, "aaaa11111111")
    mini.save_npy(path, mini.mask_of("aaaa11111111")[0].astype(dtype))
    mask = make(source)["train"]["aaaa11111111"]["segmentation"]
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, mini.mask_of("aaaa11111111")[0])


def test_ids_as_the_index_of_a_data_frame(source):
    """As pandas writes it: a column named in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = make(source)
    for number, name in enumerate(("rsopid", "__index_level_0__")):
        path = source / "refrad2d_vqa_dataset.parquet"
        mini.write_parquet(source, [mini.parquet_row(i) for i in mini.SLICES])
        table = pq.read_table(path)
        table = table.rename_columns([name if c == "rsopid" else c for c in table.column_names])
        stored = {"index_columns": [name], "columns": [], "pandas_version": "2.3.0"}
        schema = table.schema.with_metadata({"pandas": json.dumps(stored)})
        pq.write_table(pa.table(table.columns, schema=schema), path)
        assert equal(whole, make(source, name=f"index{number}"))


def test_parts_on_request(source):
    only = make(source, modalities="mr", languages="de")
    assert {i["modality"] for items in only.values() for i in items.values()} == {"MR"}
    item = only["train"]["dddd44444444"]
    assert set(item["texts"]) == {"de"} == {q["language"] for q in item["qa"]}
    assert {e["language"] for e in item["entities"]} == {"de"}
    published = make(source, clean="published", name="p")["train"]["aabb22222222"]
    assert "1. 2 cm" in published["texts"]["en"]["caption"]
    assert named(published, "en")[0][0] == "Left kidney"
    kept = make(source, hash_groups=False)["train"]["aaaa11111111"]
    assert kept["source"]["group"] == mini.SLICES["aaaa11111111"]["patient"]


def test_a_caption_of_several_slices_gives_a_record_each(source):
    path = mini.split_path(source, "train", "ct")

    def together(splits):
        ids = [slice_id for ids in splits.values() for slice_id in ids]
        splits.clear()
        splits["one"] = [*ids, ids[0]]

    mini.edit_json(path, together)
    assert {"aaaa11111111", "aabb22222222"} <= make(source)["train"].keys()


def test_repairs_are_made_and_counted(source, capsys):
    """MONOCHROME1, RLE, implicit VR, a missing slope, unsigned pixels: the same values."""
    forms = {
        "aaaa11111111": {"photometric": "MONOCHROME1"},
        "aabb22222222": {"syntax": "rle"},
        "cccc33333333": {"syntax": "implicit", "slope": None},
    }
    for slice_id, form in forms.items():
        pixels, patient = mini.stored_pixels(slice_id), mini.SLICES[slice_id]["patient"]
        if "photometric" in form:
            pixels = pixels.min() + pixels.max() - pixels
        mini.write_slice(mini.dicom_path(source, slice_id), pixels, patient=patient, **form)
    high = mini.stored_pixels("eeee55555555").astype(np.uint16) + 40_000
    path = mini.dicom_path(source, "eeee55555555")
    mini.write_slice(path, high, modality="MR", patient="ANON-0004", intercept=0)

    def empty(rows):
        rows[0]["german"]["ReportFragestellungCleaned"] = None
        rows[0]["german"]["dicom_vqa"][0]["answer"] = " "
        rows[1]["english"] = None

    mini.edit_parquet(source, empty)
    splits = make(source)
    for slice_id in forms:
        item = splits[mini.SLICES[slice_id]["split"]][slice_id]
        np.testing.assert_array_equal(item["image"][..., 0], mini.stored_pixels(slice_id))
    item = splits["val"]["eeee55555555"]
    slope, intercept = item["rescale"]
    np.testing.assert_array_equal(item["image"][..., 0] * slope + intercept, high)
    assert item["image"].dtype == np.int16
    first = splits["train"]["aaaa11111111"]
    assert first["texts"]["de"]["clinical_question"] == ""
    assert len(own(first)) == 5
    assert set(splits["train"]["aabb22222222"]["texts"]) == {"de"}
    out = capsys.readouterr().out
    for line in (
        "MONOCHROME1 inverted: 1",
        "missing slope taken as 1: 1",
        "boxes merged: 2",
        "empty field: 3",
        "mention without mask: 1",
        "slices/s with one process",
    ):
        assert line in out, (line, out)


def test_boxes_from_the_mask_where_the_index_has_none(source, capsys):
    def change(index):
        index["aaaa11111111"]["bboxes"] = None
        del index["aabb22222222"]

    mini.edit_json(mini.index_path(source, "ct"), change)
    train = make(source)["train"]
    assert named(train["aaaa11111111"], "en") == [("liver", 5, (2.0, 3.0, 15.0, 12.0))]
    bare = train["aabb22222222"]
    assert bare["entities"] == [] and bare["segmentation"].shape == (0, 0)
    out = capsys.readouterr().out
    assert "boxes taken from the mask: 1" in out and "slice without boxes: 1" in out


def test_workers_change_nothing(source):
    """Byte by byte, read in other processes or in this one."""
    places = []
    for name, workers in (("none", 0), ("two", 2)):
        config = RefRad2DConfig(name=name, workers=workers)
        place = command.build(Builder, config, str(source.parent / "data"), str(source))
        places.append({p.name: p.read_bytes() for p in place.glob("*.array_record*")})
    assert places[0] == places[1] and len(places[0]) == 3


def test_a_built_set_is_recognised_whatever_the_workers(source, capsys):
    argv = ["refrad2d", f"--source={source}", f"--data_dir={source.parent / 'data'}"]
    command.main(argv)
    command.main([*argv, "--workers=1"])
    assert "already built" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main([*argv, "--licence=CC0"])
    assert "other parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, exact",
    [
        (np.array([[-1024.0, 3071.0]]), True),
        (np.array([[-50.0, -49.5, 12.0]]), True),
        (np.array([[0.1, 0.2, 0.7]], np.float32), True),
        (np.array([[7.0, 7.0]]), True),
        (np.array([[7.25, 7.25]]), True),
        (np.array([[40_000.0, 60_001.0]]), True),
        (np.random.default_rng(0).normal(0, 300, (40, 40)).astype(np.float32), False),
    ],
)
def test_values_are_stored_as_exactly_as_can_be(values, exact):
    stored, (slope, intercept), rounded = slices.store(values, None)
    back = stored * slope + intercept
    assert stored.dtype == np.int16 and rounded is not exact
    limit = 1e-5 if exact else (values.max() - values.min()) / 65535
    assert np.abs(back - values).max() <= limit * max(1.0, np.abs(values).max() if exact else 1.0)


def test_headers_are_read_without_the_pixels(source, monkeypatch):
    path = mini.dicom_path(source, "aaaa11111111")
    found = files.belongings(path)
    assert found["patient"] == "ANON-0001" and "image" in found
    path.write_bytes(path.read_bytes()[:40])
    assert files.belongings(path) is None and files.belongings(source / "none") is None


@pytest.mark.parametrize("form", ["long private element", "deflated"])
def test_whose_slice_it_is_stands_anywhere_in_the_header(source, form):
    """A patient who is not found would be in two splits without a word."""
    path = mini.dicom_path(source, "aaaa11111111")
    made = pydicom.dcmread(io.BytesIO(zstandard.decompress(path.read_bytes())))
    if form == "deflated":
        made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        made.PixelData = np.random.default_rng(0).bytes(len(made.PixelData) * 400)
        made.Rows *= 20
        made.Columns *= 20
    else:
        made.private_block(0x0009, "SOMEBODY", create=True).add_new(1, "OB", bytes(200_000))
    out = io.BytesIO()
    pydicom.dcmwrite(out, made)
    path.write_bytes(zstandard.compress(out.getvalue()))
    assert files.belongings(path)["patient"] == "ANON-0001"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"modalities": "ct,pet"}, "--modalities: 'pet'"),
        ({"languages": "en,en"}, "--languages=en,en"),
        ({"templates": "many"}, "--templates=many"),
        ({"leaks": "allow"}, "--leaks=allow"),
        ({"workers": -1}, "--workers=-1"),
        ({"licence": " "}, "--licence"),
        ({"beam_options": "--runner=x"}, "--beam_options"),
    ],
)
def test_wrong_parameters_are_refused_by_flag(values, words):
    with pytest.raises(UserError, match=words):
        RefRad2DConfig(**values)


def test_without_its_packages_the_extra_is_named(source, monkeypatch):
    for package in ("pyarrow", "zstandard"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            patch.setitem(sys.modules, f"{package}.parquet", None)
            with pytest.raises(UserError, match=rf"{package}.*-e ..\[data\]"):
                make(source, skip_bad=True)
