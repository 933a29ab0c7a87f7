"""Other words for metadata questions: what asks the same is taken, and nothing else."""

import json

import pytest
from fake_endpoint import FakeEndpoint
from test_write_vqa import read, rows, save, stage

from tools import slice_questions
from tools.slice_questions import Known
from tools.wordings import refusal
from tools.write_vqa import IDENTIFYING

CT = ("Which imaging modality was used?", "modality", "en")
EITHER = ("Was CT or MR used?", "modality", "en")
PLANE = ("Is this slice axial?", "plane", "en")
SIDE = ("On which side of the image is the patient's left?", "left_at", "en")
HAND = ("Is the patient's left on this side of the image: Right?", "left_at", "en")
KOPF = ("Wurde diese Körperregion untersucht: Kopf?", "body_part", "de")
TAKEN = [
    (*CT, "What technique was this image acquired with?"),
    (*EITHER, "Which was used for this image, MR or CT?"),
    (*PLANE, "Does this slice have an axial orientation?"),
    (*SIDE, "Where in the image does the patient's left lie?"),
    (*HAND, "Does the patient's left appear on the Right side of the image?"),
    (*KOPF, "Ist der Kopf die untersuchte Region?"),
]
REFUSED = [
    (*CT, "Name the modality.", "no single question"),
    (*CT, "Which modality? And which plane?", "no single question"),
    (*CT, "Which imaging modality was used in 2019?", "number or identifying text"),
    (*CT, "Which modality did Dr. Meier use?", "number or identifying text"),
    (*CT, "Which modality was not used?", "denial"),
    (*CT, "Which modality was used for this CT?", "other names than in the question"),
    (*CT, "In which plane was the scan taken?", "another subject"),
    (*CT, "What can be seen?", "another subject"),
    (*CT, "Was an imaging modality used?", "another form of question"),
    (*EITHER, "Is CT the modality used?", "another form of question"),
    (*EITHER, "Was CT used rather than MR?", "another form of question"),
    (*EITHER, "Was CT or ultrasound used?", "other names than in the question"),
    (*PLANE, "Is this slice coronal?", "other names than in the question"),
    (*PLANE, "Isn't this slice axial?", "denial"),
    (*PLANE, "Is this slice anything other than axial?", "denial"),
    (*SIDE, "On which side of the image is the patient's right?", "another subject"),
    (*HAND, "Is the patient's left on this side of the image: Left?", "other names"),
    (*KOPF, "Wurde der Kopf nicht untersucht?", "denial"),
    (*KOPF, "Wurde die Region Hals untersucht?", "other names than in the question"),
]


@pytest.mark.parametrize(("question", "fact", "language", "wording"), TAKEN)
def test_wordings_that_ask_the_same(question, fact, language, wording):
    assert refusal(wording, question, fact, language, IDENTIFYING) == ""


@pytest.mark.parametrize(("question", "fact", "language", "wording", "reason"), REFUSED)
def test_wordings_that_do_not(question, fact, language, wording, reason):
    assert reason in refusal(wording, question, fact, language, IDENTIFYING)


def test_the_questions_of_the_rules_pass_as_wordings_of_themselves():
    seen = set()
    for seed in range(300):
        known = Known("CT", "HEAD", "axial", "right")
        facts = [fact for fact, _, _ in slice_questions.plan(known, seed)]
        for language, pairs in slice_questions.questions(known, seed).items():
            for fact, pair in zip(facts, pairs, strict=True):
                question = pair["question"]
                seen.add(question)
                assert refusal(question, question, fact, language, IDENTIFYING) == "", question
    assert len(seen) > 40


def reworded(body, number):
    """A model that words some questions well and lies about others."""
    said = body["messages"][1]["content"]
    if not said.startswith("{"):  # a report sentence
        return {"pairs": []}
    question = json.loads(said)["question"]
    return {"questions": [f"Please say: {question}", "Which organ is this?", f"{question} No?"]}


def test_the_model_words_questions_and_answers_stay(tmp_path):
    source = save(tmp_path / "in.parquet", rows(30))
    stage(source, tmp_path / "rule.parquet", "--language=en")
    with FakeEndpoint(reworded) as fake:
        flags = ["--language=en", "--wordings=3", f"--url={fake.url}", "--model=m", "--retries=0"]
        slices, _, _ = stage(source, tmp_path / "out.parquet", *flags)
        asked = [b for b in fake.asked if b["messages"][1]["content"].startswith("{")]
        stage(source, tmp_path / "again.parquet", *flags)
    plain = [
        pair for row in read(tmp_path / "rule.parquet") for pair in row["english"]["dicom_vqa"]
    ]
    worded = [
        pair for row in read(tmp_path / "out.parquet") for pair in row["english"]["dicom_vqa"]
    ]
    assert len(plain) == len(worded) == 90
    # Each question is asked for once, whatever the number of slices.
    questions = {pair["question"] for pair in plain}
    assert len(asked) == len(questions) < 40
    changed = 0
    for before, after in zip(plain, worded, strict=True):
        assert {**after, "question": ""} == {**before, "question": ""}
        assert after["question"] in (before["question"], f"Please say: {before['question']}")
        changed += after["question"] != before["question"]
    assert 20 < changed < 70
    assert slices.kept == {
        "pairs by rule": 90 - changed,
        "pairs by rule, worded by the model": changed,
    }
    assert slices.noted["wording refused: no single question"] == len(questions)
    other_form = slices.noted["wording refused: another form of question"]
    assert other_form + slices.noted["wording refused: another subject"] + slices.noted[
        "wording refused: other names than in the question"
    ] == len(questions)
    again = (tmp_path / "again.parquet").read_bytes()
    assert again == (tmp_path / "out.parquet").read_bytes()


FAULTS = {
    "not JSON": "Well…",
    "HTTP 500": ("status", 500, {}),
    "HTTP 429": ("status", 429, {"Retry-After": "0"}),
    "refused answer: not the form asked for": {"pairs": []},
    "refused answer: no wording": {"questions": []},
    "refused answer: no single question": {"questions": ["Tell me.", "CT."]},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_model_that_fails_leaves_the_words_of_the_rule(tmp_path, kind):
    source = save(tmp_path / "in.parquet", rows(4))
    stage(source, tmp_path / "rule.parquet", "--language=en")
    with FakeEndpoint(lambda body, number: FAULTS[kind]) as fake:
        flags = ["--language=en", "--wordings=2", f"--url={fake.url}", "--model=m", "--retries=1"]
        slices, _, _ = stage(source, tmp_path / "out.parquet", *flags)
    made = read(tmp_path / "out.parquet")
    assert [row["english"]["dicom_vqa"] for row in made] == [
        row["english"]["dicom_vqa"] for row in read(tmp_path / "rule.parquet")
    ]
    asked = {pair["question"] for row in made for pair in row["english"]["dicom_vqa"]}
    assert slices.kept == {"pairs by rule": 12}
    assert slices.noted == {f"no other wording: {kind}": len(asked)}
