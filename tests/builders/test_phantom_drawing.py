"""The drawn slices: visible truth, repeatable, and not to be guessed."""

import numpy as np
import pytest

from rg_jax.grounding.anatomy import name_of
from rg_jax.grounding.boxes import boxes_of_mask, iou
from tfds_builders.phantom import drawing
from tfds_builders.phantom.drawing import DEFAULT_ORGANS, KINDS, draw_slice, read_slice


def slices(count, split=0, **options):
    return [draw_slice((0, split, i), **options) for i in range(count)]


def test_classes_are_those_of_the_schema():
    for kind in KINDS.values():
        assert name_of(kind.class_id) == kind.name


def test_same_seed_same_slice_other_seed_other_slice():
    first, again, other = draw_slice((3, 0, 5)), draw_slice((3, 0, 5)), draw_slice((3, 0, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.segmentation, again.segmentation)
    assert (first.image != other.image).mean() > 0.5


@pytest.mark.parametrize("modality", drawing.MODALITIES)
@pytest.mark.parametrize("size", [32, 64, 512])
def test_form_of_a_slice(modality, size):
    item = draw_slice((1, 0, 1), size, modality)
    assert item.image.shape == (size, size, 1) and item.image.dtype == np.int16
    assert item.segmentation.shape == (size, size)
    assert item.rescale == ((1.0, -1024.0) if modality == "CT" else (1.0, 0.0))
    assert item.spacing_mm == (400 / size, 400 / size)
    assert item.image.min() >= 0


def test_ct_is_in_hounsfield_units():
    means = {}
    for item in slices(40):
        values = item.image[..., 0] * item.rescale[0] + item.rescale[1]
        assert values[:3, :3].mean() == pytest.approx(-1000, abs=40)  # air
        for kind in KINDS.values():
            inside = values[item.segmentation == kind.class_id]
            if inside.size:
                means.setdefault(kind.name, []).append(np.median(inside))
    assert np.mean(means["liver"]) == pytest.approx(65, abs=15)
    assert np.mean(means["kidney_left"]) == pytest.approx(140, abs=25)
    assert np.mean(means["aorta"]) > 250


@pytest.mark.parametrize("modality", drawing.MODALITIES)
def test_the_reader_finds_what_was_drawn(modality):
    """Sizes are meant before drawing and found by measuring: the margin keeps them equal."""
    for item in slices(150, modality=modality, organs=tuple(KINDS)):
        organs = read_slice(item.segmentation)
        assert {organ.name: organ.size for organ in organs} == item.drawn
        assert {o.class_id: o.box for o in organs} == boxes_of_mask(item.segmentation)
        order = [list(KINDS).index(organ.name) for organ in organs]
        assert order == sorted(order)


def test_every_organ_is_whole():
    """No organ covers another: each class is one piece of about the area of its shape."""
    from scipy.ndimage import label

    for item in slices(60):
        for organ in read_slice(item.segmentation):
            pieces = label(item.segmentation == organ.class_id, np.ones((3, 3)))[1]
            assert pieces == 1, organ
            share = organ.area / item.segmentation.size / drawing.area_threshold(organ.name)
            assert 0.45 < share < 1 / drawing.SIZE_MARGIN or drawing.SIZE_MARGIN < share < 2.0


def test_an_organ_stands_out_from_what_is_around_it():
    """Between its rim and a ring around it lies more than the noise, in both modalities."""
    from scipy.ndimage import binary_dilation, binary_erosion

    for modality in drawing.MODALITIES:
        for item in slices(40, modality=modality):
            values = item.image[..., 0] * item.rescale[0] + item.rescale[1]
            if modality == "CT":
                values = values.clip(-135, 215)  # the soft tissue window
            scale = np.percentile(values, 99) - np.percentile(values, 1)
            for organ in read_slice(item.segmentation):
                inside = item.segmentation == organ.class_id
                near = binary_dilation(inside, iterations=3)
                ring = near & ~binary_dilation(inside, iterations=2) & (item.segmentation == 0)
                rim = inside & ~binary_erosion(inside, iterations=2)
                contrast = abs(np.median(values[rim]) - np.median(values[ring]))
                assert contrast > 0.06 * scale, (modality, organ)


def test_right_kidney_is_left_of_the_spine_in_the_image():
    for item in slices(80):
        for organ in read_slice(item.segmentation):
            middle = (organ.box[0] + organ.box[2]) / 2 / 64
            if organ.name == "kidney_right":
                assert middle < 0.5 and organ.side in ("right", "")
            if organ.name == "kidney_left":
                assert middle > 0.5 and organ.side in ("left", "")


def test_organs_come_and_go_and_swap_sides():
    items = slices(400)
    found = [organ for item in items for organ in read_slice(item.segmentation)]
    for name in DEFAULT_ORGANS:
        share = sum(organ.name == name for organ in found) / len(items)
        assert 0.25 < share < 0.75, (name, share)
        sizes = [organ.size for organ in found if organ.name == name]
        assert 0.25 < sizes.count("large") / len(sizes) < 0.75, name
        if not KINDS[name].side:
            sides = [organ.side for organ in found if organ.name == name and organ.side]
            assert min(sides.count("left"), sides.count("right")) > 0, name


def test_guessing_the_mean_box_scores_low():
    """A blind answer, told which organs are there, with the mean training box of each."""
    boxes = [
        [
            (organ.name, tuple(map(float, organ.box)))
            for item in slices(count, split)
            for organ in read_slice(item.segmentation)
        ]
        for split, count in ((0, 400), (2, 200))
    ]
    overlaps = []
    for name in DEFAULT_ORGANS:
        mean = np.mean([box for organ, box in boxes[0] if organ == name], axis=0).tolist()
        overlaps += [iou(mean, box) for organ, box in boxes[1] if organ == name]
    print(f"blind mean box IoU {np.mean(overlaps):.3f}")
    assert np.mean(overlaps) < 0.36


def test_looks_of_one_class_differ():
    """Shape and level vary: no two outlines and no two levels are alike."""
    livers = []
    for item in slices(40):
        inside = item.segmentation == KINDS["liver"].class_id
        if inside.any():
            livers.append((int(inside.sum()), float(item.image[..., 0][inside].mean())))
    assert len(set(livers)) == len(livers)
    assert np.std([level for _, level in livers]) > 3


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="heart"):
        draw_slice((0, 0, 0), organs=("heart",))
    with pytest.raises(ValueError, match="modality"):
        draw_slice((0, 0, 0), modality="ct")
    with pytest.raises(ValueError, match="below 32"):
        draw_slice((0, 0, 0), 16)
    with pytest.raises(ValueError, match="class 90"):
        read_slice(np.full((4, 4), 90, np.uint8))
