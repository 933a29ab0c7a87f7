"""Boxes: bins and back, overlap, union boxes, the gate."""

import numpy as np
import pytest

from rg_jax.grounding import boxes


def awkward_bin_counts():
    """Bin counts for which floor(i / bins * bins) is not i for some i, in floating point."""
    found = []
    for bins in range(2, 1025):
        index = np.arange(bins)
        if (np.floor(index / bins * bins) != index).any():
            found.append(bins)
    return found


def test_reading_a_bin_and_writing_it_again_is_the_identity():
    counts = awkward_bin_counts()
    assert 49 in counts  # otherwise this test would show nothing
    for bins in [64, 100, 512, 1000, 1024, *counts[::12], 49]:
        for first in range(0, bins, 4):
            written = tuple(min(first + i, bins - 1) for i in range(4))
            box = boxes.from_bins(written, bins)
            assert boxes.to_bins(box, bins) == written
            assert box == pytest.approx([i / bins for i in written], abs=1e-15)


def test_bins_are_floored_and_the_far_border_is_clipped():
    assert boxes.to_bins((0.0, 0.1, 1.0, 0.999), 512) == (0, 51, 511, 511)
    assert boxes.to_bins((-0.2, -1e-9, 1.4, 2.0), 512) == (0, 0, 511, 511)
    assert boxes.from_bins((0, 128, 256, 511), 512) == (0.0, 0.25, 0.5, 511 / 512)


def test_a_bin_outside_the_grid_is_refused():
    for bad in ((0, 0, 512, 3), (-1, 0, 5, 5)):
        with pytest.raises(ValueError, match="not in 0..511"):
            boxes.from_bins(bad, 512)


def test_boxes_of_a_fine_slice_keep_their_precision():
    # One pixel of 512 apart: rounding to 224 first would put both into one bin.
    first = boxes.to_bins(boxes.normalise((100, 0, 200, 512), 512, 512), 512)
    second = boxes.to_bins(boxes.normalise((101, 0, 201, 512), 512, 512), 512)
    assert (first[0], first[2]) == (100, 200) and (second[0], second[2]) == (101, 201)


def test_normalise_takes_x_from_the_width_and_y_from_the_height():
    assert boxes.normalise((10, 10, 50, 50), 100, 200) == (0.1, 0.05, 0.5, 0.25)
    with pytest.raises(ValueError, match="no boxes"):
        boxes.normalise((0, 0, 1, 1), 0, 5)


def test_iou():
    assert boxes.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert boxes.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert boxes.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    assert boxes.iou((0, 0, 0, 1), (0, 0, 0, 1)) == 0.0  # no area
    assert boxes.iou((2, 2, 0, 0), (0, 0, 2, 2)) == 0.0  # swapped


def test_iou_matrix_agrees_with_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.random((7, 4)), rng.random((5, 4))  # swapped ones among them
    table = boxes.iou_matrix(a, b)
    for i in range(7):
        for j in range(5):
            assert table[i, j] == pytest.approx(boxes.iou(a[i], b[j]), abs=1e-12)
    assert boxes.iou_matrix(np.zeros((0, 4)), b).shape == (0, 5)


def test_union_box():
    assert boxes.union_box([(1, 5, 2, 6), (0, 7, 1, 9)]) == (0, 5, 2, 9)
    with pytest.raises(ValueError, match="no boxes"):
        boxes.union_box([])


def test_boxes_of_mask_are_unions_with_exclusive_ends():
    mask = np.zeros((6, 9), np.uint8)
    mask[1, 2] = 5
    mask[4:6, 7:9] = 5
    mask[0, 0] = 121
    assert boxes.boxes_of_mask(mask) == {5: (2, 1, 9, 6), 121: (0, 0, 1, 1)}
    assert boxes.boxes_of_mask(np.zeros((3, 3), np.uint8)) == {}


def test_large_class_ids_do_not_wrap():
    mask = np.zeros((2, 2), np.int64)
    mask[0, 0], mask[1, 1] = 261, 256
    assert set(boxes.boxes_of_mask(mask)) == {256, 261}


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((5, 0, 4, 3), "swapped"),
        ((5, 0, 5, 3), "degenerate"),
        ((-1, 0, 5, 3), "outside"),
        ((0, 0, 11, 3), "outside"),
        ((0, 0, float("nan"), 3), "finite"),
        ((0, 0, 3), "four numbers"),
    ],
)
def test_check_box_refuses(box, words):
    with pytest.raises(ValueError, match=words):
        boxes.check_box(box, 10, 5)


def test_check_box_accepts_the_whole_image():
    boxes.check_box((0, 0, 10, 5), 10, 5)
