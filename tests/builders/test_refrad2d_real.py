"""refrad2d on real files: set REFRAD2D_ROOT to a folder of the layout with its expected.json."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rg_jax.data import record
from rg_jax.data.sources import open_source
from rg_jax.data.tasks import drafts, make_sample
from rg_jax.grounding.boxes import boxes_of_mask
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION
from rg_jax.grounding.prompts import report_context
from tfds_builders.__main__ import build
from tfds_builders.refrad2d.refrad2d_dataset_builder import Builder, RefRad2DConfig
from tools import build_slices, extract_mentions, write_vqa

ROOT = Path(os.environ.get("REFRAD2D_ROOT", ""))
SHEET = ROOT / "expected.json"
pytestmark = pytest.mark.skipif(
    not os.environ.get("REFRAD2D_ROOT") or not SHEET.is_file(),
    reason="REFRAD2D_ROOT is not set to a folder in the RefRad2D layout with an expected.json",
)


@pytest.fixture(scope="module")
def expected():
    return json.loads(SHEET.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build(Builder, RefRad2DConfig(workers=2), str(folder), str(ROOT))
    return folder


def read(place):
    """{split: {id: record}}, as a reader without our code gets them."""
    builder = tfds.builder_from_directory(place)
    return {
        split: {
            item["id"]: item for item in map(record.decode, builder.as_data_source(split=split))
        }
        for split in builder.info.splits
    }


@pytest.fixture(scope="module")
def built(data_dir):
    return read(next(data_dir.glob("refrad2d/default/*")))


@pytest.fixture(scope="module")
def slices(built, expected):
    """(id, record, what is expected, split) of every slice of the answer sheet."""
    found = {name: (item, split) for split, items in built.items() for name, item in items.items()}
    return [(name, found[name][0], want, found[name][1]) for name, want in expected["ids"].items()]


@pytest.fixture(scope="module")
def parquet():
    import pyarrow.parquet as pq

    rows = pq.read_table(next(ROOT.glob("*.parquet"))).to_pylist()
    return {row["rsopid"]: row for row in rows}


def test_every_slice_is_in_its_split_with_its_patient(slices, expected):
    assert len(slices) == expected["counts"]["slices"] > 0
    group_of = {}
    for name, item, want, split in slices:
        assert split == want["split"], name
        group = item["source"]["group"]
        assert group_of.setdefault(want["patient"], group) == group, name
        assert item["modality"] == want["modality"], name
    assert len(set(group_of.values())) == len(group_of)


def test_pixels_and_geometry(slices):
    for name, item, want, _ in slices:
        assert item["image"].shape == (*want["shape"], 1) and item["image"].dtype == np.int16
        assert item["spacing_mm"] == pytest.approx(want["spacing_mm"]), name
        slope, intercept = item["rescale"]
        values = item["image"][..., 0] * slope + intercept
        assert values.min() == want["values"]["min"] and values.max() == want["values"]["max"], name
        assert values.mean() == pytest.approx(want["values"]["mean"], abs=1e-3), name
        for row, column, value in want["values"]["at_row_col_value"]:
            assert values[row, column] == value, (name, row, column)


def test_masks_and_their_boxes(slices):
    for name, item, want, _ in slices:
        boxes = {str(c): list(box) for c, box in boxes_of_mask(item["segmentation"]).items()}
        assert boxes == want["union_boxes"], name
        for class_id, pixels in want["mask_pixels"].items():
            assert (item["segmentation"] == int(class_id)).sum() == pixels, (name, class_id)


def named(item, language):
    caption = item["texts"][language]["caption"]
    return [
        [e["start"], e["end"], caption[e["start"] : e["end"]], e["class_id"], list(e["box"])]
        for e in sorted(item["entities"], key=lambda e: e["start"])
        if e["field"] == "caption" and e["language"] == language
    ]


def test_entities_span_for_span(slices, expected):
    count = dict.fromkeys(("en", "de"), 0)
    for name, item, want, _ in slices:
        # The sheet is exact in case, the builder is not: the sheet gives the other where it differs
        free = want.get("entities_ignore_case", want["entities"])
        for language in count:
            assert item["texts"][language]["caption"] == want["text"][language], name
            assert named(item, language) == free[language], (name, language)
            for mention in want["mentions_without_place"][language]:
                text = mention[0] if isinstance(mention, list) else mention
                assert all(text != entity[2] for entity in named(item, language)), name
            count[language] += len(named(item, language))
    if not any("entities_ignore_case" in want for _, _, want, _ in slices):
        totals = expected["counts"]
        assert count == {"en": totals["entities_en"], "de": totals["entities_de"]}


def test_contexts(slices, expected):
    seen = set()
    for name, item, want, _ in slices:
        for language, context in expected["contexts"].get(want["scan"], {}).items():
            fields = item["texts"][language]
            made = report_context(
                language, fields["clinical_information"], fields["clinical_question"]
            )
            assert made == context, (name, language)
            seen.add(want["scan"])
    assert seen == set(expected["contexts"])


def test_targets(slices, expected):
    """What the task writes, in both orders of the coordinates."""
    formats = {"detect_yxyx": OURS, "detect_xyxy": PUBLISHED_DETECTION}
    count = 0
    for name, item, _, _ in slices:
        for language, targets in expected["targets"].get(name, {}).items():
            for form, fmt in formats.items():
                sample = make_sample(item, "detect", language, None, fmt)
                assert sample.target == targets[form], (name, language, form)
                count += 1
    assert count == sum(
        form in formats
        for by_language in expected["targets"].values()
        for targets in by_language.values()
        for form in targets
    )


def test_questions_of_both_kinds(slices, parquet, expected):
    totals = {"en": 0, "de": 0}
    for name, item, _, _ in slices:
        for language, struct in (("en", "english"), ("de", "german")):
            row = parquet[name][struct]
            want = [
                (q["question"], q["answer"], q["question_type"], q["choices"] or [])
                for q in (*row["dicom_vqa"], *row["snippet_vqa"])
            ]
            got = [
                (q["question"], q["answer"], q["type"], q["choices"])
                for q in item["qa"]
                if q["language"] == language
            ]
            assert got == want, (name, language)
            totals[language] += len(got)
    assert totals == {"en": expected["counts"]["vqa_en"], "de": expected["counts"]["vqa_de"]}


def test_sampled_slices(built, expected):
    """Values as in the file, exactly; questions that never claim what is not there."""
    found = 0
    for kind in ("ct", "mr"):
        path = ROOT / "refrad2d_segment" / f"refrad2d_sampled_dataset_v3_{kind}.json"
        for name, entry in json.loads(path.read_text()).items():
            split, item = next(
                (split, items[name]) for split, items in built.items() if name in items
            )
            assert entry["rsopid"] in built[split]  # the same slice is not in two splits
            slope, intercept = item["rescale"]
            values = np.load(ROOT / entry["scan_slice_path"])
            np.testing.assert_array_equal(item["image"][..., 0] * slope + intercept, values)
            boxes = {row[4]: tuple(map(float, row[:4])) for row in entry["bboxes"]}
            for entity in item["entities"]:
                assert entity["box"] == boxes[entity["class_id"]]
            for index, qa in enumerate(item["qa"]):
                marked = [e for e in item["entities"] if e["field"] == f"qa/{index}/answer"]
                assert bool(marked) != qa["answer"].startswith(("No,", "Nein,"))
            assert {qa["language"] for qa in item["qa"]} == {"en", "de"}
            found += 1
    assert found == sum(expected["counts"]["sampled_slices"].values())


def run(stage, *flags):
    return stage.run(stage.parser().parse_args([str(flag) for flag in flags]))


def test_volumes_through_all_stages_give_the_same_records(built, tmp_path):
    """Mentions by the dictionary, slices cut anew; only patients are named otherwise."""
    given, layout = next(ROOT.glob("*.parquet")), tmp_path / "layout"
    parquet, keywords = tmp_path / "with_vqa.parquet", tmp_path / "keywords"
    run(extract_mentions, f"--parquet={given}", f"--out={keywords}")
    run(write_vqa, f"--parquet={given}", f"--out={parquet}")
    sampled = f"--sampled_dir={ROOT / 'refrad2d_segment'}"
    run(
        *(build_slices, f"--root={ROOT}", f"--out={layout}"),
        *(f"--keywords={keywords}", f"--parquet={parquet}", sampled),
    )
    made = read(build(Builder, RefRad2DConfig(), str(tmp_path / "data"), str(layout)))
    assert {split: set(items) for split, items in made.items()} == {
        split: set(items) for split, items in built.items()
    }
    for split, items in built.items():
        for name, item in items.items():
            other = made[split][name]
            values = [one["image"] * one["rescale"][0] + one["rescale"][1] for one in (item, other)]
            np.testing.assert_array_equal(*values, err_msg=name)
            np.testing.assert_array_equal(item["segmentation"], other["segmentation"], name)
            assert other["spacing_mm"] == pytest.approx(item["spacing_mm"]), name
            for field in ("modality", "body_part", "texts", "qa", "entities"):
                assert other[field] == item[field], (name, field)


def test_splits_share_no_patient(built):
    groups = [{item["source"]["group"] for item in items.values()} for items in built.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_the_tasks_of_the_detection_recipe_apply(data_dir):
    source = open_source("refrad2d", "train", data_dir)
    for task in ("detect", "report", "vqa", "detect_vqa"):
        for language in ("en", "de"):
            able = [i for i in range(len(source)) if drafts(source[i], task, language, OURS)[0]]
            assert able, (task, language)
            assert make_sample(source[able[0]], task, language, None, OURS).target
