"""Two evaluations against each other: paired differences, refusals, what is shown."""

import dataclasses
import json

import made_up
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.evaluation import compare
from rg_jax.evaluation.results import make_result, write_results
from rg_jax.evaluation.score import score_results, write_metrics
from rg_jax.grounding.format import OURS

B = 200


def write(folder, results, split="val", **about):
    folder.mkdir(parents=True)
    metrics = score_results(results, data="made up", split=split, resamples=B, about=about)
    write_results(folder / "predictions.jsonl", results)
    write_metrics(folder / "metrics.json", metrics)
    return folder


def better(results, every=2):
    """The same samples, every second one answered without a fault."""
    return [
        make_result(r.sample, r.sample.target, OURS) if k % every == 0 else r
        for k, r in enumerate(results)
    ]


@pytest.fixture
def results():
    return made_up.results(24)[0]


@pytest.fixture
def two(tmp_path, results):
    """Two runs' folders, of which the second is the better one."""
    write(tmp_path / "one" / "eval" / "made-up-val", results, step=8)
    write(tmp_path / "two" / "eval" / "made-up-val", better(results), step=12)
    return tmp_path / "one", tmp_path / "two"


def error_of(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_differences_are_b_minus_a_and_paired(two, results, tmp_path, capsys):
    (found,) = compare.compare(*two, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
    row = found["metrics"]["g_iou"]
    one, other = (json.loads((d / "eval/made-up-val/metrics.json").read_text()) for d in two)
    assert row["a"] == pytest.approx(one["g_iou"]) and row["b"] == pytest.approx(other["g_iou"])
    gap = row["difference"]
    assert gap["mean"] == pytest.approx(other["g_iou"]["mean"] - one["g_iou"]["mean"])
    assert 0 < gap["low"] < gap["mean"] < gap["high"]
    points = [[r.score.g_iou for r in side if r.grounded] for side in (results, better(results))]
    assert gap["mean"] == pytest.approx(np.mean(points[1]) - np.mean(points[0]))
    assert found["by_language"]["de"]["g_iou"]["difference"]["n"] > 0
    assert set(found["by_definition"]) == {
        "paper", "published_detection", "published_segmentation",
    }  # fmt: skip
    assert "liver" in found["by_class"]
    out = capsys.readouterr().out
    assert "A = one at step 8, B = two at step 12" in out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("G-IoU ")]
    assert f"{100 * gap['mean']:+.1f}" in line and "*" in line


def test_a_run_against_itself_differs_nowhere(two, tmp_path, capsys):
    (found,) = compare.compare(two[0], two[0], tmp_path / "out")
    assert found["same_text"] == found["n"] == 24 and found["disagreements"] == []
    for name, row in found["metrics"].items():
        if row["difference"]["n"]:
            assert row["difference"]["low"] == row["difference"]["high"] == 0.0, name
    assert "Nowhere" in (tmp_path / "out" / "index.html").read_text()
    assert " *" not in capsys.readouterr().out.replace("  * the interval", "")


def test_the_widest_gaps_come_first_with_both_answers(two, tmp_path):
    (found,) = compare.compare(*two, tmp_path / "out")
    gaps = [abs(row["b"] - row["a"]) for row in found["disagreements"]]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0
    page = (tmp_path / "out" / "index.html").read_text()
    first, second = (page.index(row["id"]) for row in found["disagreements"][:2])
    assert first < second
    assert page.count('<article class="both">') == len(gaps)
    assert "No pictures: it is not known where the data set lies" in page
    assert "://" not in page and "Not a medical device" in page


def test_only_shared_samples_count_and_the_rest_is_told(tmp_path, results):
    a = write(tmp_path / "a", results[:20])
    b = write(tmp_path / "b", better(results)[4:])
    (found,) = compare.compare(a, b, tmp_path / "out")
    assert (found["n"], found["only_in_a"], found["only_in_b"]) == (16, 4, 4)
    assert any("4 samples only in a" in note for note in found["notes"])


def test_other_sets_are_refused_and_named(tmp_path, results):
    others = [
        dataclasses.replace(
            r,
            sample=dataclasses.replace(
                r.sample, id=f"x{r.sample.id}", record_id=f"x{r.sample.record_id}"
            ),
        )
        for r in results
    ]
    a, b = write(tmp_path / "a", results), write(tmp_path / "b", others, split="test")
    message = error_of(lambda: compare.compare(a, b, tmp_path / "out"))
    assert "share no sample" in message and "made up val" in message and "made up test" in message
    assert not (tmp_path / "out").exists()


def test_other_references_are_refused(tmp_path, results):
    moved = results[3].sample
    entities = tuple(dataclasses.replace(e, box=(0.0, 0.0, 0.1, 0.1)) for e in moved.entities)
    changed = [
        make_result(dataclasses.replace(moved, entities=entities), r.prediction, OURS)
        if r.sample.id == moved.id
        else r
        for r in results
    ]
    a, b = write(tmp_path / "a", results), write(tmp_path / "b", changed)
    message = error_of(lambda: compare.compare(a, b, tmp_path / "out"))
    assert "1 of 24 shared samples" in message and moved.id in message


def test_what_else_differs_is_announced(tmp_path, results, capsys):
    prompted = [
        dataclasses.replace(r, sample=dataclasses.replace(r.sample, prefix="\nother\n"))
        for r in results
    ]
    a = write(tmp_path / "a", results, benchmark={"name": "slake"})
    b = write(tmp_path / "b", prompted)
    compare.compare(a, b, tmp_path / "out")
    out = capsys.readouterr().out
    assert "benchmark: slake and None" in out
    assert "24 of 24 samples were put with other prompts" in out


def test_two_runs_with_several_sets(two, results, tmp_path, capsys):
    write(two[0] / "eval" / "more-val", results)
    write(two[1] / "eval" / "more-val", results)
    write(two[1] / "eval" / "third-val", results)
    found = compare.compare(*two, tmp_path / "out")
    assert len(found) == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"made-up-val", "more-val"}
    assert "only in two, not compared: third-val" in capsys.readouterr().out


def test_what_is_no_evaluation_and_what_may_not_be_replaced(two, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no evaluation" in error_of(lambda: compare.compare(two[0], tmp_path / "empty"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in error_of(lambda: compare.compare(*two, tmp_path / "out"))
    (two[1] / "eval/made-up-val/metrics.json").unlink()
    assert "metrics.json" in error_of(lambda: compare.compare(*two, tmp_path / "new"))
    assert "--definition=mine" in error_of(
        lambda: compare.compare(two[0], two[0], tmp_path / "new", definition="mine")
    )


def asked_as(results, task):
    """The same samples under another task's name."""
    return [
        dataclasses.replace(
            r,
            sample=dataclasses.replace(
                r.sample, id=f"{r.sample.record_id}/{task}/{r.sample.language}/{k}", task=task
            ),
        )
        for k, r in enumerate(results)
    ]


def test_one_task_may_stand_for_another(tmp_path, results, capsys):
    write(tmp_path / "boxes", asked_as(results, "detect"))
    write(tmp_path / "both", asked_as(better(results), "joint"))
    (found,) = compare.compare(tmp_path / "boxes", tmp_path / "both", tmp_path / "out")
    assert "task: detect and joint" in found["notes"]
    assert found["metrics"]["g_iou"]["difference"]["mean"] > 0
    assert found["only_in_a"] == found["only_in_b"] == 0
    twice = asked_as(results, "detect") + asked_as(results, "segment")
    write(tmp_path / "several", twice)
    message = error_of(lambda: compare.compare(tmp_path / "several", tmp_path / "both"))
    assert "share no sample" in message
