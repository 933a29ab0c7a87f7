"""What one scores without looking at the picture: the floor under every grounding figure.

Organs stand where they usually stand, so boxes learned by heart already score. Two baselines, both
fitted on training samples alone and scored like a model:

- the constant answer: one fixed set of structures per task and language (the prompt tells those
  two), each with its mean training box, chosen to maximise the training G-IoU;
- told the mentions: for every mention of the *reference*, the mean training box of its class. It
  names everything right, so what a model gains over it, it gains by placing boxes alone.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation.giou import ScoredEntity
from rg_jax.grounding.boxes import Box
from rg_jax.grounding.spans import Entity

MOST_SAMPLES = 20_000  # per task and language; more do not move a mean box
MOST_STRUCTURES = 256
PATIENCE = 8  # structures added without gain before the search ends

Group = tuple[str, str]  # task, language


def structure_of(mention: str, class_id: int) -> str:
    """What boxes are averaged over: the class, or the mention itself where there is no class."""
    return f"#{class_id}" if class_id else mention.lower()


@dataclasses.dataclass(frozen=True)
class BlindBaseline:
    """The two fitted baselines. `mean_boxes` is keyed by `structure_of`."""

    constants: Mapping[Group, tuple[ScoredEntity, ...]]
    training_g_iou: Mapping[Group, float]
    mean_boxes: Mapping[str, Box]
    overall_box: Box

    @classmethod
    def fit(cls, samples: Iterable[Sample]) -> "BlindBaseline":
        """Fit on training samples; those without entities do not matter.

        Raises UserError if no sample has an entity with a box.
        """
        groups: dict[Group, list[Sample]] = defaultdict(list)
        for sample in samples:
            if any(entity.box is not None for entity in sample.entities):
                groups[(sample.task, sample.language)].append(sample)
        if not groups:
            raise UserError(
                "no training sample says where anything is: the blind baseline cannot be fitted; "
                "evaluate without it, or give the training set of a grounded task"
            )
        used = {group: _evenly(found, MOST_SAMPLES) for group, found in sorted(groups.items())}
        boxes = defaultdict(list)
        for found in used.values():
            for sample in found:
                for structure, entity in _first_of_each(sample).items():
                    boxes[structure].append(entity.box)
        means = {structure: _mean(found) for structure, found in boxes.items()}
        overall = _mean([box for found in boxes.values() for box in found])
        constants, reached = {}, {}
        for group, found in used.items():
            constants[group], reached[group] = _best_constant(found)
        return cls(constants, reached, means, overall)

    def constant(self, sample: Sample) -> list[ScoredEntity]:
        """The constant answer to the sample's task and language.

        Without training samples for those two: that of the same task, else of the same language,
        else the first one; `fallbacks` counts such samples.
        """
        group = (sample.task, sample.language)
        if group not in self.constants:
            alike = [g for g in self.constants if g[0] == sample.task]
            alike += [g for g in self.constants if g[1] == sample.language]
            group = [*alike, *self.constants][0]
        return list(self.constants[group])

    def told_mentions(self, sample: Sample) -> list[ScoredEntity]:
        """The sample's own mentions, each with the mean training box of its class.

        A class without a training box gets the mean of all boxes; `fallbacks` counts them.
        """
        return [
            ScoredEntity(
                e.mention,
                e.class_id,
                self.mean_boxes.get(structure_of(e.mention, e.class_id), self.overall_box),
            )
            for e in sample.entities
        ]

    def fallbacks(self, samples: Iterable[Sample]) -> dict[str, int]:
        """How often evaluation met what training had not: samples and entities."""
        counts = {"baseline_unseen_tasks": 0, "baseline_unseen_structures": 0}
        for sample in samples:
            unseen = (sample.task, sample.language) not in self.constants
            counts["baseline_unseen_tasks"] += bool(sample.entities) and unseen
            counts["baseline_unseen_structures"] += sum(
                structure_of(e.mention, e.class_id) not in self.mean_boxes for e in sample.entities
            )
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, to be kept with a run: evaluation then needs no training data."""
        return {
            "constants": [
                {
                    "task": task,
                    "language": language,
                    "training_g_iou": self.training_g_iou[(task, language)],
                    "entities": [
                        {"mention": e.mention, "class_id": e.class_id, "box": list(e.place)}
                        for e in entities
                    ],
                }
                for (task, language), entities in self.constants.items()
            ],
            "mean_boxes": {key: list(box) for key, box in self.mean_boxes.items()},
            "overall_box": list(self.overall_box),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BlindBaseline":
        """Inverse of `to_json`. Raises ValueError if something is missing."""
        try:
            rows = values["constants"]
            return cls(
                {
                    (row["task"], row["language"]): tuple(
                        ScoredEntity(e["mention"], e["class_id"], tuple(e["box"]))
                        for e in row["entities"]
                    )
                    for row in rows
                },
                {(row["task"], row["language"]): row["training_g_iou"] for row in rows},
                {key: tuple(box) for key, box in values["mean_boxes"].items()},
                tuple(values["overall_box"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a stored blind baseline: {error!r}") from None


def _evenly(samples: list[Sample], most: int) -> list[Sample]:
    if len(samples) <= most:
        return samples
    return [samples[k] for k in np.linspace(0, len(samples) - 1, most).round().astype(int)]


def _first_of_each(sample: Sample) -> dict[str, Entity]:
    """One entity per structure: further mentions of a class have the same box."""
    found: dict[str, Entity] = {}
    for entity in sample.entities:
        if entity.box is not None:
            found.setdefault(structure_of(entity.mention, entity.class_id), entity)
    return found


def _mean(boxes: Sequence[Box]) -> Box:
    return tuple(float(edge) for edge in np.mean(np.asarray(boxes, np.float64), axis=0))


def _iou_with(
    box: Float[np.ndarray, "4"], others: Float[np.ndarray, "n 4"]
) -> Float[np.ndarray, " n"]:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return shared / np.maximum(areas - shared, 1e-12)


def _best_constant(samples: Sequence[Sample]) -> tuple[tuple[ScoredEntity, ...], float]:
    """Add the structure that raises the mean training G-IoU most, again and again.

    A constant set S scores Σ over its structures in the sample of IoU / max(|S|, entities of the
    sample), since the mentions of a structure it names are alike by class. The search goes on for
    a while after the score falls, and the best set met is taken.
    """
    firsts = [_first_of_each(sample) for sample in samples]
    counts = Counter(structure for first in firsts for structure in first)
    structures = [structure for structure, _ in counts.most_common(MOST_STRUCTURES)]
    overlap = np.zeros((len(samples), len(structures)), np.float32)
    entities = []
    for column, structure in enumerate(structures):
        rows = [row for row, first in enumerate(firsts) if structure in first]
        boxes = np.asarray([firsts[row][structure].box for row in rows], np.float64)
        box = boxes.mean(axis=0)
        overlap[rows, column] = _iou_with(box, boxes)
        mentions = Counter(
            entity.mention
            for row in rows
            for entity in samples[row].entities
            if structure_of(entity.mention, entity.class_id) == structure
        )
        mention = min(mentions, key=lambda text: (-mentions[text], text))
        class_id = firsts[rows[0]][structure].class_id
        entities.append(ScoredEntity(mention, class_id, tuple(float(edge) for edge in box)))

    sizes = np.array([len(sample.entities) for sample in samples], np.float32)
    reached = np.zeros(len(samples), np.float32)
    chosen: list[int] = []
    best: tuple[float, int] = (0.0, 0)
    left = list(range(len(structures)))
    while left and len(chosen) - best[1] < PATIENCE:
        weight = 1 / np.maximum(sizes, len(chosen) + 1)
        gains = weight @ overlap[:, left]
        pick = left.pop(int(np.argmax(gains)))
        reached += overlap[:, pick]
        chosen.append(pick)
        score = float((reached * weight).mean())
        if score > best[0]:
            best = (score, len(chosen))
    return tuple(entities[k] for k in chosen[: best[1]]), best[0]
