"""Masks in results: read, scored on the paper's and the published scale, written and read back."""

import dataclasses

import numpy as np
import pytest

from rg_jax.data.tasks import Sample
from rg_jax.evaluation.masks import box_of, dice, from_runs, predicted_masks, to_runs
from rg_jax.evaluation.results import make_result, read_results, write_results
from rg_jax.evaluation.score import score_results
from rg_jax.grounding.format import OURS
from rg_jax.grounding.spans import Entity

SIZE = 10


def block(x, y, w, h):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y : y + h, x : x + w] = True
    return mask


LIVER, SPLEEN = block(0, 0, 4, 5), block(5, 5, 4, 4)


def sample(name="s", marks="masks"):
    entities = (
        Entity("liver", 4, 9, 5, (0.0, 0.0, 0.4, 0.5), True),
        Entity("spleen", 15, 21, 1, (0.5, 0.5, 0.9, 0.9), True),
    )
    text = "The liver, the spleen."
    return Sample(
        name, name, "segment", "en", "?", text, text, entities, "caption", "CT", marks=marks
    )


def result(prediction, masks, **changes):
    given = sample(**changes)
    found = np.stack([*masks, *[np.zeros((SIZE, SIZE), bool)] * (3 - len(masks))])
    return make_result(given, prediction, OURS, masks=found, reference_masks=(LIVER, SPLEEN))


BOTH = "The <seg>liver</seg>, the <seg>spleen</seg>."


def test_perfect_masks_score_one_and_give_boxes():
    perfect = result(BOTH, [LIVER, SPLEEN])
    assert perfect.mask_score.g_iou == 1 and perfect.score.g_iou == 1
    assert perfect.entities[0].box == (0.0, 0.0, 0.4, 0.5)


def test_swapped_masks_score_nothing():
    swapped = result(BOTH, [SPLEEN, LIVER])
    assert swapped.mask_score.g_iou == 0


def test_one_half_and_one_missing():
    half = result("The <seg>liver</seg>, the spleen.", [block(0, 0, 2, 5)])
    assert half.mask_score.g_iou == pytest.approx(0.25)
    figures = score_results([half], data="d", split="test", resamples=10)
    assert figures["mask_g_iou"]["mean"] == pytest.approx(0.25)
    assert figures["mask_matched_iou"]["mean"] == pytest.approx(0.5)
    assert figures["mask_dice"]["mean"] == pytest.approx(2 / 3) == dice(0.5)
    # The published scorer divides by the matches only: the missing spleen costs nothing.
    assert figures["mask_g_iou_published_segmentation"]["mean"] == pytest.approx(0.5)
    assert figures["mask_box_g_iou"]["mean"] == pytest.approx(0.25)
    assert figures["by_class"]["liver"]["mask_dice"]["mean"] == pytest.approx(2 / 3)
    assert figures["by_class"]["spleen"]["mask_iou"]["mean"] == 0


def test_masks_of_broken_marks_are_skipped_not_shifted():
    broken = result(
        "The <seg></seg> <seg>liver</seg>, the <seg>spleen</seg>.", [SPLEEN, LIVER, SPLEEN]
    )
    assert broken.mask_score.g_iou == 1 and len(broken.malformed) == 1


def test_more_mentions_than_slots_have_no_mask():
    many = "<seg>liver</seg> <seg>spleen</seg> <seg>liver</seg> <seg>liver</seg>"
    made = result(many, [LIVER, SPLEEN, LIVER])
    assert [mask is None for mask in made.masks] == [False, False, False, True]
    assert predicted_masks(np.zeros((1, 2, 2), bool), (-1, 0, 1))[0] is None
    counts = score_results([made], data="d", split="test", resamples=10)["counts"]
    assert counts["predicted_masks_without_slot"] == 1


def test_entities_that_have_only_a_box_cost_no_mask_score():
    """Findings have boxes and no masks: one that is rightly found so is no surplus mask."""
    box = "<p bbox=<loc0000><loc0000><loc0255><loc0204> id=<seg005>>"
    nodule = "<p bbox=<loc0256><loc0256><loc0300><loc0300>>nodule</p>"
    given = dataclasses.replace(
        sample(marks="both"),
        entities=(
            sample().entities[0],
            Entity("nodule", 15, 21, 0, (0.5, 0.5, 0.6, 0.6), False),
        ),
    )
    found = np.stack([LIVER, SPLEEN])
    for text, expected in (
        (f"{box}<seg>liver</seg></p>, {nodule}", 1.0),
        (f"{box}liver</p>, {nodule}", 0.0),  # a mask that is missing costs
        (f"{box}<seg>liver</seg></p>, <seg>nodule</seg>", 0.5),  # and so does one too many
    ):
        made = make_result(given, text, OURS, masks=found, reference_masks=(LIVER, None))
        assert made.mask_score.g_iou == expected, text


def test_results_with_masks_are_written_and_read_back(tmp_path):
    written = [result(BOTH, [block(0, 0, 2, 5), SPLEEN], name=n) for n in ("a", "b")]
    write_results(tmp_path / "p.jsonl", written)
    for old, new in zip(written, read_results(tmp_path / "p.jsonl"), strict=True):
        assert new.mask_score == old.mask_score and new.entities == old.entities
        for one, other in zip(
            old.masks + old.reference_masks, new.masks + new.reference_masks, strict=True
        ):
            np.testing.assert_array_equal(one, other)
        assert dataclasses.replace(new, masks=(), reference_masks=()) == dataclasses.replace(
            old, masks=(), reference_masks=()
        )


def test_a_sample_without_any_entity_counts_when_it_is_read_back_too(tmp_path):
    """Asked for masks, none to be found and none given: right, and scored as such both times."""
    nothing = dataclasses.replace(sample("c"), entities=(), text="Nothing.", target="Nothing.")
    empty = np.zeros((0, SIZE, SIZE), bool)
    none = make_result(nothing, "Nothing.", OURS, masks=empty, reference_masks=())
    assert none.mask_score is not None
    write_results(tmp_path / "p.jsonl", [none, result(BOTH, [LIVER, SPLEEN])])
    read = read_results(tmp_path / "p.jsonl")
    scores = {r.sample.id: r.mask_score for r in read}
    assert scores["c"] == none.mask_score and scores["s"].g_iou == 1


def test_runs_are_exact_and_checked():
    rng = np.random.default_rng(0)
    for mask in (
        LIVER,
        ~LIVER,
        np.zeros((3, 4), bool),
        np.ones((3, 4), bool),
        rng.random((7, 5)) < 0.5,
    ):
        np.testing.assert_array_equal(from_runs(to_runs(mask)), mask)
    with pytest.raises(ValueError, match="do not fill"):
        from_runs({"size": [2, 2], "runs": [3]})


def test_box_around_a_mask():
    assert box_of(block(2, 3, 4, 1)) == (0.2, 0.3, 0.6, 0.4)
    assert box_of(np.zeros((3, 3), bool)) is None
