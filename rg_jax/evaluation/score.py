"""All figures of one evaluation: the content of `metrics.json`.

Every figure is {"mean", "low", "high", "n"}: the value, its 95 % bootstrap interval and the number
of samples behind it; where there is none, the first three are null and n is 0. Rates and scores
are shares in [0, 1]. NaN never gets in.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation import figures, giou, text_metrics
from rg_jax.evaluation.baseline import BlindBaseline
from rg_jax.evaluation.bootstrap import RESAMPLES, Statistic, intervals, mean
from rg_jax.evaluation.embedder import Embedder, ExactEmbedder
from rg_jax.evaluation.giou import SampleScore, ScoredEntity, score_sample
from rg_jax.evaluation.published_figures import comparable
from rg_jax.evaluation.results import Result, in_order, scored
from rg_jax.grounding import anatomy

GROUPS: dict[str, Callable[[Sample], str]] = {
    "task": lambda sample: sample.task,
    "language": lambda sample: sample.language,
    "modality": lambda sample: sample.modality,
    "answer_type": lambda sample: sample.answer_type,
}


def score_results(
    results: Sequence[Result],
    *,
    data: str,
    split: str,
    embedder: Embedder | None = None,
    definition: str = "paper",
    remover: str = "ours",
    baseline: BlindBaseline | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures of a set of results, ready to be written as JSON.

    At the top level stand those of the whole set: `g_iou` and its companions (see `giou`), with a
    `baseline` also `baseline_g_iou`, `baseline_told_mentions_g_iou` and what the model is above
    each of them as a paired difference (`g_iou_over_baseline`, …); `text_<score>_<kind>` for the
    scores f1, accuracy, recall, rouge_l, cider, bleu1, bleu4 and the kinds of answer that occur
    (caption, open, closed, grounded; questions: open and closed together); `malformed_rate`, the
    share of outputs with a broken mark. CIDEr has a scale of 0 to 10 and takes the words' weights
    from all captions or all questions of the set, also where it stands for a part of it.

    Then `by_task`, `by_language`, `by_modality`, `by_answer_type`, `by_class`; `by_definition`,
    G-IoU and companions by each definition; the baselines' own figures; `published`, figures of
    others on the same data (see `published_figures`); `counts` (with `counts` added) and `set`,
    which says what was evaluated and how (with `about` added).

    Samples whose reference holds no entity take part in no grounding score except precision and
    the false-entity figures. Embedder and definition are those the results were scored with;
    `remover`: see `figures.REMOVERS`. Raises UserError if there is nothing to score, or for an
    unknown answer type.
    """
    if not results:
        raise UserError(f"no sample of {data} ({split}) was evaluated: nothing to score")
    results = in_order(results)
    embedder = embedder or ExactEmbedder()
    samples = [result.sample for result in results]
    bootstrap = {"resamples": resamples, "seed": seed}

    whole = figures.statistics(results, embedder=embedder, definition=definition, remover=remover)
    rivals: dict[str, list[SampleScore]] = {}
    if baseline is not None:
        ours = figures.points([r.score for r in results], definition)
        for name, answer in (
            ("baseline", baseline.constant),
            ("baseline_told_mentions", baseline.told_mentions),
        ):
            rivals[name] = _scores(samples, answer, embedder, definition)
            theirs = figures.points(rivals[name], definition)
            whole[f"{name}_g_iou"] = mean(theirs)
            whole[f"g_iou_over_{name}"] = mean(ours - theirs)

    metrics, by_definition, by_class = figures.split(intervals(whole, **bootstrap))
    for name, scores in rivals.items():
        found = intervals(giou.statistics(scores, definition), **bootstrap)
        metrics[f"{name}_metrics"] = _without_empty(found)
    of_groups, _, _ = figures.split(whole)
    for group, key in GROUPS.items():
        metrics[f"by_{group}"] = {
            value: _group(of_groups, rows, bootstrap)
            for value, rows in rows_by(samples, key).items()
        }
    if rivals:
        told = giou.class_statistics(rivals["baseline_told_mentions"])
        for class_id, found in told.items():
            figure = intervals({"iou": found["iou"]}, **bootstrap)["iou"]
            by_class[class_id]["baseline_told_mentions_iou"] = figure
    metrics["by_class"] = {anatomy.name_of(c): found for c, found in by_class.items()}
    if by_definition:
        metrics["by_definition"] = {
            name: _without_empty(found) for name, found in by_definition.items()
        }
    metrics["counts"] = _counts(results, remover)
    metrics["counts"] |= baseline.fallbacks(samples) if baseline else {}
    metrics["counts"] |= dict(counts or {})
    metrics["set"] = {
        "data": data,
        "split": split,
        "n": len(results),
        "definition": definition,
        "embedder": embedder.name,
        "resamples": resamples,
        "seed": seed,
        **({} if remover == "ours" else {"marks_removed": remover}),
        **dict(about or {}),
    }
    published = comparable(metrics)
    if published:
        metrics["published"] = published
    return metrics


def write_metrics(path: str | Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json`, whole or not at all. Raises ValueError on NaN: JSON has none."""
    write_aside(path, json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _scores(
    samples: Sequence[Sample],
    answer: Callable[[Sample], list[ScoredEntity]],
    embedder: Embedder,
    definition: str,
) -> list[SampleScore]:
    return [
        score_sample(scored(sample.entities), answer(sample), embedder, definition)
        for sample in samples
    ]


def rows_by(samples: Sequence[Sample], key: Callable[[Sample], str]) -> dict[str, list[int]]:
    """Which rows belong to each value of `key`, in the order of the values."""
    groups: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(key(sample) or "unknown", []).append(row)
    return dict(sorted(groups.items()))


def _group(whole: Mapping[str, Statistic], rows: list[int], bootstrap: Mapping) -> dict[str, Any]:
    """Figures of some of the samples, those that have none left out."""
    chosen = {name: s.rows(rows) for name, s in whole.items() if s.part[rows].any()}
    return _without_empty(intervals(chosen, **bootstrap))


def _without_empty(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figure for name, figure in found.items() if figure["n"] > 0}


def _counts(results: Sequence[Result], remover: str) -> dict[str, Any]:
    """What was evaluated, cut and malformed."""
    cut: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for result in results:
        cut.update(result.sample.counts)
        broken.update(mark.kind for mark in result.malformed)
        kinds.update([figures.kind_of(result)])
    closed = [r for r in results if figures.kind_of(r) == "closed"]
    by_emptiness = [
        pair for pair in figures.text_pairs(closed, remover) if not text_metrics.comparable(*pair)
    ]
    without_slot = sum(
        entity.mask and mask is None
        for r in results
        for entity, mask in zip(r.entities, r.masks, strict=bool(r.masks))
    )
    return {
        "samples": len(results),
        "records": len({r.sample.record_id for r in results}),
        **{f"samples_{kind}": n for kind, n in sorted(kinds.items())},
        "samples_with_reference_entities": sum(r.grounded for r in results),
        "reference_entities": sum(r.score.n_reference for r in results),
        "predicted_entities": sum(r.score.n_predicted for r in results),
        "empty_predictions": sum(not r.text.strip() for r in results),
        "malformed_marks": sum(broken.values()),
        **{f"malformed_{kind}": n for kind, n in sorted(broken.items())},
        "closed_answers_equal_by_emptiness": len(by_emptiness),
        **({"predicted_masks_without_slot": without_slot} if without_slot else {}),
        **dict(sorted(cut.items())),
    }
