"""Recall at k with equal captions, against what is counted by hand."""

import numpy as np

from rg_jax.evaluation.retrieval import retrieval_metrics

# Row i of the images looks along axis `AXIS[i]`, its caption along axis `SAID[i]`.
AXIS = [0, 1, 2, 3, 0, 1]
SAID = [0, 1, 3, 2, 0, 1]
CAPTIONS = ["liver", "spleen", "aorta", "aorta", "Leber", "Milz"]
LANGUAGES = ["en", "en", "en", "en", "de", "de"]


def test_counted_by_hand():
    found = retrieval_metrics(np.eye(4)[AXIS], np.eye(4)[SAID], CAPTIONS, LANGUAGES, 200)
    # Rows 2 and 3 find each other's caption, which reads the same: hits. German is searched apart.
    assert found["image_to_text_recall@1"]["mean"] == 1
    assert found["chance"]["n"] == 6
    np.testing.assert_allclose(
        found["chance"]["mean"], np.mean([1 / 4, 1 / 4, 2 / 4, 2 / 4, 1 / 2, 1 / 2])
    )
    assert found["by_language"]["de"]["chance"]["n"] == 2
    named = ["liver", "spleen", "aorta", "heart", "Leber", "Milz"]
    found = retrieval_metrics(np.eye(4)[AXIS], np.eye(4)[SAID], named, LANGUAGES, 200)
    assert found["image_to_text_recall@1"]["mean"] == 4 / 6
    assert found["text_to_image_recall@1"]["mean"] == 4 / 6
    assert found["by_language"]["en"]["image_to_text_recall@1"]["mean"] == 2 / 4
    assert found["image_to_text_recall@5"]["mean"] == 1
    low, high = (found["image_to_text_recall@1"][k] for k in ("low", "high"))
    assert low < 4 / 6 < high


def test_both_ways_are_told_apart():
    # Both images look the same way; one of the captions fits both best.
    images = np.array([[1.0, 0.0], [0.9, 0.1]])
    texts = np.array([[1.0, 0.0], [0.5, 0.0]])
    found = retrieval_metrics(images, texts, ["a", "b"], ["en", "en"], 50)
    assert found["image_to_text_recall@1"]["mean"] == 0.5
    assert found["text_to_image_recall@1"]["mean"] == 0.5
    assert found["by_language"]["en"]["image_to_text_recall@5"]["mean"] == 1


def test_many_rows_are_compared_in_parts(monkeypatch):
    from rg_jax.evaluation import retrieval

    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 50, 8))
    captions = [f"caption {i % 20}" for i in range(50)]
    whole = retrieval_metrics(images, texts, captions, ["en"] * 50, 50)
    monkeypatch.setattr(retrieval, "_ROWS", 7)
    assert retrieval_metrics(images, texts, captions, ["en"] * 50, 50) == whole
    assert 0 < whole["image_to_text_recall@5"]["mean"] < 1
