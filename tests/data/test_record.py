"""The common record: what goes in comes out, and what is wrong is refused by name."""

import copy

import numpy as np
import pytest

from rg_jax.data import record
from rg_jax.errors import UserError


def a_record(dtype="int16"):
    channels = 3 if dtype == "uint8" else 1
    rng = np.random.default_rng(0)
    segmentation = np.zeros((6, 8), np.uint8)
    segmentation[1:3, 2:5] = 5
    return {
        "id": "r-1",
        "image": rng.integers(0, 200, (6, 8, channels)).astype(dtype),
        "rescale": (0.1, -1024.0),
        "modality": "CT",
        "body_part": "abdomen",
        "spacing_mm": (0.7, 1 / 3),
        "texts": {
            "en": {
                "caption": "Large liver, ä.",
                "clinical_information": "",
                "clinical_question": "Size?",
            },
            "de": {
                "caption": "Große Leber.",
                "clinical_information": "",
                "clinical_question": "",
            },
        },
        "qa": [
            {
                "language": "en",
                "question": "Which?",
                "answer": "Liver",
                "type": "multiple",
                "choices": ["Liver", "Spleen, or none"],
            },
            {
                "language": "zh",
                "question": "肝脏?",
                "answer": "是",
                "type": "yesno",
                "choices": [],
            },
        ],
        "segmentation": segmentation,
        "entities": [
            entity("en", "caption", 6, 11),
            entity("de", "caption", 6, 11),
            entity("en", "qa/0/answer", 0, 5, class_id=0),
        ],
        "source": {"dataset": "made", "group": "p1", "licence": "CC0-1.0"},
    }


def entity(language, field, start, end, class_id=5, box=(2.0, 1.0, 4.5, 3.0)):
    return {
        "language": language,
        "field": field,
        "start": start,
        "end": end,
        "class_id": class_id,
        "box": box,
    }


def through_tfds(item, dtype="int16"):
    """Encode, serialise as TFDS does, read back, decode."""
    from tensorflow_datasets.core import example_parser, example_serializer

    features = record.features(dtype, 3 if dtype == "uint8" else 1)
    example = features.encode_example(record.encode(item))
    written = example_serializer.ExampleSerializer(
        features.get_serialized_info()
    ).serialize_example(example)
    parser = example_parser.ExampleParserNp(features.get_serialized_info())
    return record.decode(features.decode_example_np(parser.parse_example(written)))


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint8"])
def test_a_record_comes_back_as_it_was(dtype):
    item = a_record(dtype)
    back = through_tfds(item, dtype)
    assert back.keys() == item.keys()
    np.testing.assert_array_equal(back["image"], item["image"])
    assert back["image"].dtype == dtype
    np.testing.assert_array_equal(back["segmentation"], item["segmentation"])
    for field in ("id", "rescale", "modality", "body_part", "spacing_mm", "texts", "qa", "source"):
        assert back[field] == item[field], field
    assert back["entities"] == item["entities"]


def test_empty_parts_come_back_empty():
    item = a_record()
    item |= {"texts": {}, "qa": [], "entities": [], "segmentation": np.zeros((0, 0), np.uint8)}
    back = through_tfds(item)
    assert (back["texts"], back["qa"], back["entities"]) == ({}, [], [])
    assert back["segmentation"].shape == (0, 0)


def test_a_language_may_be_missing_and_a_text_empty():
    item = a_record()
    item["texts"] = {"de": {**item["texts"]["de"], "caption": ""}}
    item["entities"] = []
    assert through_tfds(item)["texts"] == item["texts"]


def test_text_of():
    item = a_record()
    assert record.text_of(item, "de", "caption") == "Große Leber."
    assert record.text_of(item, "zh", "qa/1/answer") == "是"
    for language, field in (("en", "qa/1/answer"), ("fr", "caption"), ("en", "qa/01/answer")):
        with pytest.raises(KeyError):
            record.text_of(item, language, field)


def put(*path):
    """A change: walk down the keys, set the last but one to the last."""
    *keys, last, value = path

    def change(item):
        for key in keys:
            item = item[key]
        item[last] = value

    return change


def add(*path):
    *keys, value = path

    def change(item):
        for key in keys:
            item = item[key]
        item.append(value)

    return change


def drop(*path):
    *keys, last = path

    def change(item):
        for key in keys:
            item = item[key]
        del item[last]

    return change


WRONG = {
    "empty id": (put("id", " "), "field id"),
    "field missing": (drop("spacing_mm"), "field spacing_mm is missing"),
    "field unknown": (put("extra", 1), "field extra"),
    "image of floats": (put("image", np.zeros((4, 4, 1), np.float32)), "dtype float32"),
    "image of rank 2": (put("image", np.zeros((4, 4), np.int16)), "image has shape (4, 4)"),
    "image without pixels": (put("image", np.zeros((0, 4, 1), np.int16)), "image has shape"),
    "colour as int16": (put("image", np.zeros((6, 8, 3), np.int16)), "3 channels"),
    "slope 0": (put("rescale", (0.0, 1.0)), "slope 0"),
    "rescale not finite": (put("rescale", (float("nan"), 1.0)), "rescale"),
    "rescale of one": (put("rescale", (1.0,)), "rescale"),
    "negative spacing": (put("spacing_mm", (-1.0, 1.0)), "spacing_mm"),
    "no modality": (put("modality", ""), "modality is empty"),
    "body part no text": (put("body_part", 3), "body_part is a int"),
    "no group": (put("source", "group", ""), "source/group"),
    "texts a list": (put("texts", []), "texts is a list"),
    "language name": (put("texts", "english", {}), "texts/english"),
    "text field missing": (drop("texts", "en", "caption"), "texts/en/caption is missing"),
    "broken unicode": (put("texts", "en", "caption", "a\ud800"), "not valid Unicode"),
    "question type": (put("qa", 0, "type", "OPEN"), "qa/0/type"),
    "empty answer": (put("qa", 1, "answer", ""), "qa/1/answer is empty"),
    "choice with a line break": (put("qa", 0, "choices", ["a\nb"]), "line break"),
    "choices no list": (put("qa", 0, "choices", "a"), "qa/0/choices"),
    "mask of another size": (put("segmentation", np.zeros((8, 6), np.uint8)), "(8, 6) where"),
    "mask of another dtype": (put("segmentation", np.zeros((6, 8), np.int32)), "segmentation"),
    "mask with unknown class": (put("segmentation", np.full((6, 8), 122, np.uint8)), "class 122"),
    "span outside": (put("entities", 0, "end", 99), "entities/0 has span 6:99"),
    "span empty": (put("entities", 0, "end", 6), "entities/0 has span 6:6"),
    "span of floats": (put("entities", 0, "end", 11.0), "entities/0"),
    "class unknown": (put("entities", 0, "class_id", 122), "class_id 122"),
    "no such text": (put("entities", 0, "field", "qa/7/answer"), "'qa/7/answer': no such text"),
    "text of other language": (put("entities", 2, "language", "zh"), "no such text"),
    "box outside": (put("entities", 0, "box", (2.0, 1.0, 8.5, 3.0)), "entities/0/box"),
    "box empty": (put("entities", 0, "box", (2.0, 1.0, 2.0, 3.0)), "entities/0/box"),
    "box swapped": (put("entities", 0, "box", (4.0, 1.0, 2.0, 3.0)), "entities/0/box"),
    "box empty as stored": (put("entities", 0, "box", (2.0, 1.0, 2 + 1e-9, 3.0)), "entities/0/box"),
    "span twice": (add("entities", entity("en", "caption", 6, 11)), "repeats entities/0"),
    "spans overlap": (add("entities", entity("en", "caption", 0, 7)), "overlaps or repeats"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_by_record_and_field(case):
    change, words = WRONG[case]
    item = copy.deepcopy(a_record())
    record.encode(item)
    change(item)
    with pytest.raises(UserError) as caught:
        record.encode(item)
    assert words in str(caught.value)
    assert case == "empty id" or "record r-1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_touching_spans_and_other_fields_are_no_overlap():
    item = a_record()
    item["entities"].append(entity("en", "caption", 11, 12))
    item["entities"].append(entity("en", "caption", 0, 6))
    record.encode(item)


def test_features_refuse_a_pair_that_does_not_fit():
    with pytest.raises(ValueError, match="uint8 with 1"):
        record.features("uint8", 1)
