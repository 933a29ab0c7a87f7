"""G-IoU: do the entities of a text stand where they should?

An entity here is (mention, class id, place); a place is a box or a mask, told apart only by the
function that compares two of them. Reference and predicted entities are matched one to one,
greedily, the most alike mentions first; a sample scores Σ IoU · similarity over the matches,
divided by the larger number of entities (RadGrounder, arXiv 2606.20477).

Three definitions. "paper" is the one above and the one we stand by: averaged over samples with
reference entities, negative similarity counts 0. "published_detection" and
"published_segmentation" are what the published scorers compute, defects included, for comparison
with their figures: the former mixes up boxes after the first match, the latter divides by the
number of matches and averages over all samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rg_jax.evaluation.bootstrap import (
    LEVEL,
    RESAMPLES,
    Statistic,
    intervals,
    mean_of_ratios,
    ratio,
)
from rg_jax.evaluation.embedder import Embedder, ExactEmbedder
from rg_jax.grounding.boxes import BoxLike
from rg_jax.grounding.boxes import iou as box_iou

DEFINITIONS = ("paper", "published_detection", "published_segmentation")
# Similarities this close are one rank: rounding must not decide who is matched first.
TIE = 1e-6


class ScoredEntity(NamedTuple):
    """Mention text, class id (0 = none), place (normalised box, boolean mask, or None)."""

    mention: str
    class_id: int
    place: Any


class Match(NamedTuple):
    """Indices into reference and prediction, similarity of the mentions, IoU of the places."""

    reference: int
    predicted: int
    similarity: float
    iou: float


@dataclasses.dataclass(frozen=True)
class SampleScore:
    """Score of one sample. `g_iou` is None where the definition gives the sample none."""

    g_iou: float | None
    reference_classes: tuple[int, ...]
    n_predicted: int
    matches: tuple[Match, ...]

    @property
    def n_reference(self) -> int:
        """Number of reference entities."""
        return len(self.reference_classes)

    @property
    def n_matched(self) -> int:
        """Number of matched pairs."""
        return len(self.matches)

    @property
    def n_matched_50(self) -> int:
        """Number of matched pairs with IoU of at least 0.5."""
        return sum(match.iou >= 0.5 for match in self.matches)

    @property
    def counted(self) -> bool:
        """Whether both sides have entities: the published detection totals count only those."""
        return self.n_reference > 0 and self.n_predicted > 0


def place_iou_boxes(a: BoxLike | None, b: BoxLike | None) -> float:
    """IoU of two normalised boxes; 0 if one is missing."""
    return 0.0 if a is None or b is None else box_iou(a, b)


def place_iou_masks(a: np.ndarray | None, b: np.ndarray | None) -> float:
    """IoU of two boolean masks (H, W); a missing mask is empty, two empty ones score 1."""
    if a is not None and b is not None and a.shape != b.shape:
        raise ValueError(f"masks of different shapes: {a.shape} and {b.shape}")
    pixels_a = 0 if a is None else int(np.count_nonzero(a))
    pixels_b = 0 if b is None else int(np.count_nonzero(b))
    both = 0 if a is None or b is None else int(np.count_nonzero(np.logical_and(a, b)))
    union = pixels_a + pixels_b - both
    return both / union if union else 1.0


def _greedy(similarity: np.ndarray, above: float) -> list[tuple[int, int]]:
    """Pairs by falling similarity; ties go to the first row, then the first column."""
    rows, columns = list(range(similarity.shape[0])), list(range(similarity.shape[1]))
    pairs = []
    while rows and columns:
        open_part = similarity[np.ix_(rows, columns)]
        best = open_part.max()
        if not best > above:
            break
        r, c = np.argwhere(open_part >= best - TIE)[0]
        pairs.append((rows.pop(int(r)), columns.pop(int(c))))
    return pairs


def _mixed_up(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Which places the published detection scorer compares for these pairs.

    It removes matched mentions from its lists but not their boxes, so a pair's positions among
    the mentions that are left are used as positions among all boxes.
    """
    taken: tuple[list[int], list[int]] = ([], [])
    used = []
    for pair in pairs:
        position = [i - sum(j < i for j in before) for i, before in zip(pair, taken, strict=True)]
        used.append((position[0], position[1]))
        for before, i in zip(taken, pair, strict=True):
            before.append(i)
    return used


def score_sample(
    reference: Sequence[tuple[str, int, Any]],
    predicted: Sequence[tuple[str, int, Any]],
    embedder: Embedder | None = None,
    definition: str = "paper",
    place_iou: Callable[[Any, Any], float] = place_iou_boxes,
) -> SampleScore:
    """Match the entities of one sample and score them.

    Entities are (mention, class id, place). By "paper" a pair whose mentions are not alike at all
    (similarity 0 or less) is no match; `g_iou` is None if neither side has entities and 0 if one
    side has none. "published_detection" likewise, but without a floor: every mention is matched
    as long as there are two, and a negative similarity gives a negative score.
    "published_segmentation": similarities clipped to [0, 1], both sides empty score 1.
    Raises ValueError for an unknown definition.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition {definition!r} is not one of {', '.join(DEFINITIONS)}")
    embedder = embedder or ExactEmbedder()
    classes = tuple(class_id for _, class_id, _ in reference)
    if not reference or not predicted:
        nothing = not reference and not predicted
        score = None if nothing else 0.0
        if definition == "published_segmentation" and nothing:
            score = 1.0
        return SampleScore(score, classes, len(predicted), ())
    similarity = embedder.similarity(
        [(mention, class_id) for mention, class_id, _ in reference],
        [(mention, class_id) for mention, class_id, _ in predicted],
    )
    if definition == "published_segmentation":
        similarity = np.clip(similarity, 0.0, 1.0)
    pairs = _greedy(similarity, above=0.0 if definition == "paper" else -np.inf)
    places = _mixed_up(pairs) if definition == "published_detection" else pairs
    matches = tuple(
        Match(r, p, float(similarity[r, p]), place_iou(reference[i][2], predicted[j][2]))
        for (r, p), (i, j) in zip(pairs, places, strict=True)
    )
    total = sum(match.similarity * match.iou for match in matches)
    by_matches = definition == "published_segmentation"
    score = total / (len(matches) if by_matches else max(len(reference), len(predicted)))
    return SampleScore(float(score), classes, len(predicted), matches)


def statistics(scores: Sequence[SampleScore], definition: str = "paper") -> dict[str, Statistic]:
    """Figures of a data set as functions of its samples, for `bootstrap.intervals`.

    g_iou: mean over samples with reference entities. matched_iou, matched_similarity: mean over
    matched pairs. precision, recall, f1, and the same with `_50` for pairs of IoU ≥ 0.5: from the
    totals of all samples, so that entities on samples that should have none cost precision.
    false_entity_rate: share of the samples without reference entities that were given some;
    false_entities_per_sample: how many. miou: mean over classes of what `class_statistics` calls
    iou. The published definitions average some of these otherwise, as their scorers do.
    """
    reference = np.array([score.n_reference for score in scores], np.float64)
    predicted = np.array([score.n_predicted for score in scores], np.float64)
    matched = np.array([score.n_matched for score in scores], np.float64)
    matched_50 = np.array([score.n_matched_50 for score in scores], np.float64)
    points = np.array([score.g_iou or 0.0 for score in scores], np.float64)
    iou = np.array([sum(match.iou for match in score.matches) for score in scores], np.float64)
    alike = np.array([sum(m.similarity for m in score.matches) for score in scores], np.float64)
    no_reference = (reference == 0).astype(np.float64)
    false = predicted * no_reference
    has_reference = 1 - no_reference
    per_pair = matched
    if definition == "published_detection":
        # Samples with an empty side are left out of the totals; IoU and similarity are averaged
        # within the sample first, then over the samples with matches.
        counted = np.array([score.counted for score in scores], np.float64)
        reference, predicted = reference * counted, predicted * counted
    if definition != "paper":
        iou, alike = (part / np.maximum(matched, 1) for part in (iou, alike))
        per_pair = (matched > 0).astype(np.float64)
    if definition == "published_segmentation":
        nothing = np.array([not s.n_reference and not s.n_predicted for s in scores], np.float64)
        iou, alike = iou + nothing, alike + nothing
        per_pair = has_reference = np.ones(len(scores))
    of_classes = class_statistics(scores)
    found = {
        "g_iou": ratio(points * has_reference, has_reference),
        "matched_iou": ratio(iou, per_pair),
        "matched_similarity": ratio(alike, per_pair),
        "precision": ratio(matched, predicted),
        "recall": ratio(matched, reference),
        "f1": ratio(2 * matched, reference + predicted),
        "precision_50": ratio(matched_50, predicted),
        "recall_50": ratio(matched_50, reference),
        "f1_50": ratio(2 * matched_50, reference + predicted),
        "false_entity_rate": ratio((false > 0) * no_reference, no_reference),
        "false_entities_per_sample": ratio(false, no_reference),
    }
    tables = [figures["iou"].columns for figures in of_classes.values()]
    stacked = np.stack(tables, axis=1) if tables else np.zeros((len(scores), 0, 2))
    # Samples with an entity of any kind are behind it, as they would be behind a class of theirs.
    found["miou"] = dataclasses.replace(
        mean_of_ratios(stacked[..., 0], stacked[..., 1]),
        part=np.array([any(score.reference_classes) for score in scores], bool),
    )
    return found


def class_statistics(scores: Sequence[SampleScore]) -> dict[int, dict[str, Statistic]]:
    """Per class of the reference: iou, the mean IoU over all its entities, unmatched ones 0;
    recall and recall_50, the shares of them that were matched, and with IoU ≥ 0.5."""
    known = sorted({class_id for score in scores for class_id in score.reference_classes} - {0})
    entities, iou, matched, matched_50 = (
        {class_id: np.zeros(len(scores)) for class_id in known} for _ in range(4)
    )
    for row, score in enumerate(scores):
        for class_id in score.reference_classes:
            if class_id:
                entities[class_id][row] += 1
        for match in score.matches:
            class_id = score.reference_classes[match.reference]
            if class_id:
                iou[class_id][row] += match.iou
                matched[class_id][row] += 1
                matched_50[class_id][row] += match.iou >= 0.5
    return {
        class_id: {
            "iou": ratio(iou[class_id], entities[class_id]),
            "recall": ratio(matched[class_id], entities[class_id]),
            "recall_50": ratio(matched_50[class_id], entities[class_id]),
        }
        for class_id in known
    }


def summarise(
    scores: Sequence[SampleScore],
    definition: str = "paper",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Any]:
    """`statistics` with their intervals, and `miou_by_class`: {class id: its `iou`}.

    `n` is the number of samples that take part in a figure; with none, the figure is None.
    """
    of_classes = {c: figures["iou"] for c, figures in class_statistics(scores).items()}
    everything = statistics(scores, definition) | {str(c): s for c, s in of_classes.items()}
    found: dict[str, Any] = dict(intervals(everything, resamples, seed, level))
    found["miou_by_class"] = {class_id: found.pop(str(class_id)) for class_id in of_classes}
    return found


def g_iou(
    samples: Sequence[tuple[Sequence[Any], Sequence[Any]]],
    embedder: Embedder | None = None,
    definition: str = "paper",
    place_iou: Callable[[Any, Any], float] = place_iou_boxes,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """`summarise` of `score_sample` over pairs (reference entities, predicted entities)."""
    embedder = embedder or ExactEmbedder()
    scores = [score_sample(ref, pred, embedder, definition, place_iou) for ref, pred in samples]
    return summarise(scores, definition, resamples, seed)
