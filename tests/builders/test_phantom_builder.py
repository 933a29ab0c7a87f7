"""phantom: texts that follow from the picture, disjoint splits, parameters, the built data set."""

import hashlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rg_jax.data import record
from rg_jax.errors import UserError
from rg_jax.grounding.boxes import boxes_of_mask
from tfds_builders.__main__ import build
from tfds_builders.phantom import texts
from tfds_builders.phantom.drawing import KINDS, read_slice
from tfds_builders.phantom.phantom_dataset_builder import Builder, PhantomConfig, make_record

CONFIG = PhantomConfig(train=24, val=6, test=8)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small phantom on disk: (folder, {split: decoded records})."""
    place = build(Builder, CONFIG, str(tmp_path_factory.mktemp("data")))
    builder = tfds.builder_from_directory(place)
    return place, {
        split: [record.decode(example) for example in builder.as_data_source(split=split)]
        for split in builder.info.splits
    }


@pytest.fixture(scope="module")
def many():
    return [make_record(PhantomConfig(), "train", i) for i in range(150)]


def test_built_splits_hold_what_was_asked_for(built):
    place, splits = built
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 24,
        "val": 6,
        "test": 8,
    }
    for split, records in splits.items():
        by_id = {item["id"]: item for item in records}
        for index in range(len(records)):
            made = make_record(CONFIG, split, index)
            item = by_id[made["id"]]
            np.testing.assert_array_equal(item["image"], made["image"])
            np.testing.assert_array_equal(item["segmentation"], made["segmentation"])
            for field in ("texts", "qa", "entities", "rescale", "spacing_mm", "source"):
                assert item[field] == made[field], field
    assert place.name == "1.0.0" and place.parent.name == CONFIG.name


def test_splits_share_no_picture():
    """Contents, not ids: of the full splits' first slices no two are the same."""
    config = PhantomConfig()
    seen = {}
    for split in ("train", "val", "test"):
        for index in range(60):
            item = make_record(config, split, index)
            digest = hashlib.sha256(item["image"].tobytes()).hexdigest()
            assert digest not in seen, (split, index, seen[digest])
            seen[digest] = (split, index)
            mask = hashlib.sha256(item["segmentation"].tobytes() + b"mask").hexdigest()
            assert not item["entities"] or mask not in seen
            seen[mask] = (split, index)


def test_a_perfect_reader_says_the_caption(many):
    """From the segmentation and the modality alone: the same text, mentions, classes and boxes."""
    for item in many:
        organs = read_slice(item["segmentation"])
        for language in ("en", "de"):
            text, spans = texts.caption(organs, item["modality"], language)
            assert text == item["texts"][language]["caption"]
            written = [
                (e["start"], e["end"], e["class_id"], e["box"])
                for e in item["entities"]
                if (e["language"], e["field"]) == (language, "caption")
            ]
            assert written == [(a, b, organ.class_id, organ.box) for a, b, organ in spans]


def test_entities_name_their_class_and_have_the_box_of_the_mask(many):
    for item in many:
        record.encode(item)
        boxes = boxes_of_mask(item["segmentation"])
        for entity in item["entities"]:
            text = record.text_of(item, entity["language"], entity["field"])
            name = texts.name_of(
                next(n for n, kind in KINDS.items() if kind.class_id == entity["class_id"]),
                entity["language"],
            )
            assert text[entity["start"] : entity["end"]] == name
            assert entity["box"] == boxes[entity["class_id"]]
        for language in ("en", "de"):
            captioned = {
                e["class_id"]
                for e in item["entities"]
                if (e["language"], e["field"]) == (language, "caption")
            }
            assert captioned == set(boxes)  # every visible organ is mentioned


def test_answers_are_true(many):
    kinds = set()
    for item in many:
        organs = {organ.name: organ for organ in read_slice(item["segmentation"])}
        for index, row in enumerate(item["qa"]):
            language, question, answer = row["language"], row["question"], row["answer"]
            words = texts._WORDS[language]

            def asked(question=question, language=language):
                names = [n for n in KINDS if f" {texts.name_of(n, language)}" in question]
                assert len(names) == 1, question
                return names[0]

            def is_about(kind, question=question, words=words):
                return question.split(" ")[0:3] == words[kind].split(" ")[0:3]

            entities = [e for e in item["entities"] if e["field"] == f"qa/{index}/answer"]
            if row["type"] == "grounded":
                kinds.add("grounded")
                absent = answer.startswith((words["no"] + ",",))
                named = [n for n in KINDS if texts.name_of(n, language) in answer]
                assert all((n in organs) != absent for n in named), (answer, list(organs))
                assert len(entities) == (0 if absent else len(named))
                if not answer.startswith((words["yes"] + ",", words["no"] + ",")):
                    kinds.add("which")
                    assert set(named) == set(organs)
                continue
            assert not entities
            if row["type"] == "yesno":
                assert (answer == words["yes"]) == (asked() in organs)
            elif row["type"] == "multiple":
                visible = [
                    c
                    for c in row["choices"]
                    if any(texts.name_of(n, language).lower() == c.lower() for n in organs)
                ]
                assert visible == [answer] and len(row["choices"]) == 4
            elif question == words["count"]:
                assert answer == str(len(organs))
            elif question == words["modality"]:
                assert answer == item["modality"]
            elif question == words["largest"]:
                areas = sorted(((o.area, n) for n, o in organs.items()), reverse=True)
                assert texts.name_of(areas[0][1], language).lower() == answer.lower()
                assert areas[0][0] >= texts.LARGEST_MARGIN * areas[1][0]
            else:
                assert row["type"] == "closed"
                organ = organs[asked()]
                centre = (organ.box[0] + organ.box[2]) / 2
                # Radiological convention: the patient's right is at the image's left.
                assert answer == words["right" if centre < 32 else "left"]
            kinds.add(row["type"])
    assert kinds == {"open", "yesno", "multiple", "closed", "grounded", "which"}


def test_both_languages_ask_the_same(many):
    for item in many:
        rows = {lang: [r for r in item["qa"] if r["language"] == lang] for lang in ("en", "de")}
        assert [r["type"] for r in rows["en"]] == [r["type"] for r in rows["de"]]
        for en, de in zip(rows["en"], rows["de"], strict=True):
            if en["type"] == "yesno":
                assert (en["answer"], de["answer"]) in {("Yes", "Ja"), ("No", "Nein")}


def test_yes_and_no_are_about_equally_frequent(many):
    answers = [r["answer"] for item in many for r in item["qa"] if r["type"] == "yesno"]
    assert 0.4 < sum(a in ("Yes", "Ja") for a in answers) / len(answers) < 0.6


def test_german_adjectives_agree():
    import dataclasses

    organs = read_slice(np.full((64, 64), KINDS["stomach"].class_id, np.uint8))
    liver = dataclasses.replace(organs[0], name="liver", class_id=5, size="small")
    text, spans = texts.caption([liver, *organs], "MR", "de")
    assert text == "MR-Schicht: kleine Leber, großer Magen."
    assert [text[a:b] for a, b, _ in spans] == ["Leber", "Magen"]
    assert texts.caption([], "CT", "en") == ("CT slice without organs.", [])


def test_a_larger_build_begins_with_the_smaller_one():
    small, large = PhantomConfig(train=3), PhantomConfig(train=9000)
    np.testing.assert_array_equal(
        make_record(small, "train", 2)["image"], make_record(large, "train", 2)["image"]
    )


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_one_modality_only(modality):
    config = PhantomConfig(modality=modality, image_size=48)
    items = [make_record(config, "val", i) for i in range(6)]
    assert {item["modality"] for item in items} == {modality.upper()}
    assert items[0]["image"].shape == (48, 48, 1)


def test_names_keep_variants_apart():
    assert PhantomConfig().name == "64"
    assert PhantomConfig(modality="ct").name == "ct64"
    assert PhantomConfig(modality="mr", image_size=128, seed=1).name == "mr128-seed_1"
    assert PhantomConfig(train=10).name != PhantomConfig(train=11).name
    organs = PhantomConfig(organs="aorta,liver")
    assert organs.organ_names() == ("liver", "aorta")
    assert {item.name for item in Builder.BUILDER_CONFIGS} == {"64", "ct64", "mr64"}


@pytest.mark.parametrize(
    "values, words",
    [
        ({"image_size": 16}, "--image_size=16"),
        ({"image_size": 1024}, "--image_size=1024"),
        ({"modality": "pet"}, "--modality=pet"),
        ({"train": -1}, "--train"),
        ({"train": 0, "val": 0, "test": 0}, "--train"),
        ({"seed": -1}, "--seed=-1"),
        ({"organs": "liver,heart"}, "'heart'"),
        ({"organs": ""}, "--organs"),
        ({"presence": 0.0}, "--presence"),
    ],
)
def test_wrong_parameters_are_refused_by_flag(values, words):
    with pytest.raises(UserError, match=words):
        PhantomConfig(**values)


@pytest.mark.parametrize("order, reverse", [("longest_first", True), ("shortest_first", False)])
def test_organs_can_be_named_by_the_length_of_their_names(order, reverse):
    fixed = [make_record(PhantomConfig(), "train", i) for i in range(20)]
    ordered = [make_record(PhantomConfig(order=order), "train", i) for i in range(20)]
    changed = 0
    for first, second in zip(fixed, ordered, strict=True):
        np.testing.assert_array_equal(first["image"], second["image"])
        for language in texts.LANGUAGES:
            caption = second["texts"][language]["caption"]
            rows = [
                e
                for e in second["entities"]
                if e["field"] == "caption" and e["language"] == language
            ]
            rows.sort(key=lambda e: e["start"])
            lengths = [e["end"] - e["start"] for e in rows]
            assert lengths == sorted(lengths, reverse=reverse)
            for e in rows:
                name = texts.display(e["class_id"], language)
                assert caption[e["start"] : e["end"]] == name
            changed += caption != first["texts"][language]["caption"]
    assert changed
