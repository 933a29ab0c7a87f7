"""The blind baseline: the best constant answer there is, fitted on training samples alone."""

import dataclasses
import itertools
import json

import made_up
import numpy as np
import pytest

from rg_jax.data.tasks import Sample
from rg_jax.errors import UserError
from rg_jax.evaluation.baseline import BlindBaseline
from rg_jax.evaluation.giou import score_sample
from rg_jax.evaluation.results import scored
from rg_jax.grounding.spans import Entity


def train(n: int = 60, language: str = "en") -> list[Sample]:
    return [made_up.detect_sample(900 + k, language)[0] for k in range(n)]


def mean_score(samples, answer) -> float:
    return float(np.mean([score_sample(scored(s.entities), answer(s)).g_iou for s in samples]))


def test_the_fit_knows_its_own_score():
    samples = train()
    baseline = BlindBaseline.fit(samples)
    reached = baseline.training_g_iou[("detect", "en")]
    assert reached == pytest.approx(mean_score(samples, baseline.constant), abs=1e-5)


def test_no_other_set_of_structures_scores_higher():
    samples = train(30)
    baseline = BlindBaseline.fit(samples)
    group = ("detect", "en")
    every = {e.class_id: e for e in BlindBaseline.fit(samples).constants[group]}
    for class_id, mean_box in baseline.mean_boxes.items():
        number = int(class_id.removeprefix("#"))
        every.setdefault(number, (made_up.ORGANS[number][0], number, mean_box))
    scores = [
        mean_score(samples, lambda _, chosen=chosen: [tuple(every[c]) for c in chosen])
        for size in range(1, len(every) + 1)
        for chosen in itertools.combinations(sorted(every), size)
    ]
    assert baseline.training_g_iou[group] == pytest.approx(max(scores), abs=1e-5)


def test_each_language_gets_its_own_words():
    baseline = BlindBaseline.fit(train(30) + train(30, "de"))
    de = baseline.constants[("detect", "de")]
    en = baseline.constants[("detect", "en")]
    assert any(e.mention == "Leber" for e in de) and any(e.mention == "liver" for e in en)
    assert all(e.mention != "liver" for e in de)


def test_told_the_mentions_a_fixed_anatomy_is_solved():
    samples = train(20)
    boxes = {c: made_up.place(np.random.default_rng(0), c, 0.0) for c in made_up.ORGANS}
    fixed = [
        dataclasses.replace(
            s,
            entities=tuple(dataclasses.replace(e, box=boxes[e.class_id]) for e in s.entities),
        )
        for s in samples
    ]
    baseline = BlindBaseline.fit(fixed[:15])
    assert mean_score(fixed[15:], baseline.told_mentions) == pytest.approx(1)
    assert mean_score(fixed[15:], baseline.constant) < 1


def test_entities_without_a_class_are_told_apart_by_their_text():
    def sample(k, mention, box):
        entities = (Entity(mention, 0, len(mention), 0, box),)
        return Sample(f"s{k}", f"s{k}", "detect", "en", "", "", mention, entities, "caption")

    left, right = (0.0, 0.0, 0.25, 0.25), (0.5, 0.5, 1.0, 1.0)
    samples = [sample(k, "Nodule", left) for k in range(3)] + [sample(9, "Edema", right)]
    baseline = BlindBaseline.fit(samples)
    assert [(e.mention, e.place) for e in baseline.constants[("detect", "en")]] == [
        ("Nodule", left)
    ]
    assert baseline.told_mentions(samples[-1])[0].place == right


def test_what_training_never_saw_is_counted():
    baseline = BlindBaseline.fit(train(10))
    known = train(1)[0]
    stranger = dataclasses.replace(
        known, language="de", entities=(Entity("pancreas", 0, 8, 7, (0.0, 0.0, 0.5, 0.5)),)
    )
    assert baseline.fallbacks([known]) == {
        "baseline_unseen_tasks": 0, "baseline_unseen_structures": 0,
    }  # fmt: skip
    assert baseline.fallbacks([known, stranger]) == {
        "baseline_unseen_tasks": 1, "baseline_unseen_structures": 1,
    }  # fmt: skip
    assert baseline.constant(stranger) == baseline.constant(known)
    assert baseline.told_mentions(stranger)[0].place == baseline.overall_box


def test_it_survives_json():
    baseline = BlindBaseline.fit(train(20) + train(20, "de"))
    again = BlindBaseline.from_json(json.loads(json.dumps(baseline.to_json())))
    assert again == baseline
    with pytest.raises(ValueError, match="blind baseline"):
        BlindBaseline.from_json({"constants": []})


def test_without_places_there_is_nothing_to_fit():
    bare = dataclasses.replace(train(1)[0], entities=())
    with pytest.raises(UserError, match="blind baseline"):
        BlindBaseline.fit([bare])
