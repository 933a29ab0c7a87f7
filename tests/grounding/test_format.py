"""The grounding format as stored beside a checkpoint."""

import json

import pytest

from rg_jax.grounding import format as formats
from rg_jax.grounding.format import GroundingFormat

ALL = (formats.OURS, formats.PUBLISHED_DETECTION, formats.PUBLISHED_SEGMENTATION)


@pytest.mark.parametrize("fmt", ALL)
def test_json_round_trip(fmt):
    assert GroundingFormat.from_json(json.loads(json.dumps(fmt.to_json()))) == fmt


def test_extra_tokens_stand_in_the_order_of_their_rows():
    assert formats.OURS.extra_tokens == ("<p bbox=", "</p>", "id=", "<seg>", "</seg>")
    assert formats.PUBLISHED_DETECTION.extra_tokens == ("<p bbox=", "</p>", "id=")
    assert formats.PUBLISHED_SEGMENTATION.extra_tokens == ("<seg>", "</seg>")
    assert formats.OURS.box_order == "yxyx" and not formats.OURS.id_required
    assert formats.PUBLISHED_DETECTION.box_order == "xyxy"
    assert formats.PUBLISHED_DETECTION.id_required


def test_what_a_format_can_write():
    assert formats.OURS.has_boxes and formats.OURS.has_masks
    assert not formats.PUBLISHED_DETECTION.has_masks
    assert not formats.PUBLISHED_SEGMENTATION.has_boxes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bins": None}, "bins"),
        ({"bins": 1025}, "1025"),
        ({"bins": 1}, "bins"),
        ({"bins": True}, "bins"),
        ({"bins": 512.0}, "bins"),
        ({"box_order": "xywh"}, "xywh"),
        ({"extra_tokens": ["<q>"]}, "<q>"),
        ({"extra_tokens": ["<seg>"]}, "go together"),
        ({"extra_tokens": ["<seg>", "</seg>", "<seg>"]}, "twice"),
        ({"extra_tokens": "<seg>"}, "list of strings"),
        ({"id_required": 1}, "id_required"),
        ({"colour": 3}, "unknown field.* colour"),
    ],
)
def test_wrong_values_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        GroundingFormat.from_json({**formats.OURS.to_json(), **change})


def test_a_missing_field_is_named():
    for name in formats.OURS.to_json():
        values = formats.OURS.to_json()
        del values[name]
        with pytest.raises(ValueError, match=f"missing field.* {name}"):
            GroundingFormat.from_json(values)
