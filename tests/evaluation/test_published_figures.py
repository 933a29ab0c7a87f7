"""Benchmarks by name, and when a published figure may stand beside ours."""

import pytest

from rg_jax import recipes
from rg_jax.errors import UserError
from rg_jax.evaluation import benchmarks
from rg_jax.evaluation.published_figures import FIGURES, NAMES, comparable, summary
from rg_jax.grounding.prompts import prefix

FIGURE = {"mean": 0.8, "low": 0.7, "high": 0.9, "n": 303}


def metrics(benchmark="vqa_rad_published", n=735, **more):
    protocol = benchmarks.get(benchmark)
    about = {
        "data": f"{protocol.data}/{protocol.config}",
        "split": protocol.split,
        "n": n,
        "definition": "paper",
        "embedder": "exact",
        "benchmark": protocol.describe(),
    }
    return {"set": {**about, **more}, "text_f1_questions": FIGURE, "text_f1_open": FIGURE}


def row(found, metric="text_f1_questions", source="paper"):
    return next(r for r in found if (r["metric"], r["source"]) == (metric, source))


def test_figures_are_on_our_scale():
    for figure in FIGURES:
        assert 0 <= figure.value <= (10 if "cider" in figure.metric else 1), figure
        assert figure.metric in NAMES
    known = {(f.data, f.metric, f.model): f.value for f in FIGURES}
    ours = "all + detection, frozen adapted SigLIP"
    assert known["slake", "text_f1_open", ours] == 0.877
    assert known["refrad2d", "g_iou", ours] == 0.436
    # The paper's "open F1" of VQA-RAD is over all questions; open ones alone score 28.1.
    assert known["vqa_rad", "text_f1_questions", ours] == 0.507
    assert known["vqa_rad", "text_f1_open", "released detection checkpoint"] == 0.281
    assert known["slake", "llm_score_open", "released detection checkpoint"] == 0.88


def test_the_whole_set_by_the_published_protocol_is_comparable():
    found = row(comparable(metrics()))
    assert found["comparable"] and found["ours"] == FIGURE and found["theirs"] == 0.507
    assert "chose the checkpoint" in found["why"]
    assert row(comparable(metrics("vqa_rad")))["comparable"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (metrics(n=40), "40 of 735"),
        (
            metrics() | {"set": {**metrics()["set"], "benchmark": None}},
            "run --benchmark=vqa_rad_published",
        ),
        (metrics(split="val"), "test_fixed_split.json"),
        (metrics("slake", n=1061), "validate.json"),
    ],
)
def test_what_is_not_comparable_says_why(given, why):
    found = comparable(given)
    measured = [r for r in found if r["ours"]]
    assert measured and not any(r["comparable"] for r in found)
    assert all(why in r["why"] for r in measured)
    assert {r["why"] for r in found if not r["ours"]} == {"not measured here"}
    assert why in summary({"published": found})


def test_other_data_has_no_published_figures():
    assert comparable({"set": {**metrics()["set"], "data": "phantom/64"}, "g_iou": FIGURE}) == []
    refrad = {"set": {**metrics()["set"], "data": "refrad2d"}, "g_iou": FIGURE}
    assert "embeddinggemma" in row(comparable(refrad), "g_iou")["why"]


def test_the_terminal_shows_both_figures():
    text = summary({"published": comparable(metrics())})
    assert "80.0 [70.0, 90.0]" in text and "50.7" in text and "n=303" in text


# ---------------------------------------------------------------- protocols


def test_protocols_name_file_questions_and_prompt():
    assert benchmarks.get("slake_published").file == "validate.json"
    assert benchmarks.get("slake").file == "test.json"
    for name in ("vqa_rad", "vqa_rad_published"):
        protocol = benchmarks.get(name)
        assert (protocol.file, protocol.questions, protocol.closed) == (
            "test_fixed_split.json", 735, 432,
        )  # fmt: skip
    for protocol in benchmarks.BENCHMARKS.values():
        assert protocol.languages == ("en",)
        put = prefix(protocol.task, "en", question="Is it large?")
        assert put == "\nIs it large?\nAnswer: ", protocol.name
    with pytest.raises(UserError, match="slake_published"):
        benchmarks.get("slake_publshed")


def mixture(split, name="slake", config=""):
    return {"train": [], "val": [recipes.source(name, split, {"slake": 1.0}, config=config)]}


def check(protocol, mixtures, contents=lambda part: None):
    return benchmarks.check_honest(benchmarks.get(protocol), mixtures, contents)


@pytest.mark.parametrize(
    ("split", "config", "seen"),
    [
        ("test", "", True),
        ("test[:50%]", "official-en", True),
        ("train+test", "official-en", True),
        ("all", "official-en", True),
        ("val", "official-en", False),
    ],
)
def test_splits_of_one_variant_are_told_apart_by_name(split, config, seen):
    if seen:
        with pytest.raises(UserError, match="the same split.*would not be honest"):
            check("slake", mixture(split, config=config))
    else:
        assert check("slake", mixture(split, config=config)) == {}
    assert check("slake", mixture(split, name="vqa_rad", config=config)) == {}


@pytest.mark.parametrize("config", ["image-en", "official-en_zh", "official-leaks_allow"])
def test_other_variants_are_compared_by_what_they_ask(config):
    asked = {"official-en": frozenset({1, 2, 3}), config: frozenset({3, 4})}
    seen = mixture("train", config=config)
    with pytest.raises(UserError, match="1 of 3 questions and captions are the same"):
        check("slake", seen, lambda part: asked[part["config"]])
    asked[config] = frozenset({4})
    assert check("slake", seen, lambda part: asked[part["config"]]) == {}
    # What cannot be looked at may hold anything.
    with pytest.raises(UserError, match="not there to be compared"):
        check("slake", seen)


def test_the_published_protocol_says_so_but_refuses_nothing():
    assert list(check("slake_published", mixture("val"))) == ["val"]
