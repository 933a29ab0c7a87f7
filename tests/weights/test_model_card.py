"""What the card of an exported run says, and of what it was made."""

import json

import pytest

from configs import det, joint, seg
from rg_jax import run as run_lib
from rg_jax.grounding.format import OURS
from rg_jax.model.config import from_variant
from rg_jax.weights.model_card import facts_of_run, model_card
from rg_jax.weights.source import Source

METRICS = {
    "set": {"data": "phantom/64", "split": "test", "step": 5, "n": 40, "total": 79},
    "g_iou": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 40},
}


def card(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    facts = facts_of_run(folder, config, 5)
    source = Source(str(folder), "run", {}, fmt=OURS, facts=facts)
    return model_card(source, from_variant("tiny"), "float32")


def test_a_part_of_a_set_and_the_prompts(tmp_path):
    text = card(tmp_path / "run", det.get_config("demo"))
    assert "a part of the set, 40 of 79 samples" in text
    assert "prompt of `detect` (en): `Caption this image and detect keywords:`" in text
    assert "license: other" in text and "from random weights" in text


@pytest.mark.parametrize(
    "config, boxes, masks, both",
    [(det, True, False, False), (seg, False, True, False), (joint, True, True, True)],
)
def test_only_the_marks_that_were_learnt(tmp_path, config, boxes, masks, both):
    text = card(tmp_path / "run", config.get_config("demo"))
    assert ("<p bbox=<locA>" in text) == boxes
    assert ("the k-th `</seg>` belongs" in text) == masks
    assert ("asked for both" in text) == both
    assert ("of the boxes around its masks" in text) == (masks and not boxes)


def test_the_licence_follows_the_runs_it_began_with(tmp_path):
    """A run that began with a run from random weights derives from nobody's model."""
    first = det.get_config("demo,modality=ct")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text(first.to_json())
    assert run_lib.load_config(tmp_path / "first")
    second = det.get_config("demo,modality=mr")
    second.weights = str(tmp_path / "first")
    text = card(tmp_path / "second", second)
    assert "license: other" in text
    # It learnt from the data of both.
    assert "- before, by the run it began with: phantom/ct64 (train): detect" in text
    assert "- train: phantom/mr64 (train): detect" in text
    first.weights = "paligemma2.npz"
    (tmp_path / "first" / "config.json").write_text(first.to_json())
    text = card(tmp_path / "second", second)
    assert "license: gemma" in text and "Gemma licence applies" in text
