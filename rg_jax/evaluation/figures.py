"""Every figure of an evaluation as a function of its samples, by name.

`statistics` turns results into `bootstrap.Statistic`s once; whoever reports them takes all rows,
those of one language, or those that two runs share. Names with a "/" belong to one definition of
G-IoU ("definition/paper/g_iou"), or to one class ("class/5/iou"); see `split`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rg_jax.errors import UserError
from rg_jax.evaluation import caption_metrics, giou, masks, text_metrics
from rg_jax.evaluation.bootstrap import Statistic, mean
from rg_jax.evaluation.embedder import Embedder, ExactEmbedder
from rg_jax.evaluation.giou import DEFINITIONS, SampleScore, score_sample
from rg_jax.evaluation.results import Result, score_masks, scored
from rg_jax.grounding.published import strip_published

# Texts are reported apart by what kind of answer they are, which is what the data says they are.
KINDS = {
    "caption": "caption",
    "open": "open",
    "closed": "closed",
    "yesno": "closed",
    "multiple": "closed",
    "grounded": "grounded",
}
# Open and closed questions together, where there are both: some published figures are that.
QUESTIONS = "questions"
# CIDEr weighs words by the references around a text: those of captions, those of all questions.
CORPUS_OF_KIND = {
    "caption": "caption",
    "open": QUESTIONS,
    "closed": QUESTIONS,
    "grounded": "grounded",
}
TEXT_SCORES: dict[str, Callable[[str, str], float]] = {
    "text_f1": text_metrics.f1,
    "text_accuracy": text_metrics.accuracy,
    "text_recall": text_metrics.recall,
    "text_rouge_l": caption_metrics.rouge_l,
}
# What is told of masks beside their G-IoU.
MASK_FIGURES = ("g_iou", "matched_iou", "precision_50", "recall_50", "f1_50", "miou")

# How marks are removed from a generated text before it is compared as text.
REMOVERS: dict[str, Callable[[Result], str]] = {
    "ours": lambda result: result.text,
    "published_boxes": lambda r: strip_published(r.prediction, boxes=True, masks=False),
    "published_masks": lambda r: strip_published(r.prediction, boxes=False, masks=True),
    "published_both": lambda r: strip_published(r.prediction, boxes=True, masks=True),
}


def kind_of(result: Result) -> str:
    """The kind of answer. Raises UserError for a type that the data should not have."""
    answer_type = result.sample.answer_type
    if answer_type not in KINDS:
        raise UserError(
            f"sample {result.sample.id}: answer type {answer_type!r} is not one of "
            f"{', '.join(KINDS)}"
        )
    return KINDS[answer_type]


def text_pairs(results: Sequence[Result], remover: str = "ours") -> list[tuple[str, str]]:
    """(candidate, reference) as the text metrics compare them."""
    removed = REMOVERS[remover]
    return [(text_metrics.final_answer(removed(r)), r.sample.text) for r in results]


def statistics(
    results: Sequence[Result],
    *,
    embedder: Embedder | None = None,
    definition: str = "paper",
    remover: str = "ours",
) -> dict[str, Statistic]:
    """All figures of these results: places, masks where there are some, texts, broken marks.

    `g_iou` and its companions are by `definition`, as the results were scored; the same by each
    of the definitions are "definition/<name>/<figure>", where any reference has entities.
    """
    embedder = embedder or ExactEmbedder()
    scores = [result.score for result in results]
    chosen = giou.statistics(scores, definition)
    found = dict(chosen)
    for class_id, figures in giou.class_statistics(scores).items():
        found |= {f"class/{class_id}/{name}": figure for name, figure in figures.items()}
    if any(result.grounded for result in results):
        for name in DEFINITIONS:
            of_name = (
                chosen
                if name == definition
                else giou.statistics(rescored(results, embedder, name), name)
            )
            found |= {f"definition/{name}/{figure}": s for figure, s in of_name.items()}
    return found | _masks(results, embedder) | _texts(results, remover)


def rescored(
    results: Sequence[Result], embedder: Embedder, definition: str = "paper"
) -> list[SampleScore]:
    """The entities of results, scored anew by their boxes."""
    return [
        score_sample(scored(r.sample.entities), scored(r.entities), embedder, definition)
        for r in results
    ]


def points(scores: Sequence[SampleScore], definition: str) -> np.ndarray:
    """Sample scores, NaN where the data set score leaves the sample out."""
    everywhere = definition == "published_segmentation"
    return np.array(
        [
            s.g_iou if (everywhere or s.n_reference) and s.g_iou is not None else np.nan
            for s in scores
        ],
        np.float64,
    )


def split(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict], dict[int, dict]]:
    """Figures by their flat names → (those of the set, by definition, by class id)."""
    plain: dict[str, Any] = {}
    by_definition: dict[str, dict[str, Any]] = {}
    by_class: dict[int, dict[str, Any]] = {}
    for name, figure in found.items():
        group, _, rest = name.partition("/")
        key, _, short = rest.partition("/")
        if group == "definition":
            by_definition.setdefault(key, {})[short] = figure
        elif group == "class":
            by_class.setdefault(int(key), {})[short] = figure
        else:
            plain[name] = figure
    return plain, by_definition, by_class


NOTHING = SampleScore(None, (), 0, ())


def _masks(results: Sequence[Result], embedder: Embedder) -> dict[str, Statistic]:
    """Figures of the masks by the paper's definition and the published one, and Dice."""
    with_masks = np.array([r.mask_score is not None for r in results], bool)
    if not with_masks.any():
        return {}
    scores = [r.mask_score or NOTHING for r in results]
    of_paper = giou.statistics(scores, "paper")
    found = {f"mask_{name}": of_paper[name] for name in MASK_FIGURES}
    # Dice goes the same ways as IoU: over matched pairs, and per class with unmatched ones at 0.
    in_dice = [
        dataclasses.replace(s, matches=tuple(m._replace(iou=masks.dice(m.iou)) for m in s.matches))
        for s in scores
    ]
    of_dice = giou.statistics(in_dice, "paper")
    found["mask_dice"], found["mask_dice_over_classes"] = of_dice["matched_iou"], of_dice["miou"]
    for name, score_of in (
        ("mask_g_iou_published_segmentation", "published_segmentation"),
        ("mask_g_iou_published_detection", "published_detection"),
    ):
        others = [
            score_masks(
                r.sample.entities, r.reference_masks, r.entities, r.masks, embedder, score_of
            )
            if r.mask_score is not None
            else NOTHING
            for r in results
        ]
        # Only samples that were asked for masks have a part, even where "nothing" scores 1.
        found[name] = mean(np.where(with_masks, points(others, score_of), np.nan))
    # Boxes around the masks, on the scale of boxes that were written.
    around = [_box_score(r, embedder) if r.mask_score is not None else NOTHING for r in results]
    found["mask_box_g_iou"] = giou.statistics(around, "paper")["g_iou"]
    dice_by_class = giou.class_statistics(in_dice)
    for class_id, figures in giou.class_statistics(scores).items():
        found[f"class/{class_id}/mask_iou"] = figures["iou"]
        found[f"class/{class_id}/mask_dice"] = dice_by_class[class_id]["iou"]
    return found


def _box_score(result: Result, embedder: Embedder) -> SampleScore:
    around = [
        dataclasses.replace(entity, box=None if mask is None else masks.box_of(mask))
        for entity, mask in zip(result.entities, result.masks, strict=True)
    ]
    return score_sample(scored(result.sample.entities), scored(around), embedder)


def _texts(results: Sequence[Result], remover: str) -> dict[str, Statistic]:
    """Text scores apart by kind of answer, and the rate of broken marks."""
    kinds = np.array([kind_of(result) for result in results])
    pairs = text_pairs(results, remover)
    groups = {
        kind: kinds == kind for kind in dict.fromkeys(KINDS.values()) if (kinds == kind).any()
    }
    if "open" in groups and "closed" in groups:
        groups[QUESTIONS] = groups["open"] | groups["closed"]
    values = {
        name: np.array([function(*pair) for pair in pairs])
        for name, function in TEXT_SCORES.items()
    }
    values["text_cider"] = _ciders(pairs, kinds)
    counts = np.array([caption_metrics.bleu_counts(*pair) for pair in pairs], np.float64)
    found = {}
    for kind, chosen in groups.items():
        for name, column in values.items():
            found[f"{name}_{kind}"] = mean(np.where(chosen, column, np.nan))
        # Both BLEUs share one table, so that its columns are resampled once.
        table = counts * chosen[:, None]
        for words in (1, 4):
            found[f"text_bleu{words}_{kind}"] = Statistic(table, _BLEU[words], chosen)
    broken = np.array([float(bool(result.malformed)) for result in results])
    return found | {"malformed_rate": mean(broken)}


def _bleu_of(words: int) -> Callable[[np.ndarray], np.ndarray]:
    def of_sums(sums: np.ndarray) -> np.ndarray:
        # A resample that holds no text of this kind has no BLEU.
        score = caption_metrics.bleu(sums)[..., words - 1]
        return np.where(sums[..., -1] > 0, score, np.nan)

    return of_sums


_BLEU = {words: _bleu_of(words) for words in (1, 4)}


def _ciders(pairs: Sequence[tuple[str, str]], kinds: np.ndarray) -> np.ndarray:
    """CIDEr of every text, each within the corpus of its kind."""
    scores = np.zeros(len(pairs))
    corpora = np.array([CORPUS_OF_KIND[kind] for kind in kinds.tolist()])
    for corpus in np.unique(corpora):
        rows = np.flatnonzero(corpora == corpus)
        scores[rows] = caption_metrics.cider(
            [pairs[i][0] for i in rows], [pairs[i][1] for i in rows]
        )
    return scores
