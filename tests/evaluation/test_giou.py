"""G-IoU: golden figures of all definitions, and what the figures mean."""

import json

import numpy as np
import pytest

from rg_jax.evaluation import giou
from rg_jax.evaluation.embedder import ExactEmbedder, VectorEmbedder
from rg_jax.evaluation.giou import (
    Match,
    SampleScore,
    g_iou,
    place_iou_masks,
    score_sample,
    summarise,
)
from rg_jax.grounding.published import read_boxes_published, read_masks_published

# The official figures were computed in float32; ours are float64.
OFFICIAL = 2e-6


class Golden:
    """giou.json, with the table of embeddings in place of a sentence-embedding model."""

    def __init__(self, root):
        self.data = json.loads((root / "giou.json").read_text("utf-8"))
        self.arrays = np.load(root / "giou_masks.npz")
        table = self.data["embedding_table"]
        self.embedder = VectorEmbedder(lambda texts: np.array([table[t] for t in texts]), "table")

    def boxes(self, text):
        return [(mention, 0, box) for mention, box in read_boxes_published(text)]

    def masks(self, sample, side, threshold=0.0):
        """Mentions with the mask of their own closing tag; a missing mask is None."""
        if side == "gt":
            masks = self.arrays[f"{sample['id']}/gt"] > 0
        else:
            masks = self.arrays[f"{sample['id']}/pred_logits"] > threshold
        found = []
        for k, part in enumerate(sample[side].split("</seg>")[:-1]):
            mention = part.rpartition("<seg>")[2].lower()
            if mention:
                found.append((mention, 0, masks[k] if k < len(masks) else None))
        return found

    def masks_as_published(self, sample, side):
        """The i-th mention gets the i-th mask, whatever empty marks stand between."""
        masks = self.arrays[f"{sample['id']}/{'gt' if side == 'gt' else 'pred_logits'}"] > 0.5
        mentions = read_masks_published(sample[side])
        return [
            (mention, 0, masks[k] if k < len(masks) else None) for k, mention in enumerate(mentions)
        ]


@pytest.fixture
def data(golden):
    return Golden(golden)


def check_paper(part, scores):
    assert "overall_paper" in part or any(sample.get("paper") for sample in part["samples"])
    for sample, score in zip(part["samples"], scores, strict=True):
        if sample.get("paper") is None:
            continue
        expected = sample["paper"]["g_iou"]
        assert (score.g_iou is None) == (expected is None), sample["id"]
        if expected is not None:
            assert score.g_iou == pytest.approx(expected, abs=1e-9), sample["id"]
    if "overall_paper" in part:
        found = summarise(scores, resamples=20)["g_iou"]
        overall = part["overall_paper"]
        expected = overall["g_iou_mean_over_samples_with_reference_entities"]
        assert found["mean"] == pytest.approx(expected, abs=1e-9)
        assert found["n"] == overall.get("n", found["n"])


def check_result(score, expected, tolerance, name):
    """Per-sample figures as the published scorers return them."""
    ours = {
        "matched_keywords_count": score.n_matched,
        "gt_keywords_count": score.n_reference,
        "pred_keywords_count": score.n_predicted,
        "iou_at_05_count": score.n_matched_50,
        "sample_grounding_iou": pytest.approx(score.g_iou or 0.0, abs=tolerance),
    }
    told = {key for key in ours if key in expected}
    assert told or "results" in expected, f"{name}: nothing to compare"
    assert {key: expected[key] for key in told} == {key: ours[key] for key in told}, name
    if "results" not in expected:
        return
    results = [r for r in expected["results"] if r["gt_keyword"] and r["pred_keyword"]]
    for match, result in zip(score.matches, results, strict=True):
        assert match.similarity == pytest.approx(result["score"], abs=tolerance), name
        assert match.iou == pytest.approx(result["iou"], abs=tolerance), name


NAMES = {
    "precision": "precision",
    "recall": "recall",
    "f1": "f1_score",
    "precision_50": "precision_at_05",
    "recall_50": "recall_at_05",
    "f1_50": "f1_at_05",
    "matched_iou": "average_iou",
    "matched_similarity": "average_semantic_score",
    "g_iou": "average_grounding_iou",
}


def check_overall(found, expected):
    for ours, theirs in NAMES.items():
        if theirs in expected:
            assert found[ours]["mean"] == pytest.approx(expected[theirs], abs=OFFICIAL), theirs


def test_giou_golden_boxes_paper(data):
    part = data.data["detection"]
    scores = [
        score_sample(data.boxes(s["gt"]), data.boxes(s["pred"]), data.embedder)
        for s in part["samples"]
    ]
    check_paper(part, scores)


def as_official(expected):
    """A sample score made of the published scorer's own results."""
    results = [r for r in expected["results"] if r["gt_keyword"] and r["pred_keyword"]]
    return SampleScore(
        expected["sample_grounding_iou"],
        (0,) * expected["gt_keywords_count"],
        expected["pred_keywords_count"],
        tuple(Match(i, i, r["score"], r["iou"]) for i, r in enumerate(results)),
    )


def test_giou_golden_boxes_published(data):
    part = data.data["detection"]
    scores = []
    for sample in part["samples"]:
        official = sample.get("official")
        if official is None:
            continue
        if sample.get("official_depends_on_float32_rounding"):
            # Which pairs it makes is a matter of rounding; the totals hold its figures.
            scores.append(as_official(official))
            continue
        score = score_sample(
            data.boxes(sample["gt"]),
            data.boxes(sample["pred"]),
            data.embedder,
            "published_detection",
        )
        check_result(score, official, OFFICIAL, sample["id"])
        scores.append(score)
    assert scores, "no sample with official figures"
    if "overall_official" in part:
        found = summarise(scores, "published_detection", resamples=20)
        check_overall(found, part["overall_official"])


def test_giou_golden_masks_paper(data):
    part = data.data["segmentation"]
    scores = [
        score_sample(
            data.masks(s, "gt"), data.masks(s, "pred"), data.embedder, "paper", place_iou_masks
        )
        for s in part["samples"]
    ]
    check_paper(part, scores)


def test_giou_golden_masks_published(data):
    part = data.data["segmentation"]
    scores = []
    for sample in part["samples"]:
        official = sample.get("official")
        if official is None:
            continue
        if sample.get("official_depends_on_float32_rounding"):
            scores.append(as_official(official))
            continue
        score = score_sample(
            data.masks_as_published(sample, "gt"),
            data.masks_as_published(sample, "pred"),
            data.embedder,
            "published_segmentation",
            place_iou_masks,
        )
        check_result(score, official, OFFICIAL, sample["id"])
        scores.append(score)
    assert scores, "no sample with official figures"
    expected = part.get("overall_official_without_error_ids", part.get("overall_official"))
    if expected:
        check_overall(summarise(scores, "published_segmentation", resamples=20), expected)


def test_giou_golden_masks_corrected_at_both_thresholds(data):
    for field, threshold in (("corrected", 0.0), ("corrected_thr05", 0.5)):
        for sample in data.data["segmentation"]["samples"]:
            if sample.get(field) is None:
                continue
            score = score_sample(
                data.masks(sample, "gt"),
                data.masks(sample, "pred", threshold),
                data.embedder,
                "published_segmentation",
                place_iou_masks,
            )
            check_result(score, sample[field], 1e-9, sample["id"])


# --- meaning --------------------------------------------------------------------------------

LIVER = ("liver", 5, (0.0, 0.0, 0.5, 0.5))
SPLEEN = ("spleen", 1, (0.5, 0.5, 1.0, 1.0))
HALF_LIVER = ("Leber", 5, (0.0, 0.0, 0.5, 0.25))


def test_a_perfect_answer_scores_one_whatever_the_order():
    score = score_sample([LIVER, SPLEEN], [SPLEEN, LIVER])
    assert score.g_iou == 1.0
    assert [(m.reference, m.predicted) for m in score.matches] == [(0, 1), (1, 0)]


def test_missing_and_extra_entities_cost():
    assert score_sample([LIVER, SPLEEN], [LIVER]).g_iou == 0.5
    assert score_sample([LIVER], [LIVER, SPLEEN]).g_iou == 0.5
    assert score_sample([LIVER], [HALF_LIVER]).g_iou == 0.5
    assert score_sample([LIVER], []).g_iou == 0.0
    assert score_sample([], [LIVER]).g_iou == 0.0
    assert score_sample([], []).g_iou is None


def test_unlike_mentions_are_no_match():
    score = score_sample([LIVER], [("spleen", 1, LIVER[2])])
    assert score.g_iou == 0.0 and score.matches == ()


def test_negative_similarity_counts_zero():
    table = {"up": [1.0, 0.0], "down": [-1.0, 0.0]}
    embedder = VectorEmbedder(lambda texts: np.array([table[t] for t in texts]), "toy")
    up, down = ("up", 0, LIVER[2]), ("down", 0, LIVER[2])
    assert score_sample([up], [down], embedder).g_iou == 0.0
    assert score_sample([up], [down], embedder, "published_detection").g_iou == -1.0
    assert score_sample([up], [down], embedder, "published_segmentation").g_iou == 0.0


def test_the_published_mix_up_is_not_ours():
    good, mixed = (
        score_sample([LIVER, SPLEEN], [LIVER, SPLEEN], ExactEmbedder(), definition)
        for definition in ("paper", "published_detection")
    )
    assert good.g_iou == mixed.g_iou == 1.0  # the wrong boxes happen to agree
    worse = ("spleen", 1, (0.0, 0.0, 0.1, 0.1))
    assert score_sample([LIVER, SPLEEN], [LIVER, worse]).g_iou == 0.5
    published = score_sample([LIVER, SPLEEN], [LIVER, worse], None, "published_detection")
    assert published.g_iou == 1.0


def test_the_order_of_entities_does_not_change_a_score_without_ties():
    rng = np.random.default_rng(0)
    for _ in range(50):
        vectors = {f"m{i}": rng.normal(size=4) for i in range(8)}
        embedder = VectorEmbedder(lambda ts, v=vectors: np.array([v[t] for t in ts]), "random")

        def entities(names, rng=rng):
            corners = np.sort(rng.random((len(names), 2, 2)), axis=1).reshape(-1, 4)
            return [(n, 0, tuple(c)) for n, c in zip(names, corners.tolist(), strict=True)]

        reference = entities([f"m{i}" for i in range(4)])
        predicted = entities([f"m{i}" for i in range(3, 8)])
        first = score_sample(reference, predicted, embedder)
        shuffled = score_sample(
            [reference[i] for i in rng.permutation(4)],
            [predicted[i] for i in rng.permutation(5)],
            embedder,
        )
        assert shuffled.g_iou == pytest.approx(first.g_iou, abs=1e-12)
        assert 0 <= first.g_iou <= 1


def test_figures_of_a_data_set():
    samples = [
        ([LIVER, SPLEEN], [HALF_LIVER]),  # 0.25
        ([LIVER], [LIVER]),  # 1
        ([SPLEEN], []),  # 0
        ([], [LIVER, SPLEEN]),  # false entities
        ([], []),
    ]
    found = g_iou(samples, resamples=500)
    means = {k: v["mean"] for k, v in found.items() if k != "miou_by_class"}
    assert means["g_iou"] == pytest.approx(1.25 / 3) and found["g_iou"]["n"] == 3
    assert means["matched_iou"] == 0.75 and found["matched_iou"]["n"] == 2
    assert means["matched_similarity"] == 1.0
    assert means["precision"] == pytest.approx(2 / 4)
    assert means["recall"] == pytest.approx(2 / 4)
    assert means["f1"] == pytest.approx(0.5)
    assert means["precision_50"] == pytest.approx(2 / 4)
    assert means["false_entity_rate"] == 0.5 and found["false_entity_rate"]["n"] == 2
    assert means["false_entities_per_sample"] == 1.0
    by_class = {k: v["mean"] for k, v in found["miou_by_class"].items()}
    assert by_class == {5: 0.75, 1: 0.0}
    assert means["miou"] == pytest.approx(0.375)
    for name, figure in found.items():
        if name != "miou_by_class":
            assert figure["low"] <= figure["mean"] <= figure["high"], name


def test_figures_that_do_not_exist_are_none_and_json():
    found = g_iou([([], []), ([], [])], resamples=50)
    assert found["g_iou"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert found["miou"]["mean"] is None and found["miou_by_class"] == {}
    assert found["false_entity_rate"]["mean"] == 0.0
    json.dumps(found, allow_nan=False)
    assert g_iou([], resamples=50)["g_iou"]["n"] == 0


def test_seeded():
    rng = np.random.default_rng(0)
    samples = [([LIVER], [LIVER] if rng.random() < 0.5 else [HALF_LIVER]) for _ in range(40)]
    assert g_iou(samples, resamples=300) == g_iou(samples, resamples=300)
    assert g_iou(samples, resamples=300, seed=1) != g_iou(samples, resamples=300)


def test_masks():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:3] = True, True
    assert place_iou_masks(a, b) == pytest.approx(1 / 3)
    assert place_iou_masks(a, None) == 0.0
    assert place_iou_masks(None, None) == place_iou_masks(a & False, None) == 1.0
    with pytest.raises(ValueError, match="different shapes"):
        place_iou_masks(a, b[:2])


def test_an_unknown_definition_is_named():
    with pytest.raises(ValueError, match="'mine'"):
        score_sample([LIVER], [LIVER], definition="mine")
    assert set(giou.DEFINITIONS) == {"paper", "published_detection", "published_segmentation"}
