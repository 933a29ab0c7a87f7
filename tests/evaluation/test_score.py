"""metrics.json: the right figures over the right samples."""

import dataclasses
import json

import made_up
import numpy as np
import pytest

from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation import caption_metrics
from rg_jax.evaluation.baseline import BlindBaseline
from rg_jax.evaluation.embedder import ExactEmbedder
from rg_jax.evaluation.giou import DEFINITIONS
from rg_jax.evaluation.results import Result, make_result, rescore
from rg_jax.evaluation.score import score_results, write_metrics
from rg_jax.grounding.format import OURS
from rg_jax.grounding.spans import Entity, write

B = 200


def score(results, **more):
    return score_results(results, data="made up", split="val", resamples=B, **more)


def plain(name: str, answer_type: str, reference: str, prediction: str, **more) -> Result:
    fields = {"task": "vqa", "language": "en", "modality": "CT"} | more
    sample = Sample(
        id=name, record_id=name, prefix="\nq\nAnswer: ", target=reference, text=reference,
        answer_type=answer_type, **fields,
    )  # fmt: skip
    return make_result(sample, prediction, OURS)


def boxed(name: str, reference: list, predicted: list, **more) -> Result:
    """A grounded caption; entities are (mention, class id, box)."""

    def marked(rows):
        text = " ".join(mention for mention, *_ in rows) or "nothing"
        entities = [
            Entity(mention, text.index(mention), text.index(mention) + len(mention), c, box)
            for mention, c, box in rows
        ]
        return text, tuple(entities), write(text, entities, OURS)

    fields = {"task": "detect", "language": "en", "modality": "CT"} | more
    text, entities, target = marked(reference)
    sample = Sample(
        id=name, record_id=name, prefix="\n\np ", target=target, text=text, entities=entities,
        answer_type="caption", **fields,
    )  # fmt: skip
    return make_result(sample, marked(predicted)[2], OURS)


LIVER = ("liver", 5, (0.0, 0.0, 0.5, 0.5))
HALF_LIVER = ("liver", 5, (0.0, 0.0, 0.5, 0.25))
SPLEEN = ("spleen", 1, (0.5, 0.5, 0.75, 0.75))


def test_figures_by_hand():
    results = [
        boxed("a", [LIVER, SPLEEN], [LIVER, SPLEEN]),  # 1
        boxed("b", [LIVER], [HALF_LIVER, SPLEEN]),  # 0.5 / 2
        boxed("c", [LIVER], []),  # 0
        boxed("d", [], [SPLEEN]),  # a false entity
        boxed("e", [], []),
    ]
    metrics = score(results)
    assert metrics["g_iou"]["mean"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert metrics["g_iou"]["n"] == 3
    assert metrics["matched_iou"]["mean"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert metrics["recall"]["mean"] == pytest.approx(3 / 4)
    assert metrics["precision"]["mean"] == pytest.approx(3 / 5)
    assert metrics["false_entity_rate"]["mean"] == pytest.approx(1 / 2)
    assert metrics["false_entity_rate"]["n"] == 2
    assert metrics["by_class"]["liver"]["iou"]["mean"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics["by_class"]["spleen"]["iou"]["n"] == 1
    assert metrics["counts"]["samples_with_reference_entities"] == 3
    assert metrics["counts"]["predicted_entities"] == 5
    assert "baseline_g_iou" not in metrics


def test_open_and_closed_are_apart_and_marks_do_not_count_as_words():
    marked = boxed("x", [LIVER], [LIVER])
    results = [
        plain("a", "open", "the liver", "liver"),
        plain("b", "open", "spleen", "liver"),
        plain("c", "closed", "Yes", "yes."),
        plain("d", "yesno", "No", "Yes"),
        plain("e", "multiple", "A", "Final Answer: a"),
        marked,
    ]
    metrics = score(results)
    assert metrics["text_f1_open"]["mean"] == pytest.approx(1 / 2)
    assert metrics["text_f1_open"]["n"] == 2
    assert metrics["text_accuracy_closed"]["mean"] == pytest.approx(2 / 3)
    assert metrics["text_f1_caption"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert "text_f1_grounded" not in metrics


def test_groups_hold_their_own_samples():
    results = [
        boxed("a", [LIVER], [LIVER], language="de", modality="MR"),
        boxed("b", [LIVER], [HALF_LIVER]),
        plain("c", "open", "liver", "liver"),
    ]
    metrics = score(results)
    assert set(metrics["by_task"]) == {"detect", "vqa"}
    assert metrics["by_language"]["de"]["g_iou"]["mean"] == pytest.approx(1)
    assert metrics["by_language"]["en"]["g_iou"]["mean"] == pytest.approx(0.5)
    assert metrics["by_modality"]["MR"]["g_iou"]["n"] == 1
    assert "g_iou" not in metrics["by_task"]["vqa"]
    assert metrics["by_task"]["vqa"]["text_f1_open"]["n"] == 1


def test_broken_marks_and_cuts_are_counted():
    sample, _ = made_up.detect_sample(7, "en")
    good, bad = sample.target, sample.target.replace("</p>", "", 2)
    other = dataclasses.replace(sample, id="other")
    metrics = score([make_result(sample, good, OURS), make_result(other, bad, OURS)])
    assert metrics["malformed_rate"]["mean"] == pytest.approx(1 / 2)
    assert metrics["counts"]["malformed_marks"] == 2
    assert metrics["counts"]["malformed_unclosed"] == 2
    assert metrics["counts"]["context_cut"] == 2
    more = score([make_result(sample, good, OURS)], counts={"target_cut": 3})
    assert more["counts"]["target_cut"] == 3


def test_nothing_in_the_file_is_nan_and_what_is_missing_is_null(tmp_path):
    metrics = score([plain("a", "closed", "肝脏", "脾脏")])
    assert metrics["g_iou"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert metrics["counts"]["closed_answers_equal_by_emptiness"] == 1
    write_metrics(tmp_path / "metrics.json", metrics)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert "NaN" not in text and json.loads(text) == metrics
    with pytest.raises(ValueError, match="JSON"):
        write_metrics(tmp_path / "bad.json", {"g_iou": float("nan")})
    assert not (tmp_path / "bad.json").exists()


def test_the_set_says_what_was_evaluated_and_how():
    about = score([boxed("a", [LIVER], [LIVER])], seed=3)["set"]
    assert about == {
        "data": "made up", "split": "val", "n": 1, "definition": "paper", "embedder": "exact",
        "resamples": B, "seed": 3,
    }  # fmt: skip


def test_a_baseline_stands_beside_the_model_with_a_paired_difference():
    train = [made_up.detect_sample(500 + k, "en")[0] for k in range(40)]
    baseline = BlindBaseline.fit(train)
    samples = [made_up.detect_sample(k, "en")[0] for k in range(12)]
    perfect = score([make_result(s, s.target, OURS) for s in samples], baseline=baseline)
    assert 0 < perfect["baseline_g_iou"]["mean"] < 0.8
    assert perfect["baseline_g_iou"]["mean"] < perfect["baseline_told_mentions_g_iou"]["mean"] < 1
    over = perfect["g_iou_over_baseline"]
    gap = perfect["g_iou"]["mean"] - perfect["baseline_g_iou"]["mean"]
    assert over["mean"] == pytest.approx(gap) and over["low"] > 0
    assert perfect["baseline_metrics"]["g_iou"] == perfect["baseline_g_iou"]
    assert perfect["by_language"]["en"]["baseline_g_iou"]["n"] == 12
    assert "baseline_told_mentions_iou" in perfect["by_class"]["liver"]

    # The answer that is the baseline is not above the baseline.
    def constant(sample):
        rows = baseline.constant(sample)
        text, spans = made_up.sentence([mention for mention, *_ in rows], "en")
        boxes = {class_id: box for _, class_id, box in rows}
        return write(text, made_up.grounded(text, spans, boxes), OURS)

    same = score([make_result(s, constant(s), OURS) for s in samples], baseline=baseline)
    assert same["g_iou_over_baseline"]["mean"] == pytest.approx(0, abs=0.01)  # bins


def test_intervals_hold_the_mean_and_are_seeded():
    results, _ = made_up.results(24)
    first, again, other = score(results), score(results[::-1]), score(results, seed=1)
    assert first == again
    assert first["g_iou"]["low"] < first["g_iou"]["mean"] < first["g_iou"]["high"]
    assert other["g_iou"]["low"] != first["g_iou"]["low"]
    assert other["g_iou"]["mean"] == first["g_iou"]["mean"]
    values = [r.score.g_iou for r in results if r.grounded]
    assert first["g_iou"]["mean"] == pytest.approx(np.mean(values))


def test_nothing_to_score_and_unknown_answer_types_are_user_errors():
    with pytest.raises(UserError, match="nothing to score"):
        score([])
    with pytest.raises(UserError, match="CLOSED"):
        score([plain("a", "CLOSED ", "yes", "yes")])


ANSWERS = [
    plain("a", "open", "the liver is large", "the liver is large"),
    plain("b", "open", "left kidney", "the left kidney"),
    plain("c", "closed", "yes", "yes"),
    plain("d", "yesno", "no", "yes", modality="MR"),
    plain("e", "open", "a small dark spleen", "a small spleen", modality="MR"),
]


def test_every_text_metric_is_there_for_open_and_closed_apart_and_together():
    metrics = score(ANSWERS)
    for name in ("f1", "accuracy", "recall", "rouge_l", "cider", "bleu1", "bleu4"):
        sizes = {"open": 3, "closed": 2, "questions": 5}
        found = {kind: metrics[f"text_{name}_{kind}"]["n"] for kind in sizes}
        assert found == sizes, name
        assert f"text_{name}_caption" not in metrics
    parts = [3 * metrics["text_f1_open"]["mean"], 2 * metrics["text_f1_closed"]["mean"]]
    assert metrics["text_f1_questions"]["mean"] == pytest.approx(sum(parts) / 5)


def test_bleu_is_a_figure_of_the_corpus_and_cider_weighs_words_by_all_questions():
    metrics = score(ANSWERS)
    pairs = [(r.text, r.sample.text) for r in ANSWERS]
    counts = np.array([caption_metrics.bleu_counts(*pair) for pair in pairs])
    is_open = np.array([True, True, False, False, True])
    for words in (1, 4):
        expected = caption_metrics.bleu(counts[is_open].sum(0))[words - 1]
        assert metrics[f"text_bleu{words}_open"]["mean"] == pytest.approx(expected)
    values = caption_metrics.cider(*zip(*pairs, strict=True))
    assert metrics["text_cider_open"]["mean"] == pytest.approx(values[is_open].mean())
    assert metrics["by_modality"]["MR"]["text_cider_open"]["mean"] == pytest.approx(values[4])
    figure = metrics["text_bleu1_open"]
    assert figure["low"] < figure["mean"] < figure["high"]


def test_answer_types_of_the_data_have_their_own_figures():
    groups = score(ANSWERS)["by_answer_type"]
    assert set(groups) == {"open", "closed", "yesno"}
    assert groups["yesno"]["text_accuracy_closed"] == {
        "mean": 0.0, "low": 0.0, "high": 0.0, "n": 1,
    }  # fmt: skip


def test_an_answer_that_contains_no_is_open_if_the_data_says_so():
    metrics = score([plain("a", "open", "a nodule, ja", "no"), plain("b", "closed", "no", "no")])
    assert metrics["text_f1_open"]["n"] == metrics["text_f1_closed"]["n"] == 1


def test_all_definitions_are_told_by_name_whichever_comes_first():
    results, _ = made_up.results(24)
    metrics = score(results)
    assert set(metrics["by_definition"]) == set(DEFINITIONS)
    assert metrics["by_definition"]["paper"]["g_iou"] == metrics["g_iou"]
    forgiving = metrics["by_definition"]["published_segmentation"]
    assert forgiving["g_iou"]["mean"] > metrics["g_iou"]["mean"] and forgiving["g_iou"]["n"] == 24
    other = score(
        [rescore(r, ExactEmbedder(), "published_detection") for r in results],
        definition="published_detection",
    )
    assert other["set"]["definition"] == "published_detection"
    for name, found in metrics["by_definition"].items():
        assert other["by_definition"][name]["g_iou"] == pytest.approx(found["g_iou"]), name
    assert other["g_iou"] == other["by_definition"]["published_detection"]["g_iou"]


def test_a_class_has_its_recall_beside_its_iou():
    by_class = score([boxed("a", [LIVER, SPLEEN], [HALF_LIVER])])["by_class"]
    assert by_class["liver"]["recall"]["mean"] == by_class["liver"]["recall_50"]["mean"] == 1.0
    assert by_class["spleen"]["recall"]["mean"] == by_class["spleen"]["iou"]["mean"] == 0.0


def test_marks_are_removed_in_the_published_way_only_where_that_is_asked_for():
    broken = (
        "The <p bbox=<loc0001><loc0002> id=>liver</p> and "
        + boxed("x", [LIVER], [LIVER]).sample.target
    )
    result = plain("a", "open", "The liver and liver", broken)
    ours, published = score([result]), score([result], remover="published_boxes")
    assert ours["text_f1_open"]["mean"] == 1.0 and "marks_removed" not in ours["set"]
    assert published["text_f1_open"]["mean"] < 1.0
    assert published["set"]["marks_removed"] == "published_boxes"
    assert published["malformed_rate"]["mean"] == ours["malformed_rate"]["mean"] == 1.0


def test_what_is_said_about_an_evaluation_stands_in_its_set():
    metrics = score(ANSWERS, about={"step": 7, "benchmark": {"name": "slake"}})
    assert metrics["set"]["step"] == 7 and "published" not in metrics
    of_slake = score_results(ANSWERS, data="slake/official-en", split="val", resamples=B)
    assert of_slake["published"] and not any(row["comparable"] for row in of_slake["published"])
