"""vqa_rad: VQA-RAD (Lau et al. 2018), questions by clinicians on 315 public pictures.

One record per image with its questions. Two layouts: "fixed", the image-disjoint split of Wu et
al. 2025 ({train,validation,test}_fixed_split.json), and "original" (trainset.json, testset.json),
in which every test image is also a training image. Open or closed is what the data says.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from rg_jax.data.record import Record
from rg_jax.errors import UserError
from tfds_builders import common
from tfds_builders.problems import Found, Problem
from tfds_builders.splits import Member

LICENCE = "CC0 1.0"
FILES = {
    "fixed": {
        "train": "train_fixed_split.json",
        "val": "validation_fixed_split.json",
        "test": "test_fixed_split.json",
    },
    "original": {"train": "trainset.json", "test": "testset.json"},
}
# The two layouts name the field differently.
TYPE_FIELDS = ("q_type", "answer_type")


@dataclasses.dataclass(eq=False, kw_only=True)
class VqaRadConfig(common.RecordConfig):
    """Parameters; named after the layout."""

    layout: str = common.parameter(
        "fixed", "which split: that by image (Wu et al. 2025), or the original one", tuple(FILES)
    )
    leaks: str = common.parameter(
        "refuse",
        "images that occur in several splits, which is every test image of the original layout:"
        " refuse to build, move all their questions to train, or allow it",
        ("refuse", "move", "allow"),
    )
    skip_bad: bool = common.parameter(
        False, "leave out images and questions that are damaged instead of stopping"
    )
    images_dir: str = common.parameter("images", "the folder of the pictures", role="stored")

    def derived_name(self) -> str:
        return self.layout + self.deviations("layout")


@dataclasses.dataclass(frozen=True)
class Question:
    image: str
    question: str
    answer: str
    type: str
    body_part: str


class Builder(common.RecordBuilder):
    """VQA-RAD (Lau et al. 2018, CC0): questions by clinicians on 315 pictures."""

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = VqaRadConfig
    SOURCE = "the folder of VQA-RAD with images/ and the JSON files of a split"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download VQA-RAD from https://osf.io/89kps and, for the split by image, the three"
        " *_fixed_split.json files of OVQA (Wu et al. 2025); all lie in one folder with images/."
    )
    IMAGE_DTYPE = "uint8"
    CHANNELS = 3

    def splits(self, source: Path) -> dict[str, Iterator[Record]]:
        config = self.builder_config
        folder = source / config.images_dir
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --images_dir names another")
        asked: dict[str, dict[str, list[Question]]] = {}
        for split, name in FILES[config.layout].items():
            if (source / name).is_file():
                asked[split] = {}
                for question in self.or_problem(self._questions, source / name) or ():
                    asked[split].setdefault(question.image, []).append(question)
            else:
                self.notes.append(f"{name} is not there: no split {split}")
        if not asked:
            first = FILES[config.layout]["train"]
            raise UserError(f"{source / first}: no such file; --layout chooses the other split")
        members = [
            Member(image, split, self._keys(folder, image), FILES[config.layout][split])
            for split, images in asked.items()
            for image in images
        ]
        kept = self.guard(members, " and --leaks=allow builds it as it is")
        self._moved(asked, kept)
        self.expected = {split: len(images) for split, images in asked.items()}
        return {
            split: self._records(folder, split, images, asked)
            for split, images in asked.items()
            if images
        }

    def place_of(self, item: Record) -> str:
        return f"{self.builder_config.images_dir}/{item['source']['group']}"

    def _keys(self, folder: Path, image: str) -> tuple[tuple[str, str], ...]:
        """By name, and by content: one picture may lie there under two names."""
        try:
            content = (folder / image).read_bytes()
        except OSError:  # told of when its record is made
            return (("image", image),)
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        return (("image", image), ("picture", digest))

    def _moved(self, asked: dict[str, dict[str, list[Question]]], kept: list[Member]) -> None:
        """Put the questions of images that the guard moved where it moved them."""
        stays = {(member.split, member.id) for member in kept}
        for split, images in asked.items():
            for image in [name for name in images if (split, name) not in stays]:
                questions = images.pop(image)
                asked.setdefault("train", {}).setdefault(image, []).extend(questions)
                self.counts[f"questions moved from {split} to train"] += len(questions)

    def _questions(self, path: Path) -> list[Question]:
        """The questions of a split file. UserError if it is none; damaged questions are told."""
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path}: not readable as JSON ({error})") from error
        if not isinstance(rows, list):
            raise UserError(f"{path}: must hold a list of questions")
        questions = []
        for number, row in enumerate(rows):
            where = f"{path.name}: question {number}"
            try:
                question = _question(row, where)
            except Found as error:
                self.report(error.problem)
                continue
            if question.question and question.answer:
                questions.append(question)
            else:
                self.report(Problem("empty field", where, "question or answer: left out", False))
        return questions

    def _records(
        self,
        folder: Path,
        split: str,
        images: dict[str, list[Question]],
        asked: dict[str, dict[str, list[Question]]],
    ) -> Iterator[Record]:
        for image, questions in images.items():
            try:
                pixels = _picture(folder / image, f"{folder.name}/{image}")
            except Found as error:
                self.report(error.problem)
                continue
            self.counts["images"] += 1
            self.counts["questions"] += len(questions)
            # Where leaks are allowed one image makes two records, which need two names.
            again = split != "train" and any(
                image in others for other, others in asked.items() if other != split
            )
            body_parts = {q.body_part for q in questions} - {""}
            yield {
                "id": f"vqa_rad-{Path(image).stem}" + (f"-{split}" if again else ""),
                "image": pixels,
                "rescale": (1.0, 0.0),
                "modality": "OT",  # not told; CT, MR and X-ray are windowed already
                "body_part": body_parts.pop() if len(body_parts) == 1 else "",
                "spacing_mm": (0.0, 0.0),
                "texts": {},
                "qa": [
                    {
                        "language": "en",
                        "question": question.question,
                        "answer": question.answer,
                        "type": question.type,
                        "choices": [],
                    }
                    for question in questions
                ],
                "segmentation": np.zeros((0, 0), np.uint8),
                "entities": [],
                "source": {"dataset": "VQA-RAD", "group": image, "licence": LICENCE},
            }


def _question(row: Any, where: str) -> Question:
    """A question of either layout; blanks around fields are no part of them."""
    if not isinstance(row, dict):
        raise Found("unreadable file", where, "is no object with fields")

    def field(name: str, required: bool = True) -> str:
        value = row.get(name)
        if value is None and not required:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise Found("unreadable file", where, f"has no text in field {name}")
        return str(value).strip()  # some copies hold numbers

    kind_field = next((name for name in TYPE_FIELDS if name in row), TYPE_FIELDS[0])
    kind = field(kind_field).lower()
    if kind not in ("open", "closed"):
        raise Found("unknown question type", where, f"{kind_field} {kind!r} is not open or closed")
    image = field("image_name")
    if not image or Path(image).name != image or image.startswith("."):
        raise Found("unreadable file", where, f"image_name {image!r} is no file name")
    return Question(
        image,
        field("question"),
        field("answer"),
        kind,
        field("image_organ", required=False).lower(),
    )


def _picture(path: Path, name: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise Found("missing file", name, "no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Found("unreadable file", name, f"the picture cannot be read ({error})") from error
