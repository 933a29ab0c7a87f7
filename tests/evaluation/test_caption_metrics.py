"""CIDEr, BLEU and ROUGE-L: golden corpora, and what the scores mean."""

import itertools
import json

import numpy as np
import pytest

from rg_jax.evaluation import caption_metrics
from rg_jax.grounding.published import strip_published


def corpora(golden):
    data = json.loads((golden / "text_metrics.json").read_text(encoding="utf-8"))
    pairs = {case["id"]: case for case in data["pairs"]}
    assert data["corpora"], "the golden set holds no corpus"
    for name, corpus in data["corpora"].items():
        chosen = [pairs[i] for i in corpus["ids"]]
        yield name, corpus, [c["cand"] for c in chosen], [c["ref"] for c in chosen]


def check(expected, per_sample, corpus, name):
    """`expected`: a golden entry, a number or a pair of corpus value and list per sample."""
    if isinstance(expected, dict):
        values = expected.get("per_sample")
        if values is not None:
            np.testing.assert_allclose(per_sample, values, rtol=0, atol=1e-9, err_msg=name)
        expected = expected.get("corpus")
    if expected is not None:
        assert corpus == pytest.approx(expected, abs=1e-9), name


def test_golden_text_metrics_cider(golden):
    for name, corpus, candidates, references in corpora(golden):
        if "cider" in corpus:
            values = caption_metrics.cider(candidates, references)
            check(corpus["cider"], values, values.mean(), name)


def test_golden_text_metrics_rouge(golden):
    for name, corpus, candidates, references in corpora(golden):
        if "rougeL" in corpus:
            values = [caption_metrics.rouge_l(*p) for p in zip(candidates, references, strict=True)]
            check(corpus["rougeL"], values, np.mean(values), name)


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_golden_text_metrics_bleu(golden, words):
    for name, corpus, candidates, references in corpora(golden):
        if f"bleu{words}" in corpus:
            pairs = zip(candidates, references, strict=True)
            counts = np.array([caption_metrics.bleu_counts(*pair) for pair in pairs])
            one_by_one = caption_metrics.bleu(counts)[:, words - 1]
            whole = caption_metrics.bleu(counts.sum(0))[words - 1]
            check(corpus[f"bleu{words}"], one_by_one, whole, name)


def test_golden_text_metrics_published_removal_of_marks(golden):
    data = json.loads((golden / "text_metrics.json").read_text(encoding="utf-8"))
    for case in data.get("tag_cleaning", []):
        boxes, masks = case["kind"] == "det", case["kind"] == "seg"
        assert strip_published(case["text"], boxes=boxes, masks=masks) == case["cleaned"], case


# ---------------------------------------------------------------- meaning


def test_the_same_texts_score_full_marks():
    texts = ["the liver is large and dark", "the left kidney is small and bright today"]
    np.testing.assert_allclose(caption_metrics.cider(texts, texts), 10.0)
    counts = sum(caption_metrics.bleu_counts(t, t) for t in texts)
    np.testing.assert_allclose(caption_metrics.bleu(counts), 1.0, atol=1e-8)
    assert caption_metrics.rouge_l(texts[0], texts[0]) == pytest.approx(1.0)


def test_cider_depends_on_the_set_around_it():
    assert caption_metrics.cider(["liver"], ["liver"]) == 0.0
    assert caption_metrics.cider([], []).shape == (0,)
    in_two = caption_metrics.cider(["liver", "x"], ["liver", "spleen"])[0]
    in_three = caption_metrics.cider(["liver", "x", "x"], ["liver", "the liver", "spleen"])[0]
    assert in_two > 0 and in_three > 0
    with pytest.raises(ValueError):
        caption_metrics.cider(["a"], ["a", "b"])


def test_case_and_punctuation_count():
    for a, b in (("Liver", "liver"), ("liver.", "liver")):
        assert caption_metrics.rouge_l(a, b) == 0.0
        assert caption_metrics.bleu_counts(a, b)[0] == 0


def test_short_candidates_pay_for_their_brevity():
    counts = caption_metrics.bleu_counts("the liver", "the liver is large")
    assert caption_metrics.bleu(counts)[0] == pytest.approx(np.exp(1 - 4 / 2))
    assert caption_metrics.bleu(caption_metrics.bleu_counts("", "the liver"))[0] == 0.0


def test_the_longest_common_subsequence_is_the_textbook_one():
    def textbook(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            same = a[i] == b[j]
            table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (list(rng.choice(list("abcde"), size=rng.integers(1, 90))) for _ in range(2))
        assert caption_metrics._longest_common(a, b) == textbook(a, b)
