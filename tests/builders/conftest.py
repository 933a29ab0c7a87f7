"""A small folder in the layout of SLAKE 1.0, made up, and the checks of shapes for the builders."""

import json
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook
from PIL import Image

install_import_hook("tfds_builders", "beartype.beartype")

MASK_TABLE = "70:Liver\n135:Left Kidney\n155:Right Kidney\n175:Liver Cancer\n250:Right Parotid2\n"
VALUES = {"Liver": 70, "Left Kidney": 135, "Right Kidney": 155, "Liver Cancer": 175}


class MadeSlake:
    """Writes images one by one; `questions` of the three files are kept until `write`."""

    def __init__(self, root: Path):
        self.root = root
        self.questions = {"train": [], "validate": [], "test": []}
        (root / "imgs").mkdir(parents=True)
        (root / "mask.txt").write_text(MASK_TABLE)

    def folder(self, name: str) -> Path:
        return self.root / "imgs" / name

    def image(self, name: str, boxes=(), size=(48, 40), mask_mode="RGB", fill_masks=True):
        """An image of `size` (width, height) with boxes [(label, x, y, w, h)] and their mask."""
        self.folder(name).mkdir()
        width, height = size
        rng = np.random.default_rng(sum(map(ord, name)))
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(self.folder(name) / "source.jpg")
        self.boxes(name, [{label: [float(v) for v in box]} for label, *box in boxes])
        mask = np.zeros((height, width), np.uint8)
        for label, x, y, w, h in boxes if fill_masks else ():
            if label in VALUES:
                mask[y : y + h, x : x + w] = VALUES[label]
        self.mask(name, mask, mask_mode)

    def boxes(self, name: str, rows) -> None:
        (self.folder(name) / "detection.json").write_text(json.dumps(rows))

    def mask(self, name: str, values, mode: str) -> None:
        channels = {
            "L": lambda v: v,
            "RGB": lambda v: np.stack([v] * 3, -1),
            "red": lambda v: np.stack([v, 0 * v, 0 * v], -1),
            "RGBA": lambda v: np.stack([v, v, v, 0 * v + 255], -1),
        }[mode](values)
        Image.fromarray(channels).save(self.folder(name) / "mask.png")

    def ask(self, file: str, name: str, question="Is it dark?", answer="Yes", **fields):
        row = {
            "img_name": f"{name}/source.jpg",
            "question": question,
            "answer": answer,
            "q_lang": "en",
            "answer_type": "OPEN",
            "modality": "CT",
            "location": "Abdomen",
            "content_type": "Organ",
            "qid": 1,
        }
        self.questions[file].append({**row, **fields})

    def write(self) -> Path:
        for file, rows in self.questions.items():
            (self.root / f"{file}.json").write_text(json.dumps(rows, ensure_ascii=False))
        return self.root


@pytest.fixture
def slake(tmp_path) -> MadeSlake:
    """Four images: two in train, one in validate, one in test. Nothing is wrong with them."""
    made = MadeSlake(tmp_path / "Slake1.0")
    made.image(
        "xmlab1", [("Liver", 4, 5, 10, 12), ("Liver", 20, 5, 6, 6), ("Left Kidney", 30, 20, 8, 9)]
    )
    made.image("xmlab2", [("Right Kidney", 2, 2, 9, 9)], size=(32, 64), mask_mode="red")
    made.image("xmlab3", [], mask_mode="L")
    made.image("xmlab4", [("Liver", 1, 1, 20, 20), ("Pneumonia", 0, 0, 48, 40)], mask_mode="RGBA")
    made.ask("train", "xmlab1", "What is on the right?", "Left Kidney")
    made.ask("train", "xmlab1", "What is bright?", "liver, kidney left and spleen")
    made.ask("train", "xmlab1", "Disease?", "Liver Cancer", answer_type="CLOSED ")
    made.ask("train", "xmlab1", "肝脏在哪里?", "左边", q_lang="zh")
    made.ask("train", "xmlab2", "Which modality?", "MRI", modality="MRI")
    made.ask("validate", "xmlab3", "Normal?", "Yes", answer_type="CLOSED", location="Brain_Tissue")
    made.ask("test", "xmlab4", "Largest?", "LIVER", modality="X-Ray", location="Lung")
    return made
