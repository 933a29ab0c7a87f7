"""slake: a made-up folder in SLAKE's layout through the builder, and every way it can be wrong."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rg_jax.data import record
from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import display, id_of
from tfds_builders.__main__ import build, make_builder
from tfds_builders.check import page
from tfds_builders.check.command import check
from tfds_builders.slake.labels import LABELS, ZONES, label_of, surely_absent, zone_of
from tfds_builders.slake.slake_dataset_builder import Builder, SlakeConfig


def make(slake, tmp_path, **values):
    """Build and read back: {split: {id: record}}."""
    place = build(Builder, SlakeConfig(**values), str(tmp_path / "data"), str(slake.write()))
    builder = tfds.builder_from_directory(place)
    return {
        split: {
            item["id"]: item for item in map(record.decode, builder.as_data_source(split=split))
        }
        for split in builder.info.splits
    }


def own(item):
    """SLAKE's own questions of a record, without the templates."""
    return [row for row in item["qa"] if row["type"] != "grounded"]


def named(item, index):
    """(text, class id, box) of the entities in an answer."""
    field = f"qa/{index}/answer"
    return [
        (item["qa"][index]["answer"][e["start"] : e["end"]], e["class_id"], e["box"])
        for e in item["entities"]
        if e["field"] == field
    ]


def test_official_splits_and_one_record_per_image(slake, tmp_path):
    splits = make(slake, tmp_path)
    assert {split: set(items) for split, items in splits.items()} == {
        "train": {"slake-xmlab1", "slake-xmlab2"},
        "val": {"slake-xmlab3"},
        "test": {"slake-xmlab4"},
    }
    first = splits["train"]["slake-xmlab1"]
    assert [row["question"] for row in own(first)] == [
        "What is on the right?",
        "What is bright?",
        "Disease?",
    ]
    assert [row["type"] for row in own(first)] == ["open", "open", "closed"]
    assert {row["language"] for row in first["qa"]} == {"en"}
    assert first["image"].shape == (40, 48, 3) and first["image"].dtype == np.uint8
    assert first["source"] == {
        "dataset": "SLAKE 1.0",
        "group": "xmlab1",
        "licence": "CC BY-SA 4.0",
    }
    assert first["texts"] == {} and first["rescale"] == (1.0, 0.0)
    assert [
        splits[s][i]["modality"] for s, i in (("train", "slake-xmlab2"), ("test", "slake-xmlab4"))
    ] == ["MR", "XR"]
    assert splits["val"]["slake-xmlab3"]["body_part"] == "brain tissue"


def test_answers_carry_the_box_around_all_boxes_of_a_label(slake, tmp_path):
    item = make(slake, tmp_path)["train"]["slake-xmlab1"]
    kidney, liver = (30.0, 20.0, 38.0, 29.0), (4.0, 5.0, 26.0, 17.0)
    assert named(item, 0) == [("Left Kidney", 3, kidney)]
    # Case and order of the side are free; the spleen has no box here.
    assert named(item, 1) == [("liver", 5, liver), ("kidney left", 3, kidney)]
    # A liver cancer without a box is not the liver.
    assert named(item, 2) == []


def test_masks_become_class_ids(slake, tmp_path):
    splits = make(slake, tmp_path)
    first = splits["train"]["slake-xmlab1"]["segmentation"]
    assert set(np.unique(first)) == {0, 3, 5}
    assert (first[20:29, 30:38] == 3).all() and (first == 3).sum() == 72
    second = splits["train"]["slake-xmlab2"]["segmentation"]  # the value stands in red alone
    assert second.shape == (64, 32) and (second[2:11, 2:11] == 2).all()
    assert splits["val"]["slake-xmlab3"]["segmentation"].max() == 0


def test_templates_ask_for_what_is_marked_and_for_what_cannot_be_there(slake, tmp_path):
    splits = make(slake, tmp_path, templates="en,de")
    for items in splits.values():
        for item in items.values():
            zone = zone_of(item["body_part"])
            for index, row in enumerate(item["qa"]):
                if row["type"] != "grounded":
                    continue
                entities = named(item, index)
                if row["answer"].startswith(("No,", "Nein,")):
                    assert not entities
                    name = row["question"].rpartition(": ")[2].rstrip("?")
                    label = next(
                        lb for lb in LABELS.values() if lb.display(row["language"]) == name
                    )
                    assert surely_absent(label, zone)
                else:
                    assert entities
            languages = {row["language"] for row in item["qa"] if row["type"] == "grounded"}
            assert languages == {"en", "de"}
    xray = splits["test"]["slake-xmlab4"]
    which = [
        named(xray, i)
        for i, row in enumerate(xray["qa"])
        if row["type"] == "grounded" and row["language"] == "de" and len(named(xray, i)) > 1
    ]
    # A label without a class of ours keeps its box, with class 0.
    whole = (0.0, 0.0, 48.0, 40.0)
    assert which == [[("Leber", 5, (1.0, 1.0, 21.0, 21.0)), ("Pneumonie", 0, whole)]]


def test_no_templates_on_request_and_the_same_ones_each_time(slake, tmp_path):
    none = make(slake, tmp_path, templates="none")
    assert all(row["type"] != "grounded" for row in none["train"]["slake-xmlab1"]["qa"])
    assert named(none["train"]["slake-xmlab1"], 0)  # own answers are tagged all the same
    first = make(slake, tmp_path)
    slake.questions["train"].reverse()
    again = make(slake, tmp_path / "again")
    templates = [
        [row for row in run["train"]["slake-xmlab2"]["qa"] if row["type"] == "grounded"]
        for run in (first, again)
    ]
    assert templates[0] == templates[1] != []


def test_what_is_only_in_the_mask_is_not_called_absent():
    """A label in the mask without a box counts as there: the builder must not deny it."""
    brain = [label for label in LABELS.values() if surely_absent(label, "head")]
    assert LABELS["Liver"] in brain and LABELS["Tooth"] not in brain


def test_denial_spares_labels_of_the_mask(slake, tmp_path):
    slake.image("xmlab5", [("Liver", 3, 3, 9, 9)])
    slake.boxes("xmlab5", [])
    slake.ask("train", "xmlab5", location="Brain")
    item = make(slake, tmp_path)["train"]["slake-xmlab5"]
    # The draw picks one of many candidates; what counts is that the liver is none of them.
    assert not any("liver" in row["answer"] for row in item["qa"] if row["type"] == "grounded")
    from tfds_builders.slake import slake_dataset_builder as module

    kept = module.LABELS
    module.LABELS = {"Liver": LABELS["Liver"], "Spleen": LABELS["Spleen"]}
    try:
        item = make(slake, tmp_path / "b")["train"]["slake-xmlab5"]
    finally:
        module.LABELS = kept
    answers = [row["answer"] for row in item["qa"] if row["type"] == "grounded"]
    assert len(answers) == 1 and "spleen" in answers[0]


def test_the_table():
    """44 labels and more; class ids as the schema has them; German names; zones in order."""
    assert LABELS["Bladder"].class_id == id_of("urinary_bladder")
    assert LABELS["Left Lung"].class_id == 118 and LABELS["Right Lung"].class_id == 119
    assert LABELS["Left Kidney"].class_id == 3
    for name in ("Pneumonia", "Left Eye", "Brain Edema", "Left Femoral Head", "Lung Cancer"):
        assert LABELS[name].class_id == 0
    assert label_of("Right Parotid2").name == "Right Parotid"
    unknown = label_of("Left  Thing")
    assert unknown.class_id == 0 and "thing left" in unknown.mention_forms()
    german = [label.display("de") for label in LABELS.values()]
    assert len(set(german)) == len(german) >= 44
    assert LABELS["Left Lung"].display("de") == display(118, "de")
    for label in LABELS.values():
        if label.zones:
            assert ZONES.index(label.zones[0]) <= ZONES.index(label.zones[1])


@pytest.mark.parametrize(
    "location, zone",
    [
        ("Brain_Tissue", "head"),
        ("Chest_lung", "chest"),
        ("Lung", "chest"),
        ("Pelvic Cavity", "pelvis"),
        ("Knee", ""),
        ("", ""),
    ],
)
def test_zones(location, zone):
    assert zone_of(location) == zone


def test_unmarked_neighbours_are_never_called_absent():
    """SLAKE marks a part of what is there: only what cannot be in the picture is denied."""
    assert not surely_absent(LABELS["Spleen"], "abdomen")
    assert not surely_absent(LABELS["Liver"], "chest")
    assert not surely_absent(LABELS["Pneumonia"], "abdomen")
    assert not surely_absent(label_of("Never heard of"), "head")
    assert not surely_absent(LABELS["Liver"], "")
    assert surely_absent(LABELS["Liver"], "head") and surely_absent(LABELS["Left Eye"], "abdomen")


def test_leaking_languages_are_refused_and_named(slake, tmp_path):
    slake.ask("test", "xmlab1", "什么?", "左", q_lang="zh")
    slake.ask("validate", "xmlab2", "什么?", "右", q_lang="zh")
    make(slake, tmp_path)  # English alone does not leak
    with pytest.raises(UserError) as caught:
        make(slake, tmp_path, languages="en,zh")
    text = str(caught.value)
    assert "image xmlab1 is in train and in test; image xmlab2 is in train and in val" in text
    assert "--split_by=image" in text and "--leaks=move" in text and "test.json" in text


def test_leaks_can_be_moved_to_train(slake, tmp_path, capsys):
    slake.ask("test", "xmlab1", "什么?", "左", q_lang="zh")
    splits = make(slake, tmp_path, languages="en,zh", leaks="move")
    assert set(splits["test"]) == {"slake-xmlab4"}
    questions = own(splits["train"]["slake-xmlab1"])
    assert [row["language"] for row in questions] == ["en", "en", "en", "zh", "zh"]
    out = capsys.readouterr().out
    assert "questions moved from test to train: 1" in out
    assert "moved to train, since it was in several splits: image xmlab1" in out


def test_leaks_can_be_allowed(slake, tmp_path, capsys):
    """One image, two records of different names; the summary says what that costs."""
    slake.ask("test", "xmlab1", "什么?", "左", q_lang="zh")
    splits = make(slake, tmp_path, languages="en,zh", leaks="allow")
    assert set(splits["test"]) == {"slake-xmlab4", "slake-xmlab1-test"}
    assert "slake-xmlab1" in splits["train"]
    assert "the splits share data (image xmlab1" in capsys.readouterr().out


def test_one_picture_under_two_names_is_a_leak(slake, tmp_path):
    slake.image("xmlab5", [])
    source = slake.folder("xmlab1") / "source.jpg"
    (slake.folder("xmlab5") / "source.jpg").write_bytes(source.read_bytes())
    slake.ask("test", "xmlab5")
    with pytest.raises(UserError, match=r"is in train \(xmlab1\) and in test \(xmlab5\)"):
        make(slake, tmp_path)


def test_a_damaged_question_is_refused_or_left_out(slake, tmp_path, capsys):
    slake.ask("train", "xmlab1", "Odd?", answer_type="MAYBE")
    with pytest.raises(UserError, match="train.json: question 5: answer_type 'MAYBE'"):
        make(slake, tmp_path)
    splits = make(slake, tmp_path, skip_bad=True)
    assert len(own(splits["train"]["slake-xmlab1"])) == 3
    assert "left out: unknown question type: 1" in capsys.readouterr().out


def test_split_by_image_shares_no_image_and_does_not_depend_on_order(slake, tmp_path):
    for i in range(5, 21):
        slake.image(f"xmlab{i}", [])
        slake.ask("train" if i % 3 else "test", f"xmlab{i}")
    slake.ask("test", "xmlab1", "什么?", "左", q_lang="zh")
    values = {"split_by": "image", "languages": "en,zh"}
    first = make(slake, tmp_path, **values)
    assert {split: len(items) for split, items in first.items()} == {
        "train": 14,
        "val": 3,
        "test": 3,
    }
    ids = [name for items in first.values() for name in items]
    assert len(ids) == len(set(ids)) == 20
    where = next(split for split, items in first.items() if "slake-xmlab1" in items)
    assert len(own(first[where]["slake-xmlab1"])) == 5
    for rows in slake.questions.values():
        rows.reverse()
    again = make(slake, tmp_path / "again", **values)
    assert {s: set(i) for s, i in again.items()} == {s: set(i) for s, i in first.items()}


def test_summary_counts_what_was_done(slake, tmp_path, capsys):
    slake.ask("train", "xmlab1", "Empty?", "")
    slake.boxes("xmlab2", [{"Right Kidney": [-0.5, 2.0, 11.0, 9.0]}, {"Odd Thing": [1, 1, 4, 4]}])
    make(slake, tmp_path)
    out = capsys.readouterr().out
    for line in (
        "records: train 2, val 1, test 1",
        "questions without text or answer in train.json (en), left out: 1",
        "questions in other languages, left out: 1",
        "images: 4",
        "images without boxes: 1",
        "questions: 6",
        "answers with a box: 3",
        "mentions in answers without a box: 2",
        "boxes read: 7",
        "boxes clipped by up to a pixel: 1",
        "boxes merged into the box around all of one label: 2",
        "labels with mask and box: 4",
        "of these with an overlap (IoU) under 0.5: 0",
        "label 'Odd Thing' is not in the table",
    ):
        assert line in out, (line, out)


def test_a_label_whose_mask_and_box_lie_apart_gets_no_place(slake, tmp_path, capsys):
    slake.boxes("xmlab1", [{"Liver": [40, 30, 6, 6]}, {"Left Kidney": [30, 20, 8, 9]}])
    first = make(slake, tmp_path)["train"]["slake-xmlab1"]
    assert set(np.unique(first["segmentation"])) == {0, 3}
    assert {e["class_id"] for e in first["entities"]} == {3}
    # Nor is it said to be absent: it is somewhere.
    assert not any("liver" in q["question"].lower() for q in first["qa"] if q["type"] == "grounded")
    out = capsys.readouterr().out
    report = check(
        make_builder(Builder, SlakeConfig(), str(tmp_path / "none")), slake.write(), tmp_path
    )
    assert "imgs/xmlab1: mask and box of 'Liver' lie apart, neither is used" in report.notes
    assert "of these without a place, since mask and box lie apart (IoU under 0.1): 1" in out
    assert "mask and box of 'Liver' lie apart" in out


def test_a_blank_picture_is_refused_or_left_out(slake, tmp_path, capsys):
    """What the data check fails is not built."""
    Image.new("RGB", (48, 40), (7, 7, 7)).save(slake.folder("xmlab2") / "source.jpg")
    slake.mask("xmlab2", np.zeros((40, 48), np.uint8), "L")
    slake.boxes("xmlab2", [])
    with pytest.raises(UserError, match="every pixel is 7.*--skip_bad"):
        make(slake, tmp_path)
    assert set(make(slake, tmp_path, skip_bad=True)["train"]) == {"slake-xmlab1"}
    assert "left out: blank image: 1" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[", '{"a": 1}'])
def test_a_damaged_split_file_is_told_and_the_check_goes_on(slake, tmp_path, content):
    source = slake.write()
    (source / "train.json").write_text(content)
    builder = make_builder(Builder, SlakeConfig(), str(tmp_path / "none"))
    report = check(builder, source, tmp_path)
    lines = (tmp_path / page.PROBLEMS).read_text().splitlines()
    told = {p["file"]: p["kind"] for p in map(json.loads, lines) if p["harmful"]}
    assert told["train.json"] == "unreadable file" and report.complete
    assert report.statistics.records["val"] == report.statistics.records["test"] == 1


def test_a_source_without_train_is_for_evaluation_alone(slake, tmp_path):
    slake.questions["train"] = []
    with pytest.raises(UserError, match="no train split, only val, test.*--without_train"):
        make(slake, tmp_path)
    assert set(make(slake, tmp_path, without_train=True)) == {"val", "test"}
    for without_train, problems in ((False, 1), (True, 0)):
        config = SlakeConfig(without_train=without_train)
        builder = make_builder(Builder, config, str(tmp_path / "none"))
        assert check(builder, slake.write(), tmp_path).harmful == problems


def test_a_mask_value_out_of_the_table_is_left_out_and_told(slake, tmp_path, capsys):
    values = np.zeros((40, 48), np.uint8)
    values[3:6, 3:6], values[10:13, 10:13] = 99, 70
    slake.mask("xmlab3", values, "RGBA")
    segmentation = make(slake, tmp_path)["val"]["slake-xmlab3"]["segmentation"]
    assert set(np.unique(segmentation)) == {0, 5}
    out = capsys.readouterr().out
    assert "mask values that mask.txt does not know, left out: 1" in out and "value 99" in out
    assert "labels in a mask without a box: 1" in out


def test_languages_without_questions_are_refused(slake, tmp_path):
    slake.questions["train"] = [r for r in slake.questions["train"] if r["q_lang"] == "en"]
    with pytest.raises(UserError, match="no question in the languages zh"):
        make(slake, tmp_path, languages="zh")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"split_by": "patient"}, "--split_by=patient"),
        ({"languages": "en,fr"}, "--languages: 'fr'"),
        ({"templates": "zh"}, "--templates: 'zh'"),
        ({"templates": "en,none"}, "none goes with no language"),
        ({"leaks": "ignore"}, "--leaks=ignore"),
    ],
)
def test_wrong_parameters_are_refused_by_flag(values, words):
    with pytest.raises(UserError, match=words):
        SlakeConfig(**values)


def test_names():
    assert SlakeConfig().name == "official-en"
    assert SlakeConfig(split_by="image", languages="en,zh").name == "image-en_zh"
    assert SlakeConfig(templates="en,de").name == "official-en-templates_en_de"


def test_written_text_is_utf8(slake, tmp_path):
    splits = make(slake, tmp_path, languages="zh")
    assert own(splits["train"]["slake-xmlab1"])[0]["answer"] == "左边"
    assert json.loads((slake.root / "train.json").read_text())[3]["q_lang"] == "zh"
