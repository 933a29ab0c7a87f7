"""Text metrics against the golden pairs, and their corners."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from rg_jax.evaluation import text_metrics

GOLDEN = Path(os.environ.get("RG_JAX_GOLDEN", Path(__file__).parents[1] / "golden"))


def golden() -> dict:
    return json.loads((GOLDEN / "text_metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("metric", ["f1", "accuracy", "recall"])
def test_golden_text_metrics(metric):
    cases = [case for case in golden()["pairs"] if metric in case]
    assert cases, "the golden set holds no pair for this metric"
    compute = getattr(text_metrics, metric)
    got = [compute(case["cand"], case["ref"]) for case in cases]
    wrong = [
        (case["cand"], case["ref"], case[metric], value)
        for case, value in zip(cases, got, strict=True)
        if abs(value - case[metric]) > 1e-12
    ]
    assert not wrong
    summary = golden().get("summary", {}).get(f"{metric}_mean")
    if summary is not None:  # the official mean is taken in float32
        assert np.mean(got) == pytest.approx(summary, abs=1e-6)


def test_golden_text_metrics_normal_forms():
    for case in golden()["pairs"]:
        for side in ("cand", "ref"):
            if f"{side}_simple" in case:
                assert text_metrics.simple(case[side]) == case[f"{side}_simple"]
            if f"{side}_squad_norm" in case:
                words = " ".join(text_metrics.squad_tokens(case[side]))
                assert words == case[f"{side}_squad_norm"]


def test_only_what_follows_final_answer_counts():
    assert text_metrics.final_answer("Reasoning: it is grey.\nFinal Answer: Yes") == "Yes"
    assert text_metrics.final_answer("Yes") == "Yes"
    assert text_metrics.final_answer("Final Answer: no Final Answer: yes") == "yes"


def test_pairs_equal_only_by_emptiness_are_not_comparable():
    assert text_metrics.accuracy("肝脏", "脾脏") == 1.0
    assert not text_metrics.comparable("肝脏", "脾脏")
    assert text_metrics.comparable("肝脏", "肝脏")
    assert text_metrics.comparable("", "")
    assert text_metrics.comparable("yes", "脾脏")
