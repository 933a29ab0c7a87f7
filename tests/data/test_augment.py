"""Crops: boxes and masks follow the image."""

import numpy as np
import pytest

from rg_jax.data.augment import AugmentConfig, Crop, Draw, draw


def test_full_crop_changes_no_box():
    crop = Crop.full(37, 23)
    box = (3.0, 4.0, 11.0, 23.0)
    assert crop.is_full and crop.place(box) == (3 / 37, 4 / 23, 11 / 37, 23 / 23)
    assert crop.place((0.0, 0.0, 37.0, 23.0)) == (0, 0, 1, 1)


def test_place_clips_and_drops():
    crop = Crop(10, 20, 30, 60, 100, 80)
    assert crop.place((0, 0, 100, 80)) == (0, 0, 1, 1)
    assert crop.place((15, 30, 20, 50)) == (0.25, 0.25, 0.5, 0.75)
    assert crop.place((0, 0, 10, 80)) is None  # touches the crop from outside
    assert crop.place((0, 0, 10.9, 21)) is None  # 0.9 px² remain
    assert crop.place((0, 0, 11, 21)) is not None  # 1 px²
    assert crop.place((40, 0, 50, 80)) is None
    assert crop.map_box((0.15, 0.375, 0.2, 0.625)) == pytest.approx((0.25, 0.25, 0.5, 0.75))


def test_masks_are_cut_like_the_image():
    segmentation = np.arange(48, dtype=np.uint8).reshape(6, 8)
    crop = Crop(2, 1, 7, 5, 8, 6)
    assert (crop.masks(segmentation) == segmentation[1:5, 2:7]).all()
    assert crop.masks(np.zeros((0, 0), np.uint8)).shape == (0, 0)


def test_a_crop_lies_inside_and_keeps_its_share():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        width, height = (int(v) for v in rng.integers(1, 400, 2))
        crop = draw(AugmentConfig(), width, height, rng).crop
        assert 0 <= crop.x_min < crop.x_max <= width and 0 <= crop.y_min < crop.y_max <= height
        assert crop.x_max - crop.x_min >= 0.9 * width - 0.5
        assert crop.y_max - crop.y_min >= 0.9 * height - 0.5
        # A box over everything is never lost.
        assert crop.place((0, 0, width, height)) == (0, 0, 1, 1)


def test_how_often_and_how_far():
    config = AugmentConfig()
    rng = np.random.default_rng(0)
    draws = [draw(config, 100, 100, rng) for _ in range(4000)]
    for share, p in (
        (np.mean([d.gamma != 1 for d in draws]), 0.3),
        (np.mean([d.shift != 0 for d in draws]), 0.5),
        (np.mean([d.window >= 0 for d in draws]), 0.2),
    ):
        assert abs(share - p) < 0.03
    gammas = [d.gamma for d in draws if d.gamma != 1]
    assert 0.7 <= min(gammas) < 0.75 and 1.15 < max(gammas) <= 1.2
    assert 19 < max(d.shift for d in draws) <= 20 and -20 <= min(d.shift for d in draws) < -19
    assert 0.09 < max(d.picture_shift for d in draws) <= 0.1
    assert {d.window for d in draws} == {-1, 0, 1, 2}
    corners = [(d.crop.x_min == 0, d.crop.x_max == 100) for d in draws]
    assert len(set(corners)) == 4  # at either edge, at both, at none


def test_nothing_is_drawn_without_config_or_generator():
    still = Draw(Crop.full(5, 4))
    assert draw(None, 5, 4, np.random.default_rng(0)) == still
    assert draw(AugmentConfig(), 5, 4, None) == still
