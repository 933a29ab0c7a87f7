"""vqa_rad: a made-up folder in both layouts through the builder."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from rg_jax.data import record
from rg_jax.data.sources import open_source
from rg_jax.data.tasks import make_sample
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS
from tfds_builders.__main__ import build
from tfds_builders.check import page
from tfds_builders.check.command import check
from tfds_builders.vqa_rad.vqa_rad_dataset_builder import FILES, Builder, VqaRadConfig

ROOT = os.environ.get("VQA_RAD_ROOT", "")


def ask(image, question="Is it dark?", answer="Yes", kind="closed", field="q_type", **fields):
    return {"image_name": image, "question": question, "answer": answer, field: kind, **fields}


class MadeVqaRad:
    """Questions of each file are kept until `write`."""

    def __init__(self, root: Path):
        self.root, self.rows = root, {}
        (root / "images").mkdir(parents=True)
        for number in range(1, 6):
            self.picture(f"synpic{number}.jpg", number)
        for split, image in (("train", 1), ("train", 2), ("val", 3), ("test", 4)):
            self.add(FILES["fixed"][split], ask(f"synpic{image}.jpg"))
        self.add(FILES["fixed"]["train"], ask("synpic1.jpg", " What? ", "a nodule ", "open \n"))
        for image in (1, 2, 3):
            row = ask(f"synpic{image}.jpg", kind="CLOSED ", field="answer_type", qid=str(image))
            self.add(FILES["original"]["train"], {**row, "image_organ": "CHEST "})
        row = ask("synpic1.jpg", "How many?", 3, "OPEN", "answer_type", qid=7, image_organ="HEAD")
        self.add(FILES["original"]["test"], row)

    def picture(self, name, seed, size=(24, 18)):
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(self.root / "images" / name)

    def add(self, file, row):
        self.rows.setdefault(file, []).append(row)

    def write(self) -> Path:
        for file, rows in self.rows.items():
            (self.root / file).write_text(json.dumps(rows))
        return self.root


@pytest.fixture
def made(tmp_path):
    return MadeVqaRad(tmp_path / "vqa_rad")


def make(made, **values):
    data_dir = made.root.parent / "data"
    return read(build(Builder, VqaRadConfig(**values), str(data_dir), str(made.write())))


def read(place):
    builder = tfds.builder_from_directory(place)
    return {
        split: {
            item["id"]: item for item in map(record.decode, builder.as_data_source(split=split))
        }
        for split in builder.info.splits
    }


def test_the_split_by_image(made):
    splits = make(made)
    assert {split: set(items) for split, items in splits.items()} == {
        "train": {"vqa_rad-synpic1", "vqa_rad-synpic2"},
        "val": {"vqa_rad-synpic3"},
        "test": {"vqa_rad-synpic4"},
    }
    first = splits["train"]["vqa_rad-synpic1"]
    assert first["image"].shape == (18, 24, 3) and first["source"]["group"] == "synpic1.jpg"
    # Blanks are no part of a field, and "a nodule" is open, whatever it contains.
    assert [(q["question"], q["answer"], q["type"]) for q in first["qa"]] == [
        ("Is it dark?", "Yes", "closed"),
        ("What?", "a nodule", "open"),
    ]


def test_the_recipe_can_be_fed(made):
    make(made)
    item = open_source("vqa_rad", "test", made.root.parent / "data")[0]
    sample = make_sample(item, "slake", "en", None, OURS)
    assert sample.prefix == "\nIs it dark?\nAnswer: " and sample.target == "Yes"


def test_the_original_split_leaks_and_is_built_only_when_asked(made, capsys):
    with pytest.raises(UserError) as caught:
        make(made, layout="original")
    text = str(caught.value)
    assert "testset.json: image synpic1.jpg is in train and in test" in text
    assert "--leaks=move" in text and "--leaks=allow" in text
    splits = make(made, layout="original", leaks="allow")
    assert set(splits["test"]) == {"vqa_rad-synpic1-test"}
    item = splits["test"]["vqa_rad-synpic1-test"]
    assert item["qa"][0]["answer"] == "3" and item["body_part"] == "head"
    assert splits["train"]["vqa_rad-synpic1"]["qa"][0]["type"] == "closed"
    assert splits["train"]["vqa_rad-synpic1"]["body_part"] == "chest"
    assert "figures on them mean little" in capsys.readouterr().out
    moved = make(made, layout="original", leaks="move")
    assert set(moved) == {"train"} and len(moved["train"]["vqa_rad-synpic1"]["qa"]) == 2


def test_one_picture_under_two_names_is_a_leak(made):
    folder = made.root / "images"
    (folder / "synpic4.jpg").write_bytes((folder / "synpic1.jpg").read_bytes())
    with pytest.raises(UserError, match=r"in train \(synpic1.jpg\) and in test \(synpic4.jpg\)"):
        make(made)


DAMAGE = {
    "no picture": (
        lambda m: (m.root / "images/synpic2.jpg").unlink(),
        "images/synpic2.jpg: no such picture",
    ),
    "picture cut off": (
        lambda m: (m.root / "images/synpic2.jpg").write_bytes(b"\xff\xd8\xff"),
        "images/synpic2.jpg: the picture cannot be read",
    ),
    "no type": (
        lambda m: m.add(FILES["fixed"]["train"], ask("synpic2.jpg", kind="maybe")),
        "train_fixed_split.json: question 3: q_type 'maybe'",
    ),
    "no question": (
        lambda m: m.add(FILES["fixed"]["train"], ask("synpic2.jpg", question=None)),
        "question 3: has no text in field question",
    ),
    "a path": (
        lambda m: m.add(FILES["fixed"]["train"], ask("../synpic2.jpg")),
        "image_name '../synpic2.jpg' is no file name",
    ),
    "no object": (
        lambda m: m.add(FILES["fixed"]["train"], ["synpic2.jpg"]),
        "question 3: is no object",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_or_left_out(made, case, capsys):
    damage, words = DAMAGE[case]
    damage(made)
    with pytest.raises(UserError) as caught:
        make(made)
    assert words in str(caught.value) and "--skip_bad" in str(caught.value)
    splits = make(made, skip_bad=True)
    assert ("vqa_rad-synpic2" in splits["train"]) == ("picture" not in case)
    assert "left out: " in capsys.readouterr().out


def test_lost_letters_stay_in_a_question_and_are_counted(made, capsys):
    """The model only reads them, and figures on fewer questions would compare with nobody's."""
    made.add(FILES["fixed"]["train"], ask("synpic2.jpg", question="Is the \ufffdnodule\ufffd big?"))
    assert len(make(made)["train"]["vqa_rad-synpic2"]["qa"]) == 2
    assert "  encoding damage: 1" in capsys.readouterr().out


def test_lost_letters_in_an_answer_are_refused(made, capsys):
    made.add(FILES["fixed"]["train"], ask("synpic2.jpg", answer="the l\ufffdver"))
    with pytest.raises(UserError, match=r"images/synpic2\.jpg: qa/1/answer: U\+FFFD.*--skip_bad"):
        make(made)
    assert "vqa_rad-synpic2" not in make(made, skip_bad=True)["train"]
    assert "left out: encoding damage: 1" in capsys.readouterr().out


def test_empty_fields_are_left_out_and_counted(made, capsys):
    made.add(FILES["fixed"]["train"], ask("synpic1.jpg", answer="  "))
    assert len(make(made)["train"]["vqa_rad-synpic1"]["qa"]) == 2
    assert "empty field: 1" in capsys.readouterr().out


def test_a_missing_file_is_a_missing_split_and_told(made, capsys):
    del made.rows[FILES["fixed"]["val"]]
    assert set(make(made)) == {"train", "test"}
    assert "validation_fixed_split.json is not there: no split val" in capsys.readouterr().out


def test_a_damaged_split_file_is_told_and_the_check_goes_on(made, tmp_path):
    source = made.write()
    (source / FILES["fixed"]["train"]).write_text("{")
    with pytest.raises(UserError, match="train_fixed_split.json: not readable as JSON"):
        build(Builder, VqaRadConfig(), str(tmp_path / "data"), str(source))
    report = check(Builder(data_dir=str(tmp_path), config=VqaRadConfig()), source, tmp_path)
    lines = (tmp_path / page.PROBLEMS).read_text().splitlines()
    told = [(p["file"], p["kind"]) for p in map(json.loads, lines) if p["harmful"]]
    assert (FILES["fixed"]["train"], "unreadable file") in told and report.complete
    assert report.statistics.records == {"val": 1, "test": 1}


def test_folders_that_are_none(made):
    with pytest.raises(UserError, match="--images_dir"):
        make(made, images_dir="pictures")
    made.rows = {"other.json": []}
    for file in FILES["fixed"].values():
        (made.root / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match="--layout chooses"):
        make(made)


@pytest.mark.skipif(not ROOT, reason="VQA_RAD_ROOT is not set: no real VQA-RAD folder")
@pytest.mark.parametrize("layout", FILES)
def test_every_question_of_a_real_folder(tmp_path, layout):
    leaks = "refuse" if layout == "fixed" else "allow"
    place = build(Builder, VqaRadConfig(layout=layout, leaks=leaks), str(tmp_path), ROOT)
    splits = read(place)
    for split, file in FILES[layout].items():
        if not (Path(ROOT) / file).is_file():
            assert split not in splits
            continue
        rows = json.loads((Path(ROOT) / file).read_text(encoding="utf-8"))
        kind = "q_type" if layout == "fixed" else "answer_type"
        want = Counter(
            (row["image_name"], str(row["question"]).strip(), row[kind].strip().lower())
            for row in rows
            if str(row["answer"]).strip()
        )
        got = Counter(
            (item["source"]["group"], qa["question"], qa["type"])
            for item in splits[split].values()
            for qa in item["qa"]
        )
        assert got == want
