"""Masks of a batch: each lies at the `</seg>` of its own span, whatever the order of entities."""

import dataclasses

import numpy as np
import pytest
from fabricate import make_record

from rg_jax.data.augment import AugmentConfig, Crop, draw
from rg_jax.data.images import prepare_image, resize_classes
from rg_jax.data.masks import MaskSlots, class_map, classes_in, mask_close_id
from rg_jax.data.mixture import DataConfig
from rg_jax.data.packing import Packer, pack
from rg_jax.data.pipeline import eval_batches, eval_samples, train_iterator
from rg_jax.data.tasks import COUNTER_NAMES, make_sample
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.evaluation.masks import box_of
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION
from rg_jax.grounding.spans import parse

CONFIG = DataConfig(image_size=16, text_len=160, grounded_first=False, mask_slots=6, mask_size=20)


def caption_record(names, sizes=(3, 6, 9)):
    """A caption that names three organs in this order; every organ has a mask of its own area."""
    record = make_record(0, words=0)
    record["segmentation"] = np.zeros((40, 48), np.uint8)
    ids = {"liver": 5, "spleen": 1, "right kidney": 2}
    caption = "The " + ", the ".join(names) + "."
    record["texts"] = {
        "en": {"caption": caption, "clinical_information": "", "clinical_question": ""}
    }
    record["entities"], record["qa"] = [], []
    # Listed by falling length of the mention, as the published code orders masks.
    for name in sorted(names, key=len, reverse=True):
        x, size = 14 * list(ids).index(name), sizes[list(ids).index(name)]
        record["segmentation"][5 : 5 + size, x : x + size] = ids[name]
        record["entities"].append(
            {
                "language": "en",
                "field": "caption",
                "start": caption.index(name),
                "end": caption.index(name) + len(name),
                "class_id": ids[name],
                "box": (float(x), 5.0, float(x + size), 5.0 + size),
            }
        )
    return record


def one_batch(record, tokenizer, task="segment", config=CONFIG, crop=None):
    present = classes_in(record, crop)
    sample = make_sample(record, task, "en", None, OURS, crop, present=present)
    row = Packer(tokenizer, OURS, config.text_len).row(sample)
    batch = pack([row], config.text_len, tokenizer.pad_id)
    batch["counts"] = np.array([row.counts], np.int32)
    slots = MaskSlots(config.mask_slots, config.mask_size, tokenizer)
    return sample, batch | slots.fill([row], [class_map(record, config.mask_size, crop)], batch)


@pytest.mark.parametrize("task", ["segment", "joint"])
@pytest.mark.parametrize(
    "names",
    [
        ("liver", "spleen", "right kidney"),
        ("right kidney", "spleen", "liver"),
        ("spleen", "right kidney", "liver"),
    ],
)
def test_a_mask_lies_at_the_end_of_its_own_span(tokenizer, names, task):
    """Fails if masks are kept in any other order than their spans: of length, of class, of area."""
    record = caption_record(names)
    sample, batch = one_batch(record, tokenizer, task)
    assert [e.mention for e in sample.entities] == list(names)
    ids = {"liver": 5, "spleen": 1, "right kidney": 2}
    whole = resize_classes(record["segmentation"], CONFIG.mask_size)
    assert batch["mask_valid"][0].tolist() == [True] * 3 + [False] * 3
    for k, name in enumerate(names):
        np.testing.assert_array_equal(batch["masks"][0, k], whole == ids[name])
        # The text up to this place reads: … the k-th mention, closed.
        upto = tokenizer.decode(batch["text"][0, : batch["mask_at"][0, k] + 1])
        assert upto.endswith(f"{name}</seg>") and upto.count("</seg>") == k + 1
    assert not batch["masks"][0, 3:].any()


def test_targets_of_the_three_forms(tokenizer):
    record = caption_record(("spleen", "liver"))
    targets = {
        task: make_sample(record, task, "en", None, OURS).target
        for task in ("detect", "segment", "joint")
    }
    assert targets["segment"] == "The <seg>spleen</seg>, the <seg>liver</seg>."
    assert targets["joint"].replace("<seg>", "").replace("</seg>", "") == targets["detect"]
    read = parse(targets["joint"], OURS)
    assert [e.mask and e.box is not None for e in read.entities] == [True, True]
    assert read.mask_indices == (0, 1) and not read.malformed
    prompts = {t: make_sample(record, t, "en", None, OURS).prefix for t in targets}
    assert len(set(prompts.values())) == 3


def test_masks_follow_a_crop(tokenizer):
    record = caption_record(("liver", "spleen", "right kidney"))
    crop = Crop(10, 2, 28, 20, 48, 40)  # only the spleen is inside
    sample, batch = one_batch(record, tokenizer, "segment", crop=crop)
    assert sample.target == "The liver, the <seg>spleen</seg>, the right kidney."
    part = record["segmentation"][2:20, 10:28]
    np.testing.assert_array_equal(batch["masks"][0, 0], resize_classes(part, 20) == 1)
    assert sample.counts == {"entities_dropped_by_crop": 2}


@pytest.mark.parametrize("shape", [(120, 70), (60, 150), (90, 90)])
@pytest.mark.parametrize("picture", [False, True])
def test_image_mask_and_box_show_the_same_place(shape, picture):
    """What is bright in the image is inside the mask and the box, in every crop of every form."""
    height, width = shape
    segmentation = np.zeros(shape, np.uint8)
    # In one corner and longer than wide: mirrored, turned or shifted it would be elsewhere.
    box = (round(0.12 * width), round(0.2 * height), round(0.42 * width), round(0.8 * height))
    segmentation[box[1] : box[3], box[0] : box[2]] = 5
    segmentation[box[1] : (box[1] + box[3]) // 2, box[0] : (box[0] + box[2]) // 2] = 0
    record = make_record(0, words=0)
    record["segmentation"], record["modality"] = segmentation, "MR"
    grey = np.where(segmentation == 5, 200, 20)[..., None]
    record["image"] = grey.repeat(3, 2).astype(np.uint8) if picture else grey.astype(np.int16)
    record["rescale"] = (1.0, 0.0)
    size, rng, shown = 96, np.random.default_rng(0), set()
    for _ in range(20):
        drawn = draw(AugmentConfig(crop_min=0.5), width, height, rng)
        image, crop = prepare_image(record, size, drawn=drawn)
        bright = image[..., 0] > (image.min() + image.max()) / 2
        mask = class_map(record, size, crop) == 5
        if mask.sum() < 500:
            continue
        assert (bright & mask).sum() / (bright | mask).sum() > 0.9
        inside = crop.x_min <= box[0] and crop.y_min <= box[1]
        if inside and box[2] <= crop.x_max and box[3] <= crop.y_max:
            np.testing.assert_allclose(box_of(mask), crop.place(box), atol=1.5 / size)
        shown.add((crop.x_min, crop.y_min))
    assert len(shown) > 5


def test_what_has_no_mask_keeps_its_box_and_is_counted(tokenizer):
    record = caption_record(("liver", "spleen"))
    record["segmentation"][record["segmentation"] == 5] = 0
    record["entities"].append({**record["entities"][0], "class_id": 0})
    record["entities"][-1] |= {"start": 0, "end": 3}
    segment, _ = one_batch(record, tokenizer, "segment")
    assert segment.target == "The liver, the <seg>spleen</seg>."
    assert segment.counts == {"entities_without_mask": 1, "entities_without_class": 1}
    joint, batch = one_batch(record, tokenizer, "joint")
    assert [e.mask for e in joint.entities] == [False, False, True]
    assert joint.target.count("<p bbox") == 3 and joint.target.count("<seg>") == 1
    assert batch["mask_valid"][0].sum() == 1
    record["segmentation"][:] = 0
    none, batch = one_batch(record, tokenizer, "segment")
    assert none.task == "report" and not batch["mask_valid"].any()


def test_more_masks_than_slots_and_masks_of_no_pixel_are_counted(tokenizer):
    record = caption_record(("liver", "spleen", "right kidney"), sizes=(1, 8, 9))
    config = dataclasses.replace(CONFIG, mask_slots=2, mask_size=9)
    _, batch = one_batch(record, tokenizer, "segment", config)
    assert batch["mask_valid"][0].tolist() == [False, True]
    counts = dict(zip(COUNTER_NAMES, batch["counts"][0].tolist(), strict=True))
    assert counts["masks_without_slot"] == 1 and counts["masks_without_pixel"] == 1


def test_a_cut_target_keeps_masks_and_spans_together(tokenizer):
    record = caption_record(("liver", "spleen", "right kidney"))
    length = 0
    for text_len in range(60, 20, -1):
        config = dataclasses.replace(CONFIG, text_len=text_len)
        sample, batch = one_batch(record, tokenizer, "joint", config)
        closing = (batch["text"][0] == mask_close_id(tokenizer)).sum()
        assert batch["mask_valid"][0].sum() == closing
        length += closing < 3
    assert length > 5  # it was really cut


def test_training_batches_hold_what_evaluation_holds(train, tokenizer):
    sources = [{"source": train, "tasks": {"segment": 1.0, "segment_vqa": 1.0, "report": 0.5}}]
    iterator = train_iterator(sources, tokenizer, OURS, CONFIG, 8, 0)
    batch = next(iterator)
    iterator.close()
    assert batch["masks"].shape == (8, 6, 20, 20) and batch["masks"].dtype == np.uint8
    closing = (batch["text"] == mask_close_id(tokenizer)) & (batch["mask_loss"] > 0)
    for i in range(8):
        places = np.flatnonzero(closing[i])[:6]
        np.testing.assert_array_equal(batch["mask_at"][i, : len(places)], places)
    samples = eval_samples(train, ["segment"], ["en"], OURS, CONFIG, limit=4)
    (evaluated,) = eval_batches(samples, train, tokenizer, CONFIG, 4, OURS, targets=True)
    for i, sample in enumerate(samples):
        record = train[train.row_of(sample.record_id)]
        whole = resize_classes(record["segmentation"], 20)
        for k, entity in enumerate(sample.entities[:6]):
            np.testing.assert_array_equal(evaluated["masks"][i, k], whole == entity.class_id)


def test_nearest_pixels_of_a_class_map():
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(resize_classes(classes, 3)[:, 1], [2, 6, 10])
    np.testing.assert_array_equal(resize_classes(np.eye(4, dtype=np.uint8), 4), np.eye(4))
    doubled = resize_classes(np.eye(4, dtype=np.uint8), 8)
    np.testing.assert_array_equal(doubled, np.kron(np.eye(4), np.ones((2, 2))))


def test_masks_without_a_decoder_or_a_token_are_refused(train, tokenizer, tmp_path):
    sources = [{"source": train, "tasks": {"segment": 1.0}}]
    bare = dataclasses.replace(CONFIG, mask_slots=0)
    with pytest.raises(UserError, match="'segment' needs a model with a mask decoder"):
        train_iterator(sources, tokenizer, OURS, bare, 8, 0)
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    boxes = Tokenizer.load(tmp_path / "t.model", PUBLISHED_DETECTION.extra_tokens)
    with pytest.raises(UserError, match="</seg>"):
        mask_close_id(boxes)


def test_tasks_that_ask_alike_and_want_other_marks_are_refused(train, tokenizer):
    sources = [{"source": train, "tasks": {"detect_vqa": 0.5, "segment_vqa": 0.5}}]
    with pytest.raises(UserError, match="detect_vqa and segment_vqa ask in the same words"):
        train_iterator(sources, tokenizer, OURS, CONFIG, 8, 0)
