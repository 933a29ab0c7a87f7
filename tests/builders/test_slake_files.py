"""slake: every way in which a folder, an image or a question can be wrong, refused by name."""

import re
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rg_jax.data import record
from rg_jax.errors import UserError
from tfds_builders.__main__ import build
from tfds_builders.slake.slake_dataset_builder import Builder, SlakeConfig


def make(slake, tmp_path, **values):
    """Build and read back the ids: {split: [id]}."""
    place = build(Builder, SlakeConfig(**values), str(tmp_path / "data"), str(slake.write()))
    builder = tfds.builder_from_directory(place)
    return {
        split: [record.decode(example)["id"] for example in builder.as_data_source(split=split)]
        for split in builder.info.splits
    }


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def two_values(slake):
    mask = np.zeros((40, 48, 3), np.uint8)
    mask[4, 4] = (70, 135, 0)
    Image.fromarray(mask).save(slake.folder("xmlab1") / "mask.png")


DAMAGE = {
    "picture missing": (
        lambda s: (s.folder("xmlab1") / "source.jpg").unlink(),
        "source.jpg: no such",
    ),
    "picture cut off": (
        lambda s: cut(s.folder("xmlab1") / "source.jpg"),
        "source.jpg: the picture",
    ),
    "picture no picture": (
        lambda s: (s.folder("xmlab1") / "source.jpg").write_text("hello"),
        "source.jpg: the picture cannot be read",
    ),
    "mask missing": (lambda s: (s.folder("xmlab1") / "mask.png").unlink(), "mask.png: no such"),
    "mask cut off": (lambda s: cut(s.folder("xmlab1") / "mask.png"), "mask.png: the picture"),
    "mask of another size": (
        lambda s: s.mask("xmlab1", np.zeros((48, 40), np.uint8), "RGB"),
        "mask.png: the mask is 40 x 48 pixels, its picture 48 x 40",
    ),
    "mask with two values": (two_values, "mask.png: colour channels hold different values"),
    "boxes missing": (
        lambda s: (s.folder("xmlab1") / "detection.json").unlink(),
        "detection.json: no",
    ),
    "boxes no json": (
        lambda s: (s.folder("xmlab1") / "detection.json").write_text("[{"),
        "detection.json: not readable as JSON",
    ),
    "boxes no list": (lambda s: s.boxes("xmlab1", {"Liver": [1, 2, 3, 4]}), "detection.json: must"),
    "box of three": (lambda s: s.boxes("xmlab1", [{"Liver": [1, 2, 3]}]), "detection.json: box [1"),
    "box of words": (
        lambda s: s.boxes("xmlab1", [{"Liver": "abcd"}]),
        "detection.json: box 'abcd'",
    ),
    "box empty": (lambda s: s.boxes("xmlab1", [{"Liver": [1, 2, 0, 4]}]), "of Liver is empty"),
    "box outside": (
        lambda s: s.boxes("xmlab1", [{"Liver": [40, 2, 10, 4]}]),
        "detection.json: box [40, 2, 10, 4] of Liver leaves the picture of 48 x 40 pixels",
    ),
    "box beyond by a pixel": (lambda s: s.boxes("xmlab1", [{"Liver": [-1, 2, 1, 4]}]), "outside"),
    "box not a number": (
        lambda s: s.boxes("xmlab1", [{"Liver": [float("nan"), 2, 1, 4]}]),
        "of Liver leaves the picture",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_images_are_named_or_skipped_on_request(slake, tmp_path, capsys, case):
    damage, words = DAMAGE[case]
    damage(slake)
    with pytest.raises(UserError) as caught:
        make(slake, tmp_path)
    assert words in str(caught.value) and "xmlab1" in str(caught.value)
    assert "--skip_bad" in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
    splits = make(slake, tmp_path, skip_bad=True)
    assert splits["train"] == ["slake-xmlab2"]
    out = capsys.readouterr().out
    assert re.search(r"left out: [a-z ]+: 1\n", out) and words in out


WRONG = {
    "no split file": (lambda root: (root / "test.json").unlink(), "test.json: no such file"),
    "split file no json": (lambda root: (root / "train.json").write_text("{"), "train.json: not"),
    "split file no list": (lambda root: (root / "train.json").write_text("{}"), "train.json: must"),
    "question no object": (lambda root: (root / "train.json").write_text("[1]"), "question 0"),
    "no mask table": (lambda root: (root / "mask.txt").unlink(), "mask.txt"),
    "mask table garbled": (
        lambda root: (root / "mask.txt").write_text("70 Liver\n"),
        "mask.txt: line 1",
    ),
    "mask table twice": (
        lambda root: (root / "mask.txt").write_text("70:Liver\n70:Heart\n"),
        "mask.txt: line 2",
    ),
    "no images": (lambda root: shutil.rmtree(root / "imgs"), "source.jpg: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_refused_by_file(slake, tmp_path, case):
    slake.write()
    damage, words = WRONG[case]
    damage(slake.root)
    with pytest.raises(UserError) as caught:
        build(Builder, SlakeConfig(), str(tmp_path / "data"), str(slake.root))
    assert words in str(caught.value), caught.value


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"answer": None}, "no text in field answer"),
        ({"img_name": "xmlab1.jpg"}, "img_name 'xmlab1.jpg'"),
        ({"img_name": "../source.jpg"}, "img_name '../source.jpg'"),
        ({"answer_type": "HALF"}, "answer_type 'HALF'"),
        ({"modality": "PET"}, "modality 'PET'"),
    ],
)
def test_wrong_questions_are_refused_by_number(slake, tmp_path, fields, words):
    slake.questions["validate"][0].update(fields)
    with pytest.raises(UserError) as caught:
        make(slake, tmp_path)
    assert "validate.json: question 0" in str(caught.value) and words in str(caught.value)
