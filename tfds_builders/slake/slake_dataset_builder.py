"""slake: SLAKE 1.0 (Liu et al. 2021), public CT, MR and X-ray pictures with questions and boxes.

One record per image: its questions, and template questions about what is marked in it. Answers
that name a marked structure carry its box. Boxes and masks come from SLAKE, texts are unchanged.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from rg_jax.data.record import Record
from rg_jax.errors import UserError
from rg_jax.grounding.boxes import boxes_of_mask, iou
from rg_jax.grounding.prompts import grounded_questions
from rg_jax.grounding.spans import find_mentions
from tfds_builders import common
from tfds_builders.doubts import LEAST_OVERLAP, NO_OVERLAP
from tfds_builders.slake import files
from tfds_builders.slake.labels import LABELS, Label, label_of, surely_absent, zone_of
from tfds_builders.splits import Member

LICENCE = "CC BY-SA 4.0"
IMAGE_SHARES = {"train": 0.70, "val": 0.15, "test": 0.15}


@dataclasses.dataclass(eq=False, kw_only=True)
class SlakeConfig(common.RecordConfig):
    """Parameters; named after the split and the languages, e.g. official-en, image-en_zh."""

    split_by: str = common.parameter(
        "official",
        "official: the three files as they are; image: whole images drawn anew, 70 : 15 : 15",
        ("official", "image"),
    )
    languages: str = common.parameter("en", "languages of the questions to keep: en, zh or en,zh")
    leaks: str = common.parameter(
        "refuse",
        "images that occur in several official splits: refuse to build, move all of such an"
        " image's questions to train, or allow it",
        ("refuse", "move", "allow"),
    )
    templates: str = common.parameter(
        "en", "languages of the grounded template questions: en, de, en,de or none"
    )
    skip_bad: bool = common.parameter(
        False, "leave out images whose files are damaged instead of stopping"
    )

    def derived_name(self) -> str:
        return f"{self.split_by}-{self.languages.replace(',', '_')}" + self.deviations(
            "split_by", "languages"
        )

    def validate(self) -> None:
        for flag, known in (("languages", ("en", "zh")), ("templates", ("en", "de", "none"))):
            for language in getattr(self, flag).split(","):
                if language not in known:
                    raise UserError(f"--{flag}: {language!r} is not one of {', '.join(known)}")
        if "none" in self.templates and self.templates != "none":
            raise UserError(f"--templates={self.templates}: none goes with no language")

    def template_languages(self) -> tuple[str, ...]:
        return () if self.templates == "none" else tuple(self.templates.split(","))


class Builder(common.RecordBuilder):
    """SLAKE 1.0 (Liu et al. 2021, CC BY-SA 4.0): questions, boxes and masks on 642 images."""

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = SlakeConfig
    BUILDER_CONFIGS = [
        SlakeConfig(),
        SlakeConfig(split_by="image"),
        SlakeConfig(split_by="image", languages="en,zh"),
    ]
    SOURCE = "the folder of SLAKE 1.0 with train.json, validate.json, test.json, mask.txt and imgs/"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download SLAKE 1.0 from https://www.med-vqa.com/slake and unpack it; the folder with"
        " train.json, validate.json, test.json, mask.txt and imgs/ is the source."
    )
    IMAGE_DTYPE = "uint8"
    CHANNELS = 3

    def splits(self, source: Path) -> dict[str, Iterator[Record]]:
        config = self.builder_config
        kept = config.languages.split(",")
        grouped: dict[str, dict[str, list[files.Question]]] = {}
        for split, file_name in files.SPLIT_FILES.items():
            images = grouped[split] = {}
            questions = self.or_problem(
                files.read_questions, source / file_name, self.counts, self.report
            )
            for question in questions or ():
                if question.language in kept:
                    images.setdefault(question.image, []).append(question)
                else:
                    self.counts["questions in other languages, left out"] += 1
        if config.split_by == "image":
            grouped = _split_by_image(grouped)
        else:
            self._guard(source, grouped)
        if not any(grouped.values()):
            raise UserError(f"{source}: no question in the languages {config.languages}")
        table = files.read_mask_table(source / "mask.txt")
        self._unknown_labels: dict[str, None] = {}
        self._images = {split: images.keys() for split, images in grouped.items()}
        self.expected = {split: len(images) for split, images in grouped.items()}
        return {
            split: self._records(source, split, images, table)
            for split, images in grouped.items()
            if images
        }

    def _guard(self, source: Path, grouped: dict[str, dict[str, list[files.Question]]]) -> None:
        """Refuse images that are in more than one split, or move them to train."""
        members = [
            Member(name, split, _keys(source, name), files.SPLIT_FILES[split])
            for split, images in grouped.items()
            for name in images
        ]
        languages = self.builder_config.languages
        alone = "" if languages == "en" else ", or --languages=en"
        hint = f" (languages {languages}); or use --split_by=image{alone}"
        stays = {(member.split, member.id) for member in self.guard(members, hint)}
        for split in ("val", "test"):
            for name in [name for name in grouped[split] if (split, name) not in stays]:
                questions = grouped[split].pop(name)
                grouped["train"].setdefault(name, []).extend(questions)
                self.counts[f"questions moved from {split} to train"] += len(questions)

    def _records(
        self,
        source: Path,
        split: str,
        images: dict[str, list[files.Question]],
        table: dict[int, Label],
    ) -> Iterator[Record]:
        for name, questions in images.items():
            try:
                record = self._record(source / "imgs" / name, name, questions, table)
            except common.Found as error:
                self.report(error.problem)
                self.notes.append(f"left out: {error}")
                continue
            if split != "train" and sum(name in names for names in self._images.values()) > 1:
                record["id"] += f"-{split}"  # leaks are allowed: one image, two records
            yield record

    def _record(
        self, folder: Path, name: str, questions: list[files.Question], table: dict[int, Label]
    ) -> Record:
        image = files.read_picture(folder / "source.jpg")
        size = image.shape[:2]
        boxes = files.read_boxes(folder / "detection.json", size, self.counts)
        values = files.read_mask(folder / "mask.png", size)
        apart = self._compare(folder, values, boxes, table)
        # Which of the two is right nobody knows: such a label is neither marked nor called absent.
        marked_in_mask = {table[v].name for v in np.unique(values).tolist() if v in table}
        marked_in_mask |= boxes.keys()
        boxes = {name: box for name, box in boxes.items() if name not in apart}
        values[np.isin(values, [v for v, label in table.items() if label.name in apart])] = 0
        for other in questions[1:]:
            if (other.modality, other.location) != (questions[0].modality, questions[0].location):
                self.counts["questions that disagree on modality or location of their image"] += 1
        for label in boxes:
            if label not in LABELS and label not in self._unknown_labels:
                self._unknown_labels[label] = None
                self.notes.append(f"label {label!r} is not in the table: no class, never absent")
        modality, location = questions[0].modality, questions[0].location
        self.counts["images"] += 1
        self.counts["images without boxes"] += not boxes
        record = {
            "id": f"slake-{name}",
            "image": image,
            "rescale": (1.0, 0.0),
            "modality": modality,
            "body_part": location.replace("_", " ").lower(),
            "spacing_mm": (0.0, 0.0),
            "texts": {},
            "qa": [],
            "segmentation": self._segmentation(values, table),
            "entities": [],
            "source": {"dataset": "SLAKE 1.0", "group": name, "licence": LICENCE},
        }
        for question in questions:
            self.counts["questions"] += 1
            spans = []
            if question.language == "en":
                spans = list(self._tag(question.answer, boxes))
                self.counts["answers with a box"] += bool(spans)
            _add(record, question.language, question, question.type, spans)
        for language in self.builder_config.template_languages():
            self._add_templates(record, language, name, boxes, marked_in_mask, location)
        return record

    def _tag(self, answer: str, boxes: dict[str, files.Box]):
        """(start, end, label, box) of the labels that the answer names and the image has boxes of.

        All labels are looked for, so that "Liver Cancer" without a box is not taken for "Liver".
        """
        known = [label_of(name) for name in (*LABELS, *boxes)]
        mentions = [(form, label.name) for label in known for form in label.mention_forms()]
        for start, end, name in find_mentions(answer, mentions, lambda _: True, ignore_case=True):
            if name in boxes:
                yield start, end, label_of(name), boxes[name]
            else:
                self.counts["mentions in answers without a box"] += 1

    def _add_templates(self, record, language, name, boxes, marked_in_mask, location) -> None:
        zone = zone_of(location)
        self.counts["images of unknown zone, no absent structures asked for"] += not zone
        candidates = [
            label
            for label in LABELS.values()
            if surely_absent(label, zone)
            and label.name not in boxes
            and label.name not in marked_in_mask
        ]
        # The image decides the draw, not its place in the files nor Python's hash seed.
        rng = np.random.default_rng(list(hashlib.sha256(f"{name} {language}".encode()).digest()))
        count = min(max(1, len(boxes)), 3, len(candidates))
        absent = [candidates[i] for i in rng.choice(len(candidates), count, replace=False)]
        present = [label_of(label) for label in boxes]
        made = grounded_questions(
            [(label.class_id, label.display(language)) for label in present],
            [(label.class_id, label.display(language)) for label in absent],
            language,
            rng,
        )
        by_name = {label.display(language): label for label in present}
        for question in made:
            named = [
                (start, end, by_name[question.answer[start:end]])
                for start, end, _ in question.mentions
            ]
            spans = [(start, end, label, boxes[label.name]) for start, end, label in named]
            self.counts["template questions"] += 1
            self.counts["template questions with boxes"] += bool(spans)
            _add(record, language, question, "grounded", spans)

    def _segmentation(self, values, table: dict[int, Label]):
        """Our class ids; labels without a class and unknown values become background."""
        lookup = np.zeros(256, np.uint8)
        for value, label in table.items():
            lookup[value] = label.class_id
        return lookup[values]

    def _compare(self, folder: Path, values, boxes, table: dict[int, Label]) -> set[str]:
        """Count where mask and boxes tell different things; labels for which they lie apart."""
        in_mask: dict[str, files.Box] = {}
        for value, box in boxes_of_mask(values).items():
            if value in table:
                in_mask[table[value].name] = tuple(map(float, box))
            else:
                self.counts["mask values that mask.txt does not know, left out"] += 1
                self.notes.append(f"{folder / 'mask.png'}: value {value} is not in mask.txt")
        self.counts["labels in a mask without a box"] += len(in_mask.keys() - boxes.keys())
        both = in_mask.keys() & boxes.keys()
        overlaps = {name: iou(in_mask[name], boxes[name]) for name in both}
        apart = {name for name, overlap in overlaps.items() if overlap < NO_OVERLAP}
        self.counts["labels with mask and box"] += len(both)
        self.counts[f"of these with an overlap (IoU) under {LEAST_OVERLAP}"] += sum(
            overlap < LEAST_OVERLAP for overlap in overlaps.values()
        )
        what = f"of these without a place, since mask and box lie apart (IoU under {NO_OVERLAP})"
        self.counts[what] += len(apart)
        for name in sorted(apart):
            self.notes.append(f"{folder}: mask and box of {name!r} lie apart, neither is used")
        return apart


def _keys(source: Path, name: str) -> tuple[tuple[str, str], ...]:
    """By name, and by content: one picture may lie there under two names."""
    try:
        content = (source / "imgs" / name / "source.jpg").read_bytes()
    except OSError:  # told of when its record is made
        return (("image", name),)
    return (("image", name), ("picture", hashlib.blake2b(content, digest_size=8).hexdigest()))


def _add(record: Record, language: str, question, kind: str, spans) -> None:
    """A question (anything with `question` and `answer`) and the entities of its answer."""
    field = f"qa/{len(record['qa'])}/answer"
    record["qa"].append(
        {
            "language": language,
            "question": question.question,
            "answer": question.answer,
            "type": kind,
            "choices": [],
        }
    )
    record["entities"] += [
        {
            "language": language,
            "field": field,
            "start": start,
            "end": end,
            "class_id": label.class_id,
            "box": box,
        }
        for start, end, label, box in spans
    ]


def _split_by_image(grouped: dict[str, dict[str, list[files.Question]]]):
    """All questions of an image in one split, whichever files they came from."""
    images: dict[str, list[files.Question]] = {}
    for split_images in grouped.values():
        for name, questions in split_images.items():
            images.setdefault(name, []).extend(questions)
    # By a hash of the name: the same wherever it is run, and unlike the order of the files, in
    # which neighbours are slices of one volume.
    order = sorted(images, key=lambda name: hashlib.sha256(f"slake {name}".encode()).hexdigest())
    ends = np.rint(np.cumsum(list(IMAGE_SHARES.values())) * len(order)).astype(int).tolist()
    starts = [0, *ends[:-1]]
    return {
        split: {name: images[name] for name in order[start:end]}
        for split, start, end in zip(IMAGE_SHARES, starts, ends, strict=True)
    }
