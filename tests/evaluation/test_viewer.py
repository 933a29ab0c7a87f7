"""Pictures inside the page: values come out as they went in, layers lie where they say."""

import base64
import io
import json
import re
import zlib

import made_up
import numpy as np
import pytest
from PIL import Image

from rg_jax.data.images import display_image
from rg_jax.evaluation import gallery, viewer
from rg_jax.evaluation.results import make_result
from rg_jax.grounding.format import OURS


def unpack(values):
    """What the page's script does: values (C, H, W)."""
    plain = np.frombuffer(zlib.decompress(base64.b64decode(values["data"])), np.uint8)
    shape = (values["bytes"], values["channels"], values["height"], values["width"])
    planes = plain.reshape(shape).astype(np.int64)
    folded = planes[0] << 8 | planes[1] if values["bytes"] == 2 else planes[0]
    deltas = (folded >> 1) ^ -(folded & 1)
    codes = np.cumsum(deltas, axis=-1) % (1 << 8 * values["bytes"])
    return values["low"] + values["step"] * codes


def record(image, modality="CT", rescale=(1.0, -1024.0), **more):
    return {"image": image, "modality": modality, "rescale": rescale} | more


@pytest.mark.parametrize("seed", range(4))
def test_values_come_back_exactly(seed):
    rng = np.random.default_rng(seed)
    low, high = [(-32768, 32767), (0, 4095), (-5, 5), (7, 7)][seed]
    image = rng.integers(low, high, (37, 53, 1), endpoint=True).astype(np.int16)
    slope = [1.0, 0.5, -2.0, 1.0][seed]
    values = viewer.encode(record(image, rescale=(slope, -1024.0)))
    assert values["unit"] == "HU" and not values["reduced"]
    assert (unpack(values)[0] == image[..., 0] * slope - 1024.0).all()
    assert values["bytes"] == (1 if high - low < 256 else 2)


def test_colour_stays_and_grey_pictures_hold_one_channel():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    values = viewer.encode(record(colour, "XR", (1.0, 0.0)))
    assert (unpack(values) == np.moveaxis(colour, 2, 0)).all() and values["windows"] == {}
    grey = viewer.encode(record(np.repeat(colour[..., :1], 3, axis=2), "CT", (1.0, 0.0)))
    assert grey["channels"] == 1 and grey["unit"] == ""  # a picture of a CT has no HU
    assert grey["window"] == [255.0, 127.5]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_first_window_shows_what_was_drawn(modality):
    rng = np.random.default_rng(1)
    image = rng.integers(800, 1400, (40, 40, 1)).astype(np.int16)
    given = record(image, modality, (1.0, -1024.0 if modality == "CT" else 0.0))
    values = viewer.encode(given)
    width, level = values["window"]
    shown = np.clip((unpack(values)[0] - level + width / 2) * 255 / width, 0, 255)
    assert np.abs(shown - display_image(given)[..., 0]).max() <= 0.51
    names = {"CT": {"wide", "soft", "brain"}, "MR": set()}[modality]
    assert set(values["windows"]) == names


def test_a_large_picture_is_held_smaller_and_keeps_its_proportions():
    image = np.tile(np.arange(1200, dtype=np.int16)[:, None], (1, 600))[..., None]
    values = viewer.encode(record(image, spacing_mm=(1.0, 2.0)), side=300)
    assert (values["height"], values["width"], values["reduced"]) == (300, 150, True)
    assert values["view"][0] == values["view"][1]  # 1200 rows of 1 mm, 600 columns of 2 mm
    means = image[..., 0].reshape(300, 4, 600).mean((1, 2)) - 1024.0
    assert np.abs(unpack(values)[0] - means[:, None]).max() <= 0.5


def test_the_budget_holds_for_any_gallery_and_what_it_costs_is_told():
    rng = np.random.default_rng(2)
    images = {f"r{k}": rng.integers(0, 4096, (256, 256, 1)).astype(np.int16) for k in range(6)}

    def record_of(name):
        return record(images[name])

    names = [*images, "r0", "r3"]  # two samples on one picture: held once
    whole = viewer.gather(names, record_of)
    assert list(whole.values) == list(images) and whole.reduced == 0 and whole.left_out == ()
    used = sum(len(v["data"]) for v in whole.values.values())
    small = viewer.gather(names, record_of, budget=used // 2)
    assert sum(len(v["data"]) for v in small.values.values()) <= used // 2
    assert small.reduced == 6 and small.left_out == ()
    least = viewer.gather(names, record_of, budget=used // 8)
    assert least.left_out == tuple(list(images)[len(least.values) :]) and least.left_out
    assert sum(len(v["data"]) for v in least.values.values()) <= used // 8


def test_the_gallery_says_what_found_no_room():
    results, pictures = made_up.results(6)
    held = viewer.gather(
        [r.sample.record_id for r in results], made_up.record_of(results, pictures), budget=60_000
    )
    text = gallery.gallery(results, {}, 9, held._replace(reduced=2))
    assert "6 of 9 samples are shown" in text
    assert f"2 of {len(held.values)} pictures are held here at a lower resolution" in text
    assert held.left_out and f"{len(held.left_out)} pictures found no room here" in text
    assert text.count('type="application/json"') == len(held.values)
    for number, values in enumerate(held.values.values()):
        found = re.search(rf'id="px-{number}">(.*?)</script>', text)[1]
        assert json.loads(found) == values


def test_layers_say_whose_they_are_and_lie_where_the_boxes_are():
    results, _ = made_up.results(4)
    result = made_up.with_masks(results[0])
    text = viewer.layers(result, (512, 512))
    boxes = re.findall(
        r'<g class="box (.)" data-class="(\w+)"><rect class="halo" x="([\d.]+)" y="([\d.]+)" '
        r'width="([\d.]+)" height="([\d.]+)"',
        text,
    )
    both = [("r", e) for e in result.sample.entities] + [("p", e) for e in result.entities]
    assert len(boxes) == len(both) == text.count('class="label')
    for (side, name, *numbers), (whose, entity) in zip(boxes, both, strict=True):
        x, y, w, h = (float(number) / 511 for number in numbers)
        assert (side, name) == (whose, viewer.class_key(entity))
        assert (x, y, x + w, y + h) == pytest.approx(entity.box, abs=0.003)
    masks = re.findall(r'class="mask (.)".*?base64,([^"]+)"', text)
    assert [side for side, _ in masks] == [side for side, _ in both]
    for (side, data), mask in zip(masks, (*result.reference_masks, *result.masks), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
        assert ((pixels[..., 3] > 0) == mask).all()
        red, green, _, _ = pixels[mask].astype(int).T
        assert ((green > red) if side == "r" else (red > green)).all()


def test_a_mention_cannot_break_out_of_its_layer():
    sample, _ = made_up.detect_sample(2, "en")
    evil = sample.target.replace(sample.entities[0].mention, '"/></svg><script>x()</script>')
    text = viewer.layers(make_result(sample, evil, OURS), (512, 512))
    assert "<script" not in text and "&lt;" in text
    held = viewer.script_of(0, {"data": "</script><b>"})
    assert held.count("<") == 2 and "\\u003c/script>" in held
