"""slake on real files: set SLAKE_ROOT to a folder of SLAKE 1.0, whole or in part."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rg_jax.data import record
from rg_jax.grounding.boxes import boxes_of_mask, iou
from tfds_builders.__main__ import build
from tfds_builders.slake.slake_dataset_builder import Builder, SlakeConfig

ROOT = os.environ.get("SLAKE_ROOT", "")
pytestmark = pytest.mark.skipif(not ROOT, reason="SLAKE_ROOT is not set: no real SLAKE folder")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    config = SlakeConfig(templates="en,de")
    place = build(Builder, config, str(tmp_path_factory.mktemp("data")), ROOT)
    builder = tfds.builder_from_directory(place)
    return {
        split: [record.decode(example) for example in builder.as_data_source(split=split)]
        for split in builder.info.splits
    }


def test_every_english_question_with_an_answer_is_there(built):
    for split, file in (("train", "train"), ("val", "validate"), ("test", "test")):
        rows = json.loads((Path(ROOT) / f"{file}.json").read_text(encoding="utf-8"))
        wanted = Counter(
            (f"slake-{Path(r['img_name']).parent}", r["question"].strip(), r["answer"].strip())
            for r in rows
            if r["q_lang"] == "en" and r["answer"].strip()
        )
        found = Counter(
            (item["id"], row["question"], row["answer"])
            for item in built[split]
            for row in item["qa"]
            if row["type"] != "grounded"
        )
        assert found == wanted


def test_splits_share_no_image(built):
    groups = [{item["source"]["group"] for item in items} for items in built.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_boxes_lie_on_the_masks(built):
    """Where a class has both, box and mask tell the same place."""
    overlaps = []
    for items in built.values():
        for item in items:
            masks = boxes_of_mask(item["segmentation"])
            for entity in {(e["class_id"], e["box"]) for e in item["entities"]}:
                if entity[0] in masks:
                    overlaps.append(iou(tuple(map(float, masks[entity[0]])), entity[1]))
    assert len(overlaps) > 50 and np.mean(overlaps) > 0.95


def test_entities_name_what_they_point_at(built):
    count = 0
    for items in built.values():
        for item in items:
            record.encode(item)
            for entity in item["entities"]:
                text = record.text_of(item, entity["language"], entity["field"])
                assert text[entity["start"] : entity["end"]].strip()
                count += 1
    assert count > 100
