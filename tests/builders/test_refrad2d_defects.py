"""refrad2d: each planted defect is refused by the name of its file, or left out and counted."""

import shutil

import mini_refrad2d as mini
import numpy as np
import pytest
import tensorflow_datasets as tfds

from rg_jax.errors import UserError
from tfds_builders.__main__ import build
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig

ID = "aaaa11111111"
DICOM = f"dicoms_anon/aa/{ID}.dcm.zst"
MASK = f"refrad2d_segment/segmented_slices_v3/aa/{ID}.npy"
INDEX = f"rsopid_2_segment_v3_ct.json: {ID}"
PARQUET = f"refrad2d_vqa_dataset.parquet: {ID}"


def slice_with(**tags):
    return lambda root: mini.write_slice(
        mini.dicom_path(root, ID), mini.stored_pixels(ID), patient="ANON-0001", **tags
    )


def mask(array):
    return lambda root: mini.save_npy(mini.mask_path(root, ID), array)


def entry(**fields):
    def change(root):
        mini.edit_json(mini.index_path(root, "ct"), lambda index: index[ID].update(fields))

    return change


def row(change):
    return lambda root: mini.edit_parquet(root, lambda rows: change(rows[0]))


def cut(path_of, size):
    def change(root):
        path = path_of(root, ID)
        path.write_bytes(path.read_bytes()[:size])

    return change


def text(field, value, struct="english"):
    return row(lambda found: found[struct].update({field: value}))


def plain_array():
    return mini.mask_of(ID)[0].astype(np.float32)


def with_value(value):
    array = plain_array()
    array[0, 0] = value
    return array


# name: (what is done to the source, kind, file and words that the message holds)
HARMFUL = {
    "no dicom": (lambda root: mini.dicom_path(root, ID).unlink(), "missing file", DICOM),
    "dicom cut off": (cut(mini.dicom_path, 300), "unreadable file", DICOM),
    "dicom no dicom": (
        lambda root: mini.dicom_path(root, ID).write_text("x" * 400),
        "unreadable file",
        DICOM,
    ),
    "ct without intercept": (slice_with(intercept=None), "no rescale intercept", DICOM),
    "other modality": (slice_with(modality="CR"), "unsupported modality", DICOM),
    "mr among ct": (slice_with(modality="MR"), "wrong modality", DICOM),
    "no mask": (lambda root: mini.mask_path(root, ID).unlink(), "missing file", MASK),
    "mask cut off": (cut(mini.mask_path, 200), "unreadable file", MASK),
    "mask of another shape": (
        mask(np.zeros((24, 31), np.uint8)),
        "mask of another shape",
        MASK,
    ),
    "mask of texts": (mask(np.full((24, 32), "a")), "unreadable file", MASK),
    "mask with class 122": (mask(with_value(122)), "unknown class", MASK),
    "mask with class -1": (mask(with_value(-1)), "unknown class", MASK),
    "mask with half a class": (mask(with_value(2.5)), "unknown class", MASK),
    "mask with no number": (mask(with_value(np.nan)), "unknown class", MASK),
    "box of class 300": (entry(bboxes=[[1, 1, 5, 5, 300]]), "unknown class", INDEX),
    "box outside": (entry(bboxes=[[1, 1, 33, 5, 5]]), "box outside the image", INDEX),
    "box swapped": (entry(bboxes=[[9, 1, 3, 5, 5]]), "box outside the image", INDEX),
    "box of four": (entry(bboxes=[[1, 1, 3, 5]]), "unreadable file", INDEX),
    "boxes no list": (entry(bboxes=5), "unreadable entry", INDEX),
    "box of no class": (entry(bboxes=[[1, 1, 3, 5, float("nan")]]), "unreadable entry", INDEX),
    "keywords no list": (entry(keywords_eng=5), "unreadable entry", INDEX),
    "mention of no class": (
        entry(keywords_eng=[["liver", "leber", 5]]),
        "unknown class",
        INDEX,
    ),
    "mention of another id": (
        entry(keywords_de=[["Leber", "liver", 6]]),
        "unknown class",
        "class liver has id 5, not 6",
    ),
    "no row": (
        lambda root: mini.edit_parquet(root, lambda rows: rows.pop(0)),
        "missing file",
        f"has no row of slice {ID}",
    ),
    "row of another modality": (
        row(lambda found: found.update(modality="MR")),
        "wrong modality",
        PARQUET,
    ),
    "lost letters": (text("CleanedSentence", "The l\ufffdver."), "encoding damage", PARQUET),
    "wrong letters": (
        text("ReportFragestellungCleaned", "Tumor für groÃŸ?", "german"),
        "encoding damage",
        PARQUET,
    ),
    "leftover of HTML": (
        text("CleanedSentence", "Keine L&auml;sion der Leber.", "german"),
        "encoding damage",
        PARQUET,
    ),
    "question of no type": (
        row(lambda found: found["english"]["dicom_vqa"][0].update(question_type="essay")),
        "unknown question type",
        PARQUET,
    ),
    "rows that differ": (
        lambda root: mini.edit_parquet(
            root, lambda rows: rows.append({**rows[0], "body_part": "leg"})
        ),
        "duplicate id",
        "refrad2d_vqa_dataset.parquet",
    ),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "source"
    mini.write_mini(folder)
    return folder


def check(source):
    """What a data check sees: every problem, and the ids that are left."""
    builder = Builder(data_dir="/nonexistent", config=RefRad2DConfig(templates="none"))
    builder.problems = []
    ids = {item["id"] for items in builder.splits(source).values() for item in items}
    return builder.problems, ids


@pytest.mark.parametrize("case", HARMFUL)
def test_a_defect_is_found_with_its_file_and_its_record_dropped(pristine, tmp_path, case):
    damage, kind, words = HARMFUL[case]
    source = tmp_path / "source"
    shutil.copytree(pristine, source)
    damage(source)
    problems, ids = check(source)
    harmful = [problem for problem in problems if problem.harmful]
    assert [problem.kind for problem in harmful] == [kind]
    assert words in str(harmful[0]) and "\n" not in str(harmful[0])
    assert ids == set(mini.SLICES) - {ID}


@pytest.mark.parametrize("case", ["ct without intercept", "box outside", "no row"])
def test_a_build_refuses_or_leaves_out(pristine, tmp_path, case, capsys):
    damage, kind, words = HARMFUL[case]
    source, data_dir = tmp_path / "source", tmp_path / "data"
    shutil.copytree(pristine, source)
    damage(source)
    with pytest.raises(UserError) as caught:
        build(Builder, RefRad2DConfig(templates="none"), str(data_dir), str(source))
    assert words in str(caught.value) and "--skip_bad" in str(caught.value)
    assert not list(data_dir.rglob("dataset_info.json"))
    config = RefRad2DConfig(templates="none", skip_bad=True)
    place = build(Builder, config, str(data_dir), str(source))
    infos = tfds.builder_from_directory(place).info.splits
    assert sum(info.num_examples for info in infos.values()) == len(mini.SLICES) - 1
    assert f"left out: {kind}: 1" in capsys.readouterr().out


HARMLESS = {
    "mention not in its text": (
        entry(keywords_eng=[["liver", "liver", 5], ["gall bladder", "gallbladder", 4]]),
        "mention not in its text",
        f"{ID}: keywords_eng/1",
    ),
    "identifying tags": (
        slice_with(PatientName="Doe^Jane", PatientBirthDate="19710512"),
        "identifying tags",
        "PatientBirthDate",
    ),
    "box unlike its mask": (
        entry(bboxes=[[2, 3, 14, 12, 5], [20, 10, 28, 20, 3]]),
        "box unlike its mask",
        "class 5",
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_does_no_harm_is_told_and_built(pristine, tmp_path, case):
    damage, kind, words = HARMLESS[case]
    source = tmp_path / "source"
    shutil.copytree(pristine, source)
    damage(source)
    problems, ids = check(source)
    assert ids == set(mini.SLICES) and not any(problem.harmful for problem in problems)
    found = [problem for problem in problems if problem.kind == kind]
    assert len(found) == 1 and words in str(found[0])
    # Words of a report do not leave the data.
    assert "gall bladder" not in str(problems) and "Jane" not in str(problems)


def test_a_build_counts_every_doubt_of_the_check(pristine, tmp_path, capsys):
    """What the check lists without refusing it is counted in the summary of the build."""
    source = tmp_path / "source"
    shutil.copytree(pristine, source)
    slice_with(RescaleIntercept=4000, spacing=None)(source)
    text("CleanedSentence", "The liver of Mrs. Smith.")(source)
    build(Builder, RefRad2DConfig(templates="none"), str(tmp_path / "data"), str(source))
    out = capsys.readouterr().out
    assert "implausible CT values: 1" in out and "bad spacing: 1" in out
    assert "perhaps a name in a text: 1" in out
    assert "Smith" not in out


WRONG = {
    "no parquet": (
        lambda root: (root / "refrad2d_vqa_dataset.parquet").unlink(),
        "--parquet names another",
    ),
    "parquet no parquet": (
        lambda root: (root / "refrad2d_vqa_dataset.parquet").write_text("x"),
        "not readable as parquet",
    ),
    "no index": (lambda root: mini.index_path(root, "ct").unlink(), "v3_ct.json: no such file"),
    "index no json": (lambda root: mini.index_path(root, "mr").write_text("{"), "as JSON"),
    "index a list": (lambda root: mini.index_path(root, "mr").write_text("[]"), "not a dict"),
    "no ct splits": (
        lambda root: shutil.rmtree(mini.split_path(root, "train", "ct").parent),
        "--modalities leaves ct out",
    ),
    "splits of texts": (
        lambda root: mini.write_json(mini.split_path(root, "val", "ct"), {"a": "b"}),
        "does not hold a list",
    ),
    "ids that leave the folder": (
        lambda root: mini.write_json(mini.split_path(root, "val", "ct"), {"a": ["../../x"]}),
        "does not hold a list",
    ),
    "no dicoms": (lambda root: shutil.rmtree(root / "dicoms_anon"), "--dicom_dir names another"),
    "no german": (
        lambda root: mini.edit_parquet(root, lambda rows: [r.pop("german") for r in rows]),
        "has no column german",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_source_that_is_none_is_refused(pristine, tmp_path, case):
    damage, words = WRONG[case]
    source = tmp_path / "source"
    shutil.copytree(pristine, source)
    damage(source)
    with pytest.raises(UserError) as caught:
        build(Builder, RefRad2DConfig(), str(tmp_path / "data"), str(source))
    assert words in str(caught.value), caught.value
