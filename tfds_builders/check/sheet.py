"""The contact sheet: some slices of each split and modality with their boxes and masks.

Which ones is decided by a hash of their ids: an even choice, the same on every run.
"""

import colorsys
import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from rg_jax.data.images import display_image
from rg_jax.data.record import Record, text_of
from rg_jax.evaluation.gallery import window_name
from rg_jax.evaluation.overlays import draw
from rg_jax.grounding import anatomy
from rg_jax.grounding.boxes import normalise
from rg_jax.grounding.spans import Entity
from tfds_builders.doubts import personal
from tfds_builders.letters import texts_of

PER_GROUP = 8
MOST = 48
_TINT = 0.28


class Card(NamedTuple):
    """One slice: its picture as PNG, facts, and texts with the entities in them."""

    record_id: str
    split: str
    modality: str
    facts: tuple[str, ...]
    png: bytes
    texts: tuple[tuple[str, str, tuple[Entity, ...]], ...]  # language, text, entities
    hidden: bool  # a text looks as if it named somebody: none is shown


class Sheet:
    """Keeps the `per_group` records with the smallest hash of each split and modality."""

    def __init__(self, per_group: int = PER_GROUP) -> None:
        self.per_group = per_group
        # Negative hashes: the heap's first is then the one to give way.
        self._kept: dict[tuple[str, str], list[tuple[int, str, Card]]] = {}

    def add(self, item: Record, split: str) -> None:
        digest = hashlib.sha256(item["id"].encode()).digest()
        # Slices with boxes come first: there is more to see on them.
        rank = int.from_bytes(digest[:8], "big") + (0 if item["entities"] else 2**64)
        heap = self._kept.setdefault((split, item["modality"]), [])
        if len(heap) < self.per_group:
            heapq.heappush(heap, (-rank, item["id"], make_card(item, split)))
        elif heap and -rank > heap[0][0]:
            heapq.heapreplace(heap, (-rank, item["id"], make_card(item, split)))

    def cards(self) -> list[Card]:
        """At most MOST cards, as many of every split and modality if it has them."""
        ordered = [sorted(heap, reverse=True) for heap in self._kept.values()]
        share = max(1, MOST // len(ordered)) if ordered else 0
        return [card for heap in ordered for _, _, card in heap[:share]]


def make_card(item: Record, split: str) -> Card:
    """Draw a record with one box for each place, named as its first mention does."""
    height, width = item["image"].shape[:2]
    row, column = (float(mm) for mm in item["spacing_mm"])
    languages = list(item["texts"]) or ["en"]
    places: dict[Any, Entity] = {}
    for entity in item["entities"]:
        places.setdefault((entity["class_id"], tuple(entity["box"])), _entity(item, entity))
    mask = item["segmentation"]
    window = window_name(item, "soft")
    png = draw(
        tinted(display_image(item), mask),
        list(places.values()),
        [],
        language=languages[0],
        window=f"{window}; mask tinted" if mask.any() else window,
        spacing_mm=(row, column),
        max_side=768,
        legend=False,
    )
    size = f"{width} x {height} pixels"
    if row and column:
        size += f", {row:.3g} x {column:.3g} mm"
    facts = (split, item["modality"], item["body_part"], size, f"{len(places)} boxes")
    hidden = any(personal(text) for _, text in texts_of(item))
    texts = () if hidden else tuple(_texts(item))
    return Card(item["id"], split, item["modality"], facts, png, texts, hidden)


def _texts(item: Record) -> Iterator[tuple[str, str, tuple[Entity, ...]]]:
    """The captions, or the answers with a box where there are none."""
    for language, texts in item["texts"].items():
        if texts["caption"].strip():
            yield language, texts["caption"], _entities_of(item, language, "caption")
    if not any(texts["caption"].strip() for texts in item["texts"].values()):
        fields = dict.fromkeys(
            (entity["language"], entity["field"])
            for entity in item["entities"]
            if entity["field"] != "caption"
        )
        for language, field in list(fields)[:4]:
            yield language, text_of(item, language, field), _entities_of(item, language, field)


def _entities_of(item: Record, language: str, field: str) -> tuple[Entity, ...]:
    return tuple(
        _entity(item, entity)
        for entity in item["entities"]
        if (entity["language"], entity["field"]) == (language, field)
    )


def _entity(item: Record, entity: dict[str, Any]) -> Entity:
    height, width = item["image"].shape[:2]
    start, end = int(entity["start"]), int(entity["end"])
    mention = text_of(item, entity["language"], entity["field"])[start:end]
    box = normalise(entity["box"], width, height)
    return Entity(mention, start, end, int(entity["class_id"]), box)


def tinted(
    picture: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture with each class of the mask in a colour of its own, see-through."""
    if mask.shape != picture.shape[:2] or not mask.any():
        return picture
    share = np.where(mask > 0, _TINT, 0.0)[..., None]
    mixed = picture * (1 - share) + _palette()[mask] * share
    return np.round(mixed).astype(np.uint8)


def _palette() -> np.ndarray:
    """Colours of the classes, neighbours far apart on the circle of hues."""
    hues = (np.arange(anatomy.NUM_CLASSES + 1) * 0.381966) % 1
    return np.array([colorsys.hsv_to_rgb(hue, 0.75, 1.0) for hue in hues]) * 255


def captioned(cards: Sequence[Card]) -> bool:
    return any(card.texts for card in cards)
