"""Prompts, contexts and template questions."""

import dataclasses

import numpy as np
import pytest

from rg_jax.grounding import anatomy, prompts
from rg_jax.grounding.prompts import grounded_questions, prefix, report_context

EXACT = [
    ("report", "en", "\nC\nCaption this image: "),
    ("report", "de", "\nC\nBeschreibe dieses Bild: "),
    ("detect", "en", "\nC\nCaption this image and detect keywords: "),
    ("detect", "de", "\nC\nBeschreibe dieses Bild und detektiere Schlüsselwörter: "),
    ("segment", "en", "\nC\nCaption this image and segment keywords: "),
    ("segment", "de", "\nC\nBeschreibe dieses Bild und segmentiere die Schlüsselwörter: "),
    ("joint", "en", "\nC\nCaption this image, detect and segment keywords: "),
    (
        "joint",
        "de",
        "\nC\nBeschreibe dieses Bild, detektiere und segmentiere die Schlüsselwörter: ",
    ),
]


@pytest.mark.parametrize(("task", "language", "expected"), EXACT)
def test_report_prefixes(task, language, expected):
    assert prefix(task, language, context="C") == expected
    assert prefix(task, language) == expected.replace("\nC\n", "\n\n")


@pytest.mark.parametrize("task", ["vqa", "slake", "vqa_rad"])
def test_question_prefixes(task):
    assert prefix(task, "en", question="Which organ?") == "\nWhich organ?\nAnswer: "
    assert prefix(task, "de", question="Welches Organ?") == "\nWelches Organ?\nAntwort: "


def test_choices_stand_on_lines_below_the_question():
    assert prefix("vqa", "en", question="Q?", choices=("a", "b")) == "\nQ?\na\nb\nAnswer: "


def test_grounded_questions_have_no_prompt():
    for task in ("detect_vqa", "segment_vqa"):
        assert prefix(task, "de", question="Was?") == "\nWas? "
    # One model that does both is told what is wanted.
    assert prefix("joint_vqa", "de", question="Was?") == (
        "\nWas?\nAntworte, detektiere und segmentiere: "
    )


def test_chinese_questions_of_slake():
    assert prefix("slake", "zh", question="什么？") == "\n什么？\n答案： "
    with pytest.raises(ValueError, match="'report' has no prompt in language 'zh'"):
        prefix("report", "zh")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: prefix("draw", "en"), "'draw'"),
        (lambda: prefix("report", "xx"), "'xx'"),
        (lambda: prefix("report", "en", question="Q?"), "takes a context"),
        (lambda: prefix("vqa", "en", context="C", question="Q?"), "takes a question"),
        (lambda: prefix("vqa", "en"), "needs a question"),
        (lambda: prefix("detect_vqa", "en", question="Q?", choices=("a",)), "no choices"),
        (lambda: report_context("en", "a", "b", which="all"), "'all'"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_report_context_lines():
    assert report_context("en", "Flank pain", "Urinary calculi ?") == (
        "Clinical information: Flank pain.\nQuestion: Urinary calculi?"
    )
    assert report_context("de", "Flankenschmerzen", "Harnsteine?") == (
        "Klinische angaben: Flankenschmerzen.\nFragestellung: Harnsteine?"
    )


def test_report_context_choice_of_fields():
    assert report_context("en", "A", "B?", which="none") == ""
    assert report_context("en", "A", "B?", which="information") == "Clinical information: A."
    assert report_context("en", "A", "B?", which="question") == "Question: B?"
    # Equal after cleaning: written once.
    assert report_context("en", "Restaging", "Restaging .") == "Clinical information: Restaging."
    assert report_context("en", "", "B?") == "Question: B?"
    assert report_context("en", "A", "  ") == "Clinical information: A."
    assert report_context("en", "", "") == ""
    assert report_context("en", "", "", style="published") == ""
    assert report_context("en", "1.2 cm", "", style="published") == "Clinical information: 1. 2 cm."


def structures(language, ids):
    return [(class_id, anatomy.display(class_id, language)) for class_id in ids]


@pytest.mark.parametrize("language", ["en", "de"])
def test_grounded_questions_claim_only_what_is_there(language):
    rng = np.random.default_rng(0)
    yes, no = {"en": ("Yes", "No"), "de": ("Ja", "Nein")}[language]
    for _ in range(300):
        ids = rng.permutation(np.arange(1, 122))[: int(rng.integers(0, 6))].tolist()
        candidates = anatomy.absent_classes(ids, "CT")
        others = rng.choice(candidates, size=int(rng.integers(0, 4)), replace=False).tolist()
        present, absent = structures(language, ids), structures(language, others)
        made = grounded_questions(present, absent, language, rng)
        kinds = [question.kind for question in made]
        assert kinds.count("yes") == len(present) and kinds.count("no") == len(absent)
        assert kinds.count("which") == (1 if present else 0)
        for question in made:
            named = [question.answer[start:end] for start, end, _ in question.mentions]
            named_ids = [class_id for _, _, class_id in question.mentions]
            assert set(named_ids) <= set(ids)
            assert named == [anatomy.display(class_id, language) for class_id in named_ids]
            if question.kind == "no":
                assert question.answer.startswith(no + ",") and not question.mentions
            elif question.kind == "yes":
                assert question.answer.startswith(yes + ",") and len(named) == 1
                assert named[0] in question.question
            else:
                assert named_ids == ids
            assert "{" not in question.question + question.answer
            assert question.answer.endswith(".")


def test_a_list_reads_like_a_list():
    made = grounded_questions(structures("de", [5, 1, 2]), [], "de", np.random.default_rng(0))
    assert made[-1].answer.endswith(": Leber, Milz und rechte Niere.")
    made = grounded_questions(structures("en", [5]), [], "en", np.random.default_rng(0))
    assert made[-1].answer.endswith(": liver.")


def test_a_list_that_would_have_to_be_cut_is_not_asked_for():
    present = structures("en", [1, 4, 5])
    rng = np.random.default_rng(0)
    assert [q.kind for q in grounded_questions(present, [], "en", rng, max_listed=2)] == ["yes"] * 3
    assert grounded_questions(present, [], "en", rng, max_listed=3)[-1].kind == "which"


def test_the_same_seed_asks_the_same():
    present, absent = structures("en", [1, 4, 5]), structures("en", [6, 7])
    first = grounded_questions(present, absent, "en", np.random.default_rng(3))
    assert first == grounded_questions(present, absent, "en", np.random.default_rng(3))
    wordings = {
        q.question
        for seed in range(20)
        for q in grounded_questions(present[:1], [], "en", np.random.default_rng(seed))
    }
    assert len(wordings) > 2


def test_a_structure_cannot_be_both():
    with pytest.raises(ValueError, match="liver"):
        grounded_questions([(5, "liver")], [(5, "liver")], "en", np.random.default_rng(0))


def test_names_with_braces_are_taken_literally():
    made = grounded_questions([(0, "{names}")], [], "en", np.random.default_rng(0))
    assert all("{names}" in question.answer for question in made)
    assert made[0].answer[slice(*made[0].mentions[0][:2])] == "{names}"


def test_a_language_is_added_by_its_table_alone(monkeypatch):
    french = dataclasses.replace(
        prompts.WORDINGS["en"],
        prompts={**prompts.WORDINGS["en"].prompts, "report": "Décris cette image :"},
        information_label="Renseignements :",
        yes_no=(("Voit-on : {name} ?", "Oui, on voit : {name}.", "Non, on ne voit pas : {name}."),),
        which=(("Que voit-on ?", "On voit : {names}."),),
        last=" et ",
    )
    monkeypatch.setitem(prompts.WORDINGS, "fr", french)
    assert prefix("report", "fr") == "\n\nDécris cette image : "
    assert report_context("fr", "douleur") == "Renseignements : douleur."
    made = grounded_questions([(5, "foie"), (1, "rate")], [], "fr", np.random.default_rng(0))
    assert made[-1].answer == "On voit : foie et rate."
