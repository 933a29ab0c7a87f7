"""LLMScore against an endpoint that misbehaves: whatever goes wrong is counted, never a score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import made_up
import numpy as np
import pytest
from fake_endpoint import FakeEndpoint

from rg_jax.endpoint import Endpoint
from rg_jax.errors import UserError
from rg_jax.evaluation import judge, judge_prompt, page, refresh, viewer
from rg_jax.evaluation.results import write_results
from rg_jax.evaluation.score import score_results, write_metrics
from rg_jax.judge import judge_folder

REPOSITORY = Path(__file__).parents[2]


def endpoint(fake, cache=None, **options):
    settings = {"pause": 0.001, "timeout": 20, "retries": 1, "cache_dir": cache}
    return Endpoint(fake.url, "judge-7b", **{**settings, **options})


@pytest.fixture
def results():
    """Captions in two languages, open and closed questions; every pair is another one."""
    return made_up.results(24)[0]


@pytest.fixture
def folder(tmp_path, results):
    """What an evaluation leaves in RUN/eval/NAME, and the run's root that shows it."""
    root = tmp_path / "run"
    place = root / "eval" / "made-val"
    place.mkdir(parents=True)
    (root / "config.json").write_text("{}")
    metrics = score_results(results, data="made up", split="val", resamples=200)
    write_results(place / "predictions.jsonl", results)
    for directory in (place, root):
        write_metrics(directory / "metrics.json", metrics)
    overlays = {r.sample.id: f"overlays/{k}.png" for k, r in enumerate(results[:5])}
    refresh.keep_material(place, {"name": "tiny"}, results[:5], overlays, viewer.NO_PICTURES)
    page.write_page(place, metrics, results[:5], overlays, {"name": "tiny"})
    return place


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("4\n<reason>Side missing.</reason>", 4, "Side missing."),
        (" 1 <reason>wrong\norgan</reason>\n", 1, "wrong organ"),
        ("5", 5, ""),
        ("3. <reason>half", 3, "half"),
        ("<think>maybe 2? no</think>5\n<reason>same</reason>", 5, "same"),
    ],
)
def test_a_reply_in_the_form_asked_for_is_read(text, score, reason):
    assert judge.read_reply(text) == judge.Verdict(score, reason)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("The score is 4.", "unparsable"),
        ("<reason>good</reason> 4", "unparsable"),
        ("5 mm lesion is seen in both.", "unparsable"),
        ("4 or 5 <reason>unsure</reason>", "unparsable"),
        ("4/5", "unparsable"),
        ("", "unparsable"),
        ("<think>4", "unparsable"),
        ("0 <reason>nothing agrees</reason>", "score out of range"),
        ("6", "score out of range"),
        ("-1", "score out of range"),
        ("100 <reason>percent</reason>", "score out of range"),
        ("3.5 <reason>between</reason>", "no whole number"),
    ],
)
def test_any_other_reply_is_refused_with_a_reason_to_count_by(text, problem):
    with pytest.raises(ValueError, match=problem):
        judge.read_reply(text)


def test_every_score_has_an_example_drawn_by_the_content_alone():
    pairs = [(f"Question {k}?", f"candidate {k}", f"reference {k}") for k in range(40)]
    drawn = [judge_prompt.examples_for(*pair) for pair in pairs]
    assert drawn == [judge_prompt.examples_for(*pair) for pair in pairs]
    for examples in drawn:
        assert [example.score for example in examples] == [1, 2, 3, 4, 5]
    assert {example for examples in drawn for example in examples} == set(judge_prompt.EXAMPLES)
    for example in judge_prompt.EXAMPLES:  # an example is not shown the judge as its own answer
        assert example not in judge_prompt.examples_for(*example[1:4])


def test_the_endpoint_sees_text_without_marks_and_temperature_0(results):
    with FakeEndpoint(lambda body, number: "3\n<reason>so so</reason>") as fake:
        verdicts = judge.judge(results, endpoint(fake))
    assert set(verdicts.values()) == {judge.Verdict(3, "so so")} and len(verdicts) == len(results)
    for body in fake.asked:
        system, user = (message["content"] for message in body["messages"])
        assert body["temperature"] == 0 and "<p bbox" not in user and "Answer:" not in user
        assert [line.split(":")[0] for line in user.splitlines()][-2:] == ["Candidate", "Reference"]
        assert sum(system.count(f"\nAnswer: {score}\n<reason>") for score in range(1, 6)) == 5
    asked = {body["messages"][1]["content"] for body in fake.asked}
    assert "Question: Is the liver visible?\nCandidate: yes\nReference: yes" in asked


# What goes wrong with a sample, by its place in the file → what it is counted under.
FAULTS = {
    0: ("I would say four.", "unparsable"),
    1: ("7 <reason>excellent</reason>", "score out of range"),
    2: (("status", 500, {}), "HTTP 500"),
    3: (("hang", 20), "timeout"),
    4: (("raw", b"<html>proxy</html>"), "invalid reply"),
    5: ("0", "score out of range"),
    6: (("drop",), "unreachable"),
    7: (("raw", b'{"choices": [{"message": {"content": null}}]}'), "empty answer"),
}


def script(results, faults):
    """A judge that scores by the length of the candidate, and fails where it is told to."""
    texts = [judge_prompt.question_of(*judge.pair(result)) for result in results]
    said = {texts[k]: fault for k, (fault, _) in faults.items()}

    def answer(body, number):
        user = body["messages"][1]["content"]
        score = 1 + len(user) % 5
        return said.get(user, f"{score}\n<reason>length {len(user)}</reason>")

    return answer


def test_faults_are_counted_and_never_scored_or_lost(folder, results):
    texts = [judge_prompt.question_of(*judge.pair(result)) for result in results]
    failing = {texts[k]: reason for k, (_, reason) in FAULTS.items()}
    before = json.loads((folder / "metrics.json").read_text())
    with FakeEndpoint(script(results, FAULTS)) as fake:
        metrics = judge_folder(folder, endpoint(fake, folder.parent / "kept", timeout=4))
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(metrics))
    rows = [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]
    assert len(rows) == len(results)
    kinds = {"caption": [], "open": [], "closed": []}
    wanted_failures = {}
    by_id = {row["id"]: row for row in rows}
    for result, text in zip(results, texts, strict=True):
        row = by_id[result.sample.id]
        kind = {"yesno": "closed"}.get(result.sample.answer_type, result.sample.answer_type)
        if text in failing:
            assert row["score"] is None and row["failure"] == failing[text]
            wanted_failures[failing[text]] = wanted_failures.get(failing[text], 0) + 1
        else:
            assert row["score"] == 1 + len(text) % 5 and row["failure"] == ""
            kinds[kind].append((row["score"] - 1) / 4)
    assert stored["judge"]["failed"] == wanted_failures
    assert stored["judge"]["scored"] + sum(wanted_failures.values()) == len(results)
    for kind, scores in kinds.items():
        figure = stored[f"llm_score_{kind}"]
        total = before[f"text_f1_{kind}"]["n"]
        assert (figure["n"], figure["n_failed"]) == (len(scores), total - len(scores))
        assert figure["mean"] == pytest.approx(np.mean(scores))
        assert figure["low"] <= figure["mean"] <= figure["high"]
    together = stored["llm_score_questions"]
    assert together["n"] == stored["llm_score_open"]["n"] + stored["llm_score_closed"]["n"]
    assert stored["by_language"]["de"]["llm_score_caption"]["n"]
    # All else is as it was.
    assert {k: v for k, v in stored.items() if not k.startswith(("llm_", "by_", "judge"))} == {
        k: v for k, v in before.items() if not k.startswith("by_")
    }


def test_only_what_failed_is_asked_again_and_the_end_is_the_same(folder, results):
    kept = folder.parent / "kept"
    with FakeEndpoint(script(results, FAULTS)) as fake:
        judge_folder(folder, endpoint(fake, kept, timeout=4))
    with FakeEndpoint(script(results, {})) as fake:
        judge_folder(folder, endpoint(fake, kept))
        again = len(fake.asked)
        whole = judge_folder(folder, endpoint(fake, kept))
        assert len(fake.asked) == again  # all is kept by now
    texts = [judge_prompt.question_of(*judge.pair(result)) for result in results]
    assert again == len({texts[k] for k in FAULTS})
    assert whole["judge"] == {
        "model": "judge-7b", "prompt": judge_prompt.VERSION, "scored": 24, "failed": {},
    }  # fmt: skip
    first = [(folder / name).read_bytes() for name in ("metrics.json", "judge.jsonl", "index.html")]
    with FakeEndpoint(script(results, {})) as fake:
        judge_folder(folder, endpoint(fake))
    assert first == [
        (folder / name).read_bytes() for name in ("metrics.json", "judge.jsonl", "index.html")
    ]


def test_the_pages_show_the_scores_and_what_failed(folder, results):
    with FakeEndpoint(script(results, {0: FAULTS[0]})) as fake:
        metrics = judge_folder(folder, endpoint(fake))
    shown = f"{100 * metrics['llm_score_caption']['mean']:.1f}"
    root = folder.parents[1]
    for place, prefix in ((folder, ""), (root, "eval/made-val/")):
        text = (place / "index.html").read_text()
        assert "Captions, LLMScore" in text and f">{shown}<" in text and "judge-7b" in text
        assert "without a score" in text and "length " in text
        assert f'href="{prefix}overlays/0.png"' in text
    assert json.loads((root / "metrics.json").read_text()) == metrics
    assert "Captions, LLMScore" in page.summary(metrics) and "failed" in page.summary(metrics)


def test_a_folder_of_before_pages_were_kept_gets_a_gallery_without_pictures(folder, results):
    (folder / refresh.MATERIAL_FILE).unlink()
    with FakeEndpoint(script(results, {})) as fake:
        judge_folder(folder, endpoint(fake))
    text = (folder / "index.html").read_text()
    assert text.count("<article") == len(results) and "<img" not in text


def test_a_root_that_shows_another_evaluation_stays_as_it_is(folder, results):
    root = folder.parents[1]
    other = score_results(results[:7], data="other", split="val", resamples=50)
    write_metrics(root / "metrics.json", other)
    with FakeEndpoint(script(results, {})) as fake:
        judge_folder(folder, endpoint(fake))
    assert json.loads((root / "metrics.json").read_text()) == json.loads(json.dumps(other))
    assert not (root / "index.html").exists()


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rg_jax.judge", *arguments],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_tells_what_it_found(folder, results):
    with FakeEndpoint(script(results, {0: FAULTS[0]})) as fake:
        done = command(
            str(folder), f"--url={fake.url}", "--model=m", "--pause=0.001", "--retries=1"
        )
    assert done.returncode == 0, done.stderr
    assert "judged by m: 23 samples have a score" in done.stdout
    assert "without a score, unparsable: 1" in done.stdout
    assert (folder.parent / "judge_answers").is_dir()
    with FakeEndpoint(lambda body, number: "garbage") as fake:
        done = command(str(folder), f"--url={fake.url}", "--model=n", "--retries=0")
    assert done.returncode == 2 and "not one answer" in done.stderr.splitlines()[-1]
    figure = json.loads((folder / "metrics.json").read_text())["llm_score_caption"]
    assert figure["mean"] is None and figure["n"] == 0 and figure["n_failed"] > 0


def test_mistakes_of_the_user_are_one_line_and_change_nothing(folder, tmp_path):
    done = command(str(folder))
    assert done.returncode == 2 and "--url" in done.stderr and "Traceback" not in done.stderr
    fake = Endpoint("http://127.0.0.1:9/v1", "m", retries=0)
    with pytest.raises(UserError, match="no such folder"):
        judge_folder(tmp_path / "nothing", fake)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="metrics.json"):
        judge_folder(folder, fake)
    assert not (folder / "judge.jsonl").exists()


def test_the_closing_word_goes_in_either_language():
    """A judge that sees "Antwort:" would take it for a part of the question."""
    for word in ("Answer:", "Antwort:"):
        assert judge._ANSWER.sub("", f"Ist die Leber sichtbar?\n{word}").strip().endswith("?")
