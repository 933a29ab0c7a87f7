"""One result per evaluated sample: what was asked, what came out, and how it scores.

`predictions.jsonl` holds one result a line, ordered by sample id, with everything that scoring and
the report page need; it can be read back and scored again without model or data set. A line names
the record (to find its picture) and holds no key of a patient.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from rg_jax.config import write_aside
from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation.embedder import Embedder
from rg_jax.evaluation.giou import (
    Match,
    SampleScore,
    ScoredEntity,
    place_iou_masks,
    score_sample,
)
from rg_jax.evaluation.masks import Mask, box_of, from_runs, predicted_masks, to_runs
from rg_jax.grounding.format import GroundingFormat
from rg_jax.grounding.spans import Entity, Malformed, parse


@dataclasses.dataclass(frozen=True)
class Result:
    """A sample with the model's answer.

    `prediction` is the marked text as generated; `text`, `entities` and `malformed` are what was
    read from it. Reference entities are the sample's own, at the source's resolution, not as the
    target rounds them to bins. With masks: `reference_masks` and `masks` run beside the sample's
    entities and beside `entities` (None where one has no mask), `mask_score` compares them, and an
    entity that came without a box has the box of its mask.
    """

    sample: Sample
    prediction: str
    text: str
    entities: tuple[Entity, ...]
    malformed: tuple[Malformed, ...]
    score: SampleScore
    reference_masks: tuple[Mask | None, ...] = ()
    masks: tuple[Mask | None, ...] = ()
    mask_score: SampleScore | None = None

    @property
    def grounded(self) -> bool:
        """Whether the reference says where something is: only then does `g_iou` count."""
        return bool(self.sample.entities)


def scored(
    entities: Iterable[Entity], masks: Sequence[Mask | None] | None = None
) -> list[ScoredEntity]:
    """Entities as the scorer takes them: with their boxes, or with `masks` instead."""
    if masks is None:
        return [ScoredEntity(e.mention, e.class_id, e.box) for e in entities]
    return [
        ScoredEntity(e.mention, e.class_id, mask) for e, mask in zip(entities, masks, strict=True)
    ]


def make_result(
    sample: Sample,
    prediction: str,
    fmt: GroundingFormat,
    embedder: Embedder | None = None,
    definition: str = "paper",
    masks: Bool[np.ndarray, "K M M"] | None = None,
    reference_masks: Sequence[Mask | None] = (),
) -> Result:
    """Read a generated text by the model's grounding format and score its entities.

    `masks`: what the mask decoder made of each `</seg>` of the text, in order, None without one.
    """
    read = parse(prediction, fmt)
    entities, found, mask_score = read.entities, (), None
    if masks is not None and sample.marks in ("masks", "both"):
        found = predicted_masks(masks, read.mask_indices)
        entities = tuple(
            e if e.box is not None or mask is None else dataclasses.replace(e, box=box_of(mask))
            for e, mask in zip(entities, found, strict=True)
        )
        mask_score = score_masks(sample.entities, reference_masks, entities, found, embedder)
    score = score_sample(scored(sample.entities), scored(entities), embedder, definition)
    return Result(
        sample,
        prediction,
        read.text,
        entities,
        read.malformed,
        score,
        tuple(reference_masks) if mask_score else (),
        found,
        mask_score,
    )


def rescore(result: Result, embedder: Embedder, definition: str = "paper") -> Result:
    """The same answer, its entities compared by another embedder or definition."""
    score = score_sample(
        scored(result.sample.entities), scored(result.entities), embedder, definition
    )
    mask_score = result.mask_score
    if mask_score is not None:
        mask_score = score_masks(
            result.sample.entities, result.reference_masks, result.entities, result.masks, embedder
        )
    return dataclasses.replace(result, score=score, mask_score=mask_score)


def score_masks(
    reference: Sequence[Entity],
    reference_masks: Sequence[Mask | None],
    predicted: Sequence[Entity],
    masks: Sequence[Mask | None],
    embedder: Embedder | None = None,
    definition: str = "paper",
) -> SampleScore:
    """The score of a sample by its masks.

    Entities that have only a box do not count, on neither side: a finding for which there is no
    mask is rightly answered without one. One whose `</seg>` found no slot counts, as empty.
    """
    kept = [i for i, mask in enumerate(reference_masks) if mask is not None]
    given = [i for i, entity in enumerate(predicted) if entity.mask]
    return score_sample(
        scored([reference[i] for i in kept], [reference_masks[i] for i in kept]),
        scored([predicted[i] for i in given], [masks[i] for i in given]),
        embedder,
        definition,
        place_iou_masks,
    )


def in_order(results: Iterable[Result]) -> list[Result]:
    """Results by sample id. Raises ValueError if two have the same one: something was evaluated
    twice, or two samples share a name."""
    ordered = sorted(results, key=lambda result: result.sample.id)
    for first, second in zip(ordered, ordered[1:], strict=False):
        if first.sample.id == second.sample.id:
            raise ValueError(f"two results for sample {first.sample.id!r}")
    return ordered


def write_results(path: str | Path, results: Iterable[Result]) -> None:
    """Write `predictions.jsonl`: whole or not at all, always in the same order."""
    lines = [
        json.dumps(_to_json(result), ensure_ascii=False, allow_nan=False)
        for result in in_order(results)
    ]
    write_aside(path, "".join(line + "\n" for line in lines))


def read_results(path: str | Path) -> list[Result]:
    """Read `predictions.jsonl` back. Raises UserError naming the line that cannot be read."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; run the evaluation first") from None
    results = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            results.append(_from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path}, line {number} is no result ({type(error).__name__}: {error}); "
                "run the evaluation again"
            ) from None
    return results


def _to_json(result: Result) -> dict[str, Any]:
    sample, score = result.sample, result.score
    return {
        "id": sample.id,
        "record_id": sample.record_id,
        "task": sample.task,
        "language": sample.language,
        "modality": sample.modality,
        "answer_type": sample.answer_type,
        "prompt": sample.prefix,
        "reference": sample.target,
        "reference_text": sample.text,
        "marks": sample.marks,
        "reference_entities": _entities_to_json(sample.entities, result.reference_masks),
        "prediction": result.prediction,
        "prediction_text": result.text,
        "prediction_entities": _entities_to_json(result.entities, result.masks),
        "malformed": [mark._asdict() for mark in result.malformed],
        "g_iou": score.g_iou,
        "matches": [match._asdict() for match in score.matches],
        "mask_scored": result.mask_score is not None,
        "mask_g_iou": None if result.mask_score is None else result.mask_score.g_iou,
        "counts": dict(sample.counts),
    }


def _entities_to_json(
    entities: Sequence[Entity], masks: Sequence[Mask | None]
) -> list[dict[str, Any]]:
    rows = [
        {
            "mention": e.mention,
            "start": e.start,
            "end": e.end,
            "class_id": e.class_id,
            "box": None if e.box is None else [float(edge) for edge in e.box],
            "mask": e.mask,
        }
        for e in entities
    ]
    for row, mask in zip(rows, masks, strict=bool(masks)):
        row["pixels"] = None if mask is None else to_runs(mask)
    return rows


def _from_json(row: dict[str, Any]) -> Result:
    entities = _entities_from_json(row["reference_entities"])
    sample = Sample(
        id=row["id"],
        record_id=row["record_id"],
        task=row["task"],
        language=row["language"],
        prefix=row["prompt"],
        target=row["reference"],
        text=row["reference_text"],
        entities=entities,
        answer_type=row["answer_type"],
        modality=row["modality"],
        counts=row["counts"],
        marks=row["marks"],
    )
    predicted = _entities_from_json(row["prediction_entities"])
    found, wanted = (_masks_from_json(row[f"{w}_entities"]) for w in ("prediction", "reference"))
    # A sample that is asked for masks counts even where neither side has one.
    scored = row.get("mask_scored", bool(wanted or found))
    mask_score = score_masks(entities, wanted, predicted, found) if scored else None
    score = SampleScore(
        row["g_iou"],
        tuple(entity.class_id for entity in entities),
        len(predicted),
        tuple(Match(**match) for match in row["matches"]),
    )
    malformed = tuple(Malformed(**mark) for mark in row["malformed"])
    return Result(
        sample,
        row["prediction"],
        row["prediction_text"],
        predicted,
        malformed,
        score,
        wanted,
        found,
        mask_score,
    )


def _entities_from_json(rows: Sequence[dict[str, Any]]) -> tuple[Entity, ...]:
    fields = [{k: v for k, v in row.items() if k != "pixels"} for row in rows]
    return tuple(
        Entity(**{**row, "box": None if row["box"] is None else tuple(row["box"])})
        for row in fields
    )


def _masks_from_json(rows: Sequence[dict[str, Any]]) -> tuple[Mask | None, ...]:
    if not any("pixels" in row for row in rows):
        return ()
    return tuple(None if row["pixels"] is None else from_runs(row["pixels"]) for row in rows)
