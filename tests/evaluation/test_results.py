"""Results: what is written to predictions.jsonl, and that it can be read back."""

import json

import made_up
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.evaluation.results import in_order, make_result, read_results, write_results
from rg_jax.grounding.format import OURS

KEYS = {
    "id", "record_id", "task", "language", "modality", "answer_type", "prompt", "reference",
    "reference_text", "reference_entities", "prediction", "prediction_text",
    "prediction_entities", "malformed", "g_iou", "matches", "counts",
    "marks", "mask_scored", "mask_g_iou",
}  # fmt: skip


def test_written_results_are_read_back_as_they_were(tmp_path):
    results, _ = made_up.results(24)
    assert any(r.malformed for r in results) and any(not r.grounded for r in results)
    write_results(tmp_path / "predictions.jsonl", results)
    assert read_results(tmp_path / "predictions.jsonl") == in_order(results)


def test_the_file_does_not_depend_on_the_order_of_results(tmp_path):
    results, _ = made_up.results(12)
    write_results(tmp_path / "a.jsonl", results)
    write_results(tmp_path / "b.jsonl", results[::-1])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_a_line_holds_these_fields_and_no_others(tmp_path):
    results, _ = made_up.results(4)
    write_results(tmp_path / "p.jsonl", results)
    for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == KEYS


def test_texts_with_line_separators_stay_one_line(tmp_path):
    sample, _ = made_up.detect_sample(3, "de")
    result = make_result(sample, "eins\u2028zwei\nüber\x85drei", OURS)
    write_results(tmp_path / "p.jsonl", [result])
    assert read_results(tmp_path / "p.jsonl")[0].text == "eins\u2028zwei\nüber\x85drei"


def test_one_sample_evaluated_twice_is_refused(tmp_path):
    results, _ = made_up.results(3)
    with pytest.raises(ValueError, match="made-up-001"):
        write_results(tmp_path / "p.jsonl", [*results, results[1]])
    assert not (tmp_path / "p.jsonl").exists()


def test_a_cut_file_is_refused_naming_the_line(tmp_path):
    results, _ = made_up.results(3)
    path = tmp_path / "p.jsonl"
    write_results(path, results)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="line 3"):
        read_results(path)
    with pytest.raises(UserError, match="missing"):
        read_results(tmp_path / "missing.jsonl")


def test_matches_point_at_the_entities_they_compare():
    results, _ = made_up.results(24)
    for result in results:
        if result.score.matches:
            ious = [match.iou for match in result.score.matches]
            assert np.mean(ious) == pytest.approx(made_up.mean_iou(result))
