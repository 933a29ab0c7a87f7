"""Tasks: what a record offers, exact prompts and targets, the mixing rule, lost boxes."""

from collections import Counter

import numpy as np
import pytest
from fabricate import make_record

from rg_jax.data import tasks
from rg_jax.data.augment import Crop
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION
from rg_jax.grounding.spans import parse, strip_marks

ALL = tasks.TASK_NAMES


@pytest.fixture
def record():
    """Two organs in a hand-written caption and one grounded question, English and German."""
    made = make_record(0, height=40, width=80, grounded=False, questions=0)
    made["texts"] = {
        "en": {
            "caption": "The liver and the spleen.",
            "clinical_information": "Fever ,known cyst",
            "clinical_question": "Mass?",
        },
        "de": {"caption": "Die Leber.", "clinical_information": "", "clinical_question": ""},
    }
    ask = {"language": "en", "type": "grounded", "choices": []}
    made["qa"] = [
        {**ask, "question": "Is the liver visible?", "answer": "Yes, the liver."},
        {**ask, "question": "Is the aorta visible?", "answer": "No, not the aorta."},
        {**ask, "type": "multiple", "question": "Side?", "answer": "left",
         "choices": ["left", "right"]},
        {**ask, "type": "open", "question": "Organ?", "answer": "spleen"},
    ]  # fmt: skip
    box = (8.0, 4.0, 24.0, 20.0)
    place = {"language": "en", "class_id": 5, "box": box}
    made["entities"] = [
        {**place, "field": "caption", "start": 18, "end": 24, "class_id": 1,
         "box": (40.0, 0.0, 80.0, 40.0)},
        {**place, "field": "caption", "start": 4, "end": 9},
        {**place, "field": "qa/0/answer", "start": 9, "end": 14},
        {**place, "field": "qa/3/answer", "start": 0, "end": 6, "class_id": 1},
    ]  # fmt: skip
    return made


def make(record, task, language="en", index=None, fmt=OURS, crop=None, context=None):
    return tasks.make_sample(record, task, language, None, fmt, crop, index, context)


def test_report(record):
    sample = make(record, "report")
    assert sample.prefix == (
        "\nClinical information: Fever, known cyst.\nQuestion: Mass?\nCaption this image: "
    )
    assert sample.context == "Clinical information: Fever, known cyst.\nQuestion: Mass?"
    assert sample.target == sample.text == "The liver and the spleen."
    assert sample.entities == () and sample.counts == {}
    assert make(record, "report", "de").prefix == "\n\nBeschreibe dieses Bild: "
    assert make(record, "report", context="none").prefix == "\n\nCaption this image: "
    assert make(record, "report", context="question").context == "Question: Mass?"


def test_detect(record):
    sample = make(record, "detect", context="none")
    assert sample.prefix == "\n\nCaption this image and detect keywords: "
    assert sample.target == (
        "The <p bbox=<loc0051><loc0051><loc0256><loc0153> id=<seg005>>liver</p> and the"
        " <p bbox=<loc0000><loc0256><loc0511><loc0511> id=<seg001>>spleen</p>."
    )
    assert sample.text == "The liver and the spleen."
    assert [e.mention for e in sample.entities] == ["liver", "spleen"]
    assert sample.entities[0].box == (0.1, 0.1, 0.3, 0.5)
    with pytest.raises(UserError, match="rec0_0000.*detect.*'de'"):
        make(record, "detect", "de")


def test_vqa(record):
    choice = make(record, "vqa", index=0)
    assert choice.prefix == "\nSide?\nleft\nright\nAnswer: " and choice.target == "left"
    assert choice.context == "Side?\nleft\nright" and choice.answer_type == "multiple"
    open_ = make(record, "vqa", index=1)
    assert open_.prefix == "\nOrgan?\nAnswer: " and open_.target == "spleen"
    assert open_.entities == () and open_.id == "rec0_0000/vqa/en/1"


def test_detect_vqa(record):
    yes, no = (make(record, "detect_vqa", index=i) for i in range(2))
    assert yes.prefix == "\nIs the liver visible? " and yes.answer_type == "grounded"
    assert strip_marks(yes.target, OURS) == "Yes, the liver." != yes.target
    assert no.target == "No, not the aorta." and no.entities == ()


def test_slake_asks_its_own_questions_and_tags_answers(record):
    samples = [make(record, "slake", index=i) for i in range(2)]
    assert samples[1].prefix == "\nOrgan?\nAnswer: "
    assert samples[1].target.endswith("id=<seg001>>spleen</p>")
    assert "grounded" not in {s.answer_type for s in samples}
    assert [bool(s.entities) for s in samples] == [False, True]
    plain = make(record, "slake", index=1, fmt=PUBLISHED_SEGMENTATION)
    assert plain.target == "spleen" and plain.counts == {}


def test_what_applies(record):
    found = tasks.availability(record, ALL, ("en", "de", "zh"), OURS)
    assert found == {
        "report": ["en", "de"],
        "detect": ["en"],
        "vqa": ["en"],
        "detect_vqa": ["en"],
        "slake": ["en"],
        "segment": [],
        "segment_vqa": [],
        "joint": [],
        "joint_vqa": [],
    }
    masks_only = tasks.availability(record, ALL, ("en",), PUBLISHED_SEGMENTATION)
    assert not masks_only["detect"] and not masks_only["detect_vqa"] and masks_only["slake"]
    record["texts"]["de"]["caption"] = "  "
    assert tasks.availability(record, ["report"], ("de",), OURS) == {"report": []}
    with pytest.raises(UserError, match="'retort' is not one of report"):
        tasks.get_task("retort")


def test_entities_without_class_need_a_format_that_allows_them(record):
    for entity in record["entities"]:
        entity["class_id"] = 0
    sample = make(record, "detect")
    assert ">liver</p>" in sample.target and "id=" not in sample.target
    assert tasks.availability(record, ["detect"], ("en",), PUBLISHED_DETECTION) == {"detect": []}
    record["entities"][0]["class_id"] = 1
    sample = make(record, "detect", fmt=PUBLISHED_DETECTION)
    assert [e.mention for e in sample.entities] == ["spleen"]
    assert sample.counts == {"entities_without_class": 1}


def test_a_crop_moves_boxes_and_drops_what_it_cuts_away(record):
    sample = make(record, "detect", crop=Crop(40, 0, 80, 20, 80, 40))
    assert [e.mention for e in sample.entities] == ["spleen"]
    assert sample.entities[0].box == (0, 0, 1, 1)
    assert sample.counts == {"entities_dropped_by_crop": 1}
    assert sample.text == "The liver and the spleen."


def test_a_grounded_caption_without_places_becomes_a_report(record):
    sample = make(record, "detect", crop=Crop(30, 30, 40, 40, 80, 40))
    assert sample.task == "report" and sample.target == sample.text
    assert sample.prefix.endswith("\nCaption this image: ")
    assert sample.counts == {"detect_became_report": 1, "entities_dropped_by_crop": 2}


def test_text_that_looks_like_a_mark(record):
    # As a target it would teach broken marks; in a prompt it is harmless.
    record["texts"]["en"]["clinical_question"] = "What is </p>?"
    assert "</p>" in make(record, "report").prefix
    record["texts"]["en"]["caption"] = "The liver <loc0001> and"
    assert tasks.drafts(record, "report", "en", OURS) == ([], 1)
    assert tasks.drafts(record, "detect", "en", OURS) == ([], 1)
    record["texts"]["en"]["caption"] = "A liver < 5 cm and the spleen id=3."
    assert tasks.availability(record, ["report"], ("en",), OURS) == {"report": ["en"]}


def test_wrong_spans_name_the_record(record):
    record["entities"][1]["end"] = 99
    with pytest.raises(UserError, match="rec0_0000: caption in 'en'"):
        make(record, "detect")


def test_training_draws_contexts_and_questions_evenly(record):
    rng = np.random.default_rng(0)
    made = [tasks.make_sample(record, "report", "en", rng, OURS) for _ in range(2000)]
    contexts = Counter(s.context for s in made)
    assert len(contexts) == 4 and all(abs(n / 2000 - 0.25) < 0.04 for n in contexts.values())
    made = [tasks.make_sample(record, "slake", "en", rng, OURS) for _ in range(2000)]
    questions = Counter(s.id for s in made)
    assert len(questions) == 2 and all(abs(n / 2000 - 0.5) < 0.04 for n in questions.values())


def shares(available, weights, languages=("en", "de"), grounded_first=True, n=4000):
    rng = np.random.default_rng(0)
    drawn = Counter(
        tasks.choose(available, weights, languages, rng, grounded_first) for _ in range(n)
    )
    return {key: count / n for key, count in drawn.items()}


def test_the_mixing_rule_of_the_paper():
    weights = {"report": 1.0, "vqa": 1.0, "detect": 1.0}
    both = {"report": ["en", "de"], "vqa": ["en", "de"], "detect": ["en", "de"]}
    drawn = shares(both, weights)
    assert set(drawn) == {("detect", "en"), ("detect", "de")}
    assert drawn["detect", "en"] == pytest.approx(0.5, abs=0.03)
    # Grounded in one language only: report and VQA half and half, languages too.
    one = {**both, "detect": ["de"]}
    drawn = shares(one, weights)
    assert len(drawn) == 4 and ("detect", "de") not in drawn
    assert all(share == pytest.approx(0.25, abs=0.03) for share in drawn.values())
    # A mixture of one language asks for that language only.
    assert set(shares(one, weights, ("de",))) == {("detect", "de")}
    # Nothing but the grounded task: it takes what there is.
    assert set(shares(one, {"detect": 1.0})) == {("detect", "de")}


def test_grounded_questions_do_not_displace_the_others():
    available = {"slake": ["en"], "detect_vqa": ["en"]}
    drawn = shares(available, {"slake": 3.0, "detect_vqa": 1.0}, ("en",))
    assert drawn["slake", "en"] == pytest.approx(0.75, abs=0.03)


def test_weights_without_the_rule():
    both = {"report": ["en", "de"], "vqa": ["de"], "detect": ["en"], "slake": []}
    weights = {"report": 2.0, "vqa": 1.0, "detect": 1.0, "slake": 5.0}
    drawn = shares(both, weights, grounded_first=False)
    assert drawn["vqa", "de"] == pytest.approx(0.25, abs=0.03)
    assert drawn["detect", "en"] == pytest.approx(0.25, abs=0.03)
    assert drawn["report", "en"] == pytest.approx(0.25, abs=0.03)
    assert set(shares(both, {"report": 1.0, "vqa": 0.0}, grounded_first=False)) == {
        ("report", "en"),
        ("report", "de"),
    }
    with pytest.raises(UserError, match="no task"):
        shares(both, {"slake": 1.0})


def test_targets_read_back():
    for index in range(30):
        record = make_record(index, modality="XR" if index % 3 == 0 else "MR")
        for task in ("detect", "detect_vqa", "slake"):
            for language in ("en", "de"):
                sample = make(record, task, language)
                parsed = parse(sample.target, OURS)
                assert not parsed.malformed and parsed.text == sample.text
                spans = [(e.mention, e.start, e.end, e.class_id) for e in parsed.entities]
                assert spans == [(e.mention, e.start, e.end, e.class_id) for e in sample.entities]
