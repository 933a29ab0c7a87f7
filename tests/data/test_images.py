"""Windows, resize and display: against golden numbers, against plain re-computations, at edges."""

import json

import numpy as np
import pytest
from fabricate import make_record
from PIL import Image

from rg_jax.data import images
from rg_jax.data.augment import AugmentConfig, Crop, Draw
from rg_jax.errors import UserError

TOLERANCE = {"float16": 1.1e-3, "float32": 2e-5}


def test_normalization_golden(golden):
    stored = np.load(golden / "normalization.npz")
    cases = json.loads(str(stored["meta_json"]))["cases"]
    assert cases
    for case in cases:
        name, style = case["image"], case["strategy"]
        raw = stored[f"raw/{name}"]
        if raw.ndim == 3:
            got = images.picture_to_input(raw.astype(np.uint8), case["size"], style)
        else:
            got = images.slice_to_input(raw, case["size"], case["modality"], style)
        pairs = [("out", got.transpose(2, 0, 1))]
        if raw.ndim == 2:
            pairs.append(("norm", images.normalise_slice(raw, case["modality"], style)))
        for kind, ours in pairs:
            key = f"{kind}/{name}/{style}"
            if key not in stored:
                assert kind == "norm"
                continue
            dtype = case.get("out_dtype") or stored[key].dtype.name
            expected = stored[key].astype(np.float64)
            difference = np.abs(ours.astype(dtype).astype(np.float64) - expected).max()
            assert ours.shape == expected.shape
            assert difference <= TOLERANCE[dtype], (key, difference)


def test_ct_windows_by_hand():
    raw = np.array([[-3000.0, -1000.0, -135.0, 40.0, 80.0, 3000.0]], np.float32)
    wide, soft, brain = images.normalise_slice(raw, "CT")[:, 0]
    np.testing.assert_allclose(soft, [-1, -1, -1, 0, 80 / 350, 1], atol=1e-6)
    np.testing.assert_allclose(brain, [-1, -1, -1, 0, 1, 1], atol=1e-6)
    # -1000 HU is where CT is clipped, above the lower end of the widest window.
    np.testing.assert_allclose(wide[:2], [-0.8, -0.8], atol=1e-6)


@pytest.mark.parametrize("style", images.STYLES)
@pytest.mark.parametrize("modality", ["CT", "MR", "US", "ct"])
def test_a_constant_slice_is_finite(style, modality):
    out = images.slice_to_input(np.full((9, 7), 5, np.int16), 8, modality, style)
    assert np.isfinite(out).all()
    if style == "min_max":
        assert (out == 0).all()
    elif style in ("medgemma", "percentile") and modality != "CT":
        assert (out == -1).all()


@pytest.mark.parametrize("shape", [(200, 230), (40, 31), (5, 300), (1, 1), (64, 64)])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_gathered_and_whole_resize_agree(shape, modality):
    raw = np.random.default_rng(0).integers(-1100, 2000, shape).astype(np.int16)
    size = 32
    out = images.slice_to_input(raw, size, modality)
    full = images.normalise_slice(raw, modality).astype(np.float64)
    rows, columns = (np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1) for n in shape)
    for channel in range(full.shape[0]):
        lines = np.array([np.interp(columns, np.arange(shape[1]), line) for line in full[channel]])
        expected = np.array([np.interp(rows, np.arange(shape[0]), line) for line in lines.T]).T
        np.testing.assert_allclose(out[..., channel], expected, atol=2e-5)


def test_one_hot_pixel_does_not_darken_an_mr_slice_by_percentiles():
    raw = np.random.default_rng(0).integers(0, 500, (64, 64)).astype(np.int16)
    clean = images.slice_to_input(raw, 64, "MR", "percentile").mean()
    raw[3, 3] = 30000
    assert images.slice_to_input(raw, 64, "MR").mean() < -0.95
    assert abs(images.slice_to_input(raw, 64, "MR", "percentile").mean() - clean) < 0.01


def test_rescale_gives_the_same_as_real_values():
    stored = np.random.default_rng(0).integers(0, 3000, (20, 20)).astype(np.uint16)
    real = stored.astype(np.float32) * 0.5 - 1024
    for style in images.STYLES:
        for modality in ("CT", "MR"):
            a = images.slice_to_input(stored, 16, modality, style, None, (0.5, -1024.0))
            b = images.slice_to_input(real, 16, modality, style)
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_negative_slope_inverts():
    stored = np.arange(100, dtype=np.int16).reshape(10, 10)
    out = images.slice_to_input(stored, 10, "MR", "medgemma", None, (-1.0, 0.0))
    assert out[0, 0, 0] == pytest.approx(1, abs=1e-5)
    assert out[-1, -1, 0] == pytest.approx(-1, abs=1e-5)


def test_pictures_are_resized_first_as_8_bit_rgb():
    record = make_record(0, modality="XR")
    out, crop = images.prepare_image(record, 16)
    resized = np.asarray(Image.fromarray(record["image"]).resize((16, 16), Image.BICUBIC))
    unit = resized / 255
    expected = (unit - unit.min()) / (unit.max() - unit.min()) * 2 - 1
    np.testing.assert_allclose(out, expected, atol=1e-4)
    assert crop.is_full and out.dtype == np.float32
    for dataset, (mean, std) in list(images.DATASET_STATS.items())[2:]:
        got = images.picture_to_input(record["image"], 16, "dataset_stats", None, dataset)
        np.testing.assert_allclose(got, (unit - mean) / std, atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="rec0_0000.*nonsense"):
        images.prepare_image(make_record(0), 16, "nonsense")
    with pytest.raises(UserError, match="rec0_0000.*made_up.*medgemma"):
        images.prepare_image(make_record(0, modality="XR"), 16, "dataset_stats")
    with pytest.raises(UserError, match="bone"):
        images.display_image(make_record(0), "bone")


@pytest.mark.parametrize("modality", ["CT", "MR", "XR"])
def test_augmented_images_stay_in_range_and_follow_their_seed(modality):
    record, config = make_record(3, modality=modality), AugmentConfig(single_window_p=0.5)

    def make(seed):
        rng = np.random.default_rng(seed)
        return images.prepare_image(record, 24, "medgemma", config, rng)

    for seed in range(40):
        out, crop = make(seed)
        again, crop_again = make(seed)
        assert np.array_equal(out, again) and crop == crop_again
        assert out.shape == (24, 24, 3) and out.dtype == np.float32
        assert out.min() >= -1 and out.max() <= 1


def test_the_crop_shows_the_part_it_says():
    record = make_record(0, modality="MR", height=30, width=40)
    crop = Crop(4, 2, 38, 29, 40, 30)
    out, got = images.prepare_image(record, 16, drawn=Draw(crop))
    part = {**record, "image": record["image"][2:29, 4:38]}
    np.testing.assert_array_equal(out, images.prepare_image(part, 16)[0])
    assert got is crop


def test_single_window_and_contrast():
    record = make_record(0)
    crop = Crop.full(48, 40)
    three, _ = images.prepare_image(record, 24)
    for window in range(3):
        one, _ = images.prepare_image(record, 24, drawn=Draw(crop, window=window))
        assert (one == three[..., window, None]).all()
    darker, _ = images.prepare_image(record, 24, drawn=Draw(crop, gamma=1.2))
    brighter, _ = images.prepare_image(record, 24, drawn=Draw(crop, gamma=0.7))
    assert darker[..., 0].mean() < three[..., 0].mean() < brighter[..., 0].mean()
    shifted, _ = images.prepare_image(record, 24, drawn=Draw(crop, shift=20.0))
    inside = np.abs(three[..., 0]) < 0.7
    np.testing.assert_allclose((shifted - three)[..., 0][inside], 2 * 20 / 2250, atol=1e-4)


def test_display_image():
    record = make_record(0)
    record["image"][:2, 0, 0] = (1024 - 135, 1024 + 215)  # -135 and 215 HU: ends of the window
    shown = images.display_image(record)
    assert shown.dtype == np.uint8 and shown.shape == (40, 48, 3)
    assert shown[0, 0, 0] == 0 and shown[1, 0, 0] == 255
    assert (images.display_image(record, "wide") != shown).any()
    mr = images.display_image(make_record(0, modality="MR"))
    assert mr.min() == 0 and mr.max() == 255
    picture = make_record(0, modality="XR")
    shown = images.display_image(picture)
    assert (shown == picture["image"]).all() and not np.shares_memory(shown, picture["image"])


def test_only_the_pixels_that_count_are_normalised(monkeypatch):
    seen = []

    def augment(drawn, low, high):
        def change(values):
            seen.append(values.size)
            return values

        return change

    monkeypatch.setattr(images, "_augment", augment)
    for side, pixels in ((512, 4 * 64 * 64), (40, 40 * 40)):
        for modality, expected in (("CT", [pixels]), ("MR", [2, pixels])):  # MR: also the extremes
            drawn = Draw(Crop.full(side, side), shift=1.0)
            images.slice_to_input(np.zeros((side, side), np.float32), 64, modality, drawn=drawn)
            assert seen == expected
            seen.clear()


def test_a_power_is_looked_up():
    """A pixel value's power is taken once; where nearly every pixel has its own, pixel by pixel."""
    bent = Draw(Crop.full(512, 512), gamma=1.3)
    raw = np.random.default_rng(0).integers(-300, 301, (512, 512)).astype(np.int16)
    many = np.arange(-800, 800, dtype=np.int16).reshape(40, 40)
    for whole, seen in ((raw, 601), (many, 40 * 40)):
        raised = []

        def real(values, raised=raised):
            raised.append(values.size)
            return values.astype(np.float32)

        np.testing.assert_array_equal(images._looked_up(whole, real), whole)
        assert raised == [whole.max() - int(whole.min()) + 1] == [seen]
    found = images.slice_to_input(raw, 64, "CT", drawn=bent)
    wide = images.slice_to_input(raw.astype(np.float32), 64, "CT", drawn=bent)
    np.testing.assert_allclose(found, wide, atol=1e-6)
