"""Overlay pictures: boxes where they belong, labels that can be read."""

import io

import numpy as np
import pytest
from PIL import Image

from rg_jax.evaluation.overlays import GREEN, RED, draw, font, label_of, output_size, place_labels
from rg_jax.grounding import anatomy
from rg_jax.grounding.spans import Entity


def entity(mention: str, box, class_id: int = 0) -> Entity:
    return Entity(mention, 0, len(mention), class_id, box)


def drawn(reference, predicted, size=(64, 64), **more) -> np.ndarray:
    image = np.full((*size, 3), 60, np.uint8)
    png = draw(image, reference, predicted, **more)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def near(pixels: np.ndarray, colour) -> np.ndarray:
    return np.abs(pixels - np.array(colour)).sum(-1) < 12


def test_small_pictures_grow_by_whole_factors_and_large_ones_fit():
    assert output_size(64, 64) == (512, 512)
    assert output_size(224, 112) == (336, 672)
    assert output_size(600, 700) == (700, 600)
    assert output_size(4000, 2000) == (512, 1024)


def test_slices_with_flat_voxels_get_their_true_proportions():
    assert output_size(40, 200, spacing_mm=(5.0, 1.0)) == (600, 600)
    assert output_size(40, 200, spacing_mm=(0.0, 0.0)) == (600, 120)


def test_reference_is_green_and_prediction_red_at_their_edges():
    pixels = drawn(
        [entity("a", (0.125, 0.25, 0.5, 0.5))], [entity("b", (0.625, 0.625, 0.875, 0.875))]
    )
    green, red = near(pixels[:512], GREEN), near(pixels[:512], RED)
    columns = np.nonzero(green[150:240].any(0))[0]
    rows = np.nonzero(green[120:264, 150:240].any(1))[0] + 120  # its label is elsewhere
    assert abs(columns.min() - 64) <= 2 and abs(columns.max() - 256) <= 2
    assert abs(rows.min() - 128) <= 2 and abs(rows.max() - 256) <= 2
    assert green[190, 62:67].any() and red[318:323, 330:440].any()
    # The solid line has no gap, the dashed one has.
    solid = green[126:131, 70:250].any(0)
    dashed = red[317:323, 324:444].any(0)
    assert solid.all() and 0.4 < dashed.mean() < 0.9


def test_lines_are_as_thick_on_a_large_picture_as_it_is_larger():
    box = [entity("a", (0.25, 0.25, 0.75, 0.75))]
    small, large = drawn(box, [], (512, 512)), drawn(box, [], (1024, 1024))
    thickness = [
        near(pixels, GREEN)[side // 2, : side // 2].sum()
        for pixels, side in ((small, 512), (large, 1024))
    ]
    assert thickness == [2, 4]


def test_the_font_has_a_shape_for_every_letter_of_every_class_name():
    letters = set("ÄÖÜäöüßéœ…–")
    for entry in anatomy.CLASSES:
        letters |= set("".join(entry.display.values()))
    missing = bytes(font(20).getmask("\U0010fffd"))
    for letter in sorted(letters - {" "}):
        assert bytes(font(20).getmask(letter)) != missing, letter


def test_labels_name_mention_class_and_iou():
    liver = anatomy.id_of("liver")
    assert label_of(entity("Leber", None, liver), "de") == "Leber"
    assert label_of(entity("Organ", None, liver), "de") == "Organ (Leber)"
    assert label_of(entity("organ", None, liver), "zh") == "organ (liver)"
    assert label_of(entity("nodule", None), "en", 0.714).endswith("IoU 0.71")


@pytest.mark.parametrize("seed", range(6))
def test_labels_stay_inside_and_do_not_hide_each_other_where_there_is_room(seed):
    rng = np.random.default_rng(seed)
    size = (512, 512) if seed % 2 else (512, 300)
    centres, half = rng.uniform(0, 1, (9, 2)), rng.uniform(0.02, 0.2, (9, 2))
    rects = np.clip(np.concatenate([centres - half, centres + half], 1), 0, 1)
    rects = [tuple(r) for r in (rects * [*size, *size]).tolist()]
    texts = ["liver", "left kidney (linke Niere)  IoU 0.77", "x" * 200] * 3
    texts[2] = texts[5] = "aorta"
    _, places, fitted = place_labels(texts, rects, [k % 2 == 0 for k in range(9)], size)
    for x0, y0, x1, y1 in places:
        assert x0 >= 0 and y0 >= 0 and x1 <= size[0] and y1 <= size[1]
    for i, a in enumerate(places):
        for b in places[:i]:
            wide = min(a[2], b[2]) - max(a[0], b[0])
            tall = min(a[3], b[3]) - max(a[1], b[1])
            assert wide <= 0 or tall <= 0, (a, b)
    assert fitted[0] == "liver" and fitted[8].endswith("…")


def test_boxes_over_the_border_and_without_extent_are_drawn():
    pixels = drawn([entity("a", (-0.5, 0.5, 0.5, 1.5))], [entity("b", (0.5, 0.5, 0.5, 0.5))])
    assert near(pixels, GREEN).any()
    drawn([entity("no place", None)], [])
    drawn([], [])


def test_the_strip_names_the_window():
    with_name, without = drawn([], [], window="CT, Größe 350/40 HU"), drawn([], [])
    assert with_name.shape == without.shape
    assert (with_name[512:] != without[512:]).any()
    assert (with_name[:512] == without[:512]).all()


def test_the_same_input_gives_the_same_bytes():
    image = np.arange(48 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 40, 3)
    boxes = [entity("Milz", (0.1, 0.1, 0.4, 0.4), 1)]
    assert draw(image, boxes, boxes) == draw(image, boxes, boxes)


def test_masks_are_tinted_where_they_lie():
    """Reference green, prediction red, on a picture that is not square."""
    image = np.full((20, 40, 3), 60, np.uint8)
    left, right = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    left[2:8, 1:4] = True  # upper rows, left columns
    right[2:8, 6:9] = True
    plain = np.asarray(Image.open(io.BytesIO(draw(image, [], []))).convert("RGB")).astype(int)
    png = draw(image, [], [], reference_masks=[left, None], predicted_masks=[right])
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    height = round(shown.shape[1] / 2)  # without the strip below
    changed = (shown - plain)[:height]
    y, x = height // 2, shown.shape[1]
    assert changed[y, round(0.25 * x)].argmax() == 1 and changed[y, round(0.25 * x), 1] > 20
    assert changed[y, round(0.75 * x)].argmax() == 0 and changed[y, round(0.75 * x), 0] > 20
    assert not changed[y, round(0.5 * x)].any() and not changed[round(0.1 * height)].any()
