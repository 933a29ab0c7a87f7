"""phantom: drawn CT and MR slices with organs, captions and questions in English and German.

Needs no files. For the demo, the tests and for seeing whether a model can learn to point at all;
it holds no medicine. See drawing.py for what is drawn and texts.py for what is said.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from rg_jax.data.record import Record
from rg_jax.errors import UserError
from tfds_builders import common
from tfds_builders.phantom import drawing, texts


@dataclasses.dataclass(eq=False, kw_only=True)
class PhantomConfig(common.RecordConfig):
    """Parameters of the phantom; named after modality and size, e.g. 64, ct64, mr128-seed_1."""

    image_size: int = common.parameter(64, "side of the slices in pixels, 32 to 512")
    modality: str = common.parameter("both", "ct, mr or both", ("both", "ct", "mr"))
    train: int = common.parameter(6000, "slices in train")
    val: int = common.parameter(300, "slices in val")
    test: int = common.parameter(400, "slices in test")
    seed: int = common.parameter(0, "another seed draws other slices")
    organs: str = common.parameter(
        ",".join(drawing.DEFAULT_ORGANS), f"organs to draw, out of {', '.join(drawing.KINDS)}"
    )
    presence: float = common.parameter(0.6, "chance that an organ is meant to be in a slice")
    order: str = common.parameter("fixed", "in which order organs are named", texts.ORDERS)

    def derived_name(self) -> str:
        prefix = "" if self.modality == "both" else self.modality
        return f"{prefix}{self.image_size}" + self.deviations("modality", "image_size")

    def validate(self) -> None:
        if not 32 <= self.image_size <= 512:
            raise UserError(f"--image_size={self.image_size}: must be from 32 to 512")
        counts = [self.train, self.val, self.test]
        if min(counts) < 0 or not any(counts):
            raise UserError("--train, --val, --test: counts cannot be negative, nor all be 0")
        if self.seed < 0:
            raise UserError(f"--seed={self.seed}: cannot be negative")
        if not 0 < self.presence <= 1:
            raise UserError(f"--presence={self.presence}: must be above 0 and at most 1")
        for name in self.organs.split(","):
            if name.strip() not in drawing.KINDS:
                raise UserError(
                    f"--organs: {name!r} is not drawn; there are {', '.join(drawing.KINDS)}"
                )

    def organ_names(self) -> tuple[str, ...]:
        """The organs, in the order of texts, whatever the order of the flag."""
        chosen = {name.strip() for name in self.organs.split(",")}
        return tuple(name for name in drawing.KINDS if name in chosen)


class Builder(common.RecordBuilder):
    """Drawn CT and MR slices with organs, bilingual captions and questions. No medicine in it."""

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = PhantomConfig
    BUILDER_CONFIGS = [PhantomConfig(modality=modality) for modality in ("both", "ct", "mr")]
    IMAGE_DTYPE = "int16"
    CHANNELS = 1

    def splits(self, source: Path | None) -> dict[str, Iterator[Record]]:
        config = self.builder_config
        counts = {split: getattr(config, split) for split in drawing.SPLIT_CODES}
        self.expected = dict(counts)
        return {split: _records(config, split, count) for split, count in counts.items() if count}


def _records(config: PhantomConfig, split: str, count: int) -> Iterator[Record]:
    for index in range(count):
        yield make_record(config, split, index)


def make_record(config: PhantomConfig, split: str, index: int) -> Record:
    """Slice `index` of a split. The same whatever the counts: a larger build begins with it."""
    seed = (config.seed, drawing.SPLIT_CODES[split], index)
    rng = np.random.default_rng([*seed, 99])
    modality = "CT" if rng.random() < 0.5 else "MR"
    if config.modality != "both":
        modality = config.modality.upper()
    organ_names = config.organ_names()
    drawn = drawing.draw_slice(seed, config.image_size, modality, organ_names, config.presence)
    organs = drawing.read_slice(drawn.segmentation)
    record_id = f"phantom-{config.seed}-{split}-{index:06d}-{modality.lower()}"
    record = {
        "id": record_id,
        "image": drawn.image,
        "rescale": drawn.rescale,
        "modality": modality,
        "body_part": "abdomen",
        "spacing_mm": drawn.spacing_mm,
        "texts": {},
        "qa": [],
        "segmentation": drawn.segmentation,
        "entities": [],
        "source": {"dataset": "phantom", "group": record_id, "licence": "CC0-1.0"},
    }
    choice = int(rng.integers(2**31))
    for language in texts.LANGUAGES:
        told = texts.in_order(organs, config.order, language)
        text, spans = texts.caption(told, modality, language)
        # The same draws in both languages: the same context, the same questions.
        rng = np.random.default_rng(choice)
        information, question = texts.context(language, rng)
        record["texts"][language] = {
            "caption": text,
            "clinical_information": information,
            "clinical_question": question,
        }
        rows, answer_spans = texts.questions(told, modality, organ_names, language, rng)
        first = len(record["qa"])
        record["qa"] += rows
        fields = [("caption", *span) for span in spans]
        fields += [(f"qa/{first + row}/answer", *span) for row, *span in answer_spans]
        record["entities"] += [
            {
                "language": language,
                "field": field,
                "start": start,
                "end": end,
                "class_id": organ.class_id,
                "box": organ.box,
            }
            for field, start, end, organ in fields
        ]
    return record
