"""The grounding format: how one model writes places into text.

Which extra tokens a model has, in which order it writes the four numbers of a box, how many bins
an image side has and whether a box mark must carry a class are properties of the *model*, not of
the code. They are stored beside every checkpoint and never assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

BOX_OPEN = "<p bbox="
BOX_CLOSE = "</p>"
CLASS_ID = "id="
MASK_OPEN = "<seg>"
MASK_CLOSE = "</seg>"

KNOWN_EXTRA_TOKENS = (BOX_OPEN, BOX_CLOSE, CLASS_ID, MASK_OPEN, MASK_CLOSE)
BOX_ORDERS = ("yxyx", "xyxy")
# The PaliGemma tokenizer has <loc0000> … <loc1023>; a finer grid could not be written.
MAX_BINS = 1024


@dataclasses.dataclass(frozen=True)
class GroundingFormat:
    """How a model writes places.

    `extra_tokens`: the tokens added behind `<image>`, in the order of their rows in the table.
    `box_order`: "yxyx" (the paper, and PaliGemma's own pre-training) or "xyxy" (the published
    checkpoints); only writing and reading care, boxes in code are always x first.
    `bins`: number of bins per image side. `id_required`: True if a box mark without ` id=` is
    malformed; False if it stands for an entity outside the class schema.
    Raises ValueError for anything it does not know.
    """

    extra_tokens: tuple[str, ...] = KNOWN_EXTRA_TOKENS
    box_order: str = "yxyx"
    bins: int = 512
    id_required: bool = False

    def __post_init__(self) -> None:
        for token in self.extra_tokens:
            if token not in KNOWN_EXTRA_TOKENS:
                raise ValueError(
                    f"grounding format: unknown extra token {token!r}; "
                    f"known are {', '.join(KNOWN_EXTRA_TOKENS)}"
                )
        if len(set(self.extra_tokens)) != len(self.extra_tokens):
            raise ValueError("grounding format: an extra token is listed twice")
        for first, second in ((BOX_OPEN, BOX_CLOSE), (MASK_OPEN, MASK_CLOSE)):
            if (first in self.extra_tokens) != (second in self.extra_tokens):
                raise ValueError(f"grounding format: {first!r} and {second!r} go together")
        if self.box_order not in BOX_ORDERS:
            raise ValueError(
                f"grounding format: box_order {self.box_order!r} is not one of {BOX_ORDERS}"
            )
        if not 2 <= self.bins <= MAX_BINS:
            raise ValueError(f"grounding format: bins {self.bins} is not in 2..{MAX_BINS}")

    @property
    def has_boxes(self) -> bool:
        """Whether the model has the tokens of a box mark."""
        return BOX_OPEN in self.extra_tokens

    @property
    def has_masks(self) -> bool:
        """Whether the model has the tokens of a mask mark."""
        return MASK_OPEN in self.extra_tokens

    def to_json(self) -> dict[str, Any]:
        """The format as plain JSON values, for `grounding_format.json` beside a checkpoint."""
        return {
            "extra_tokens": list(self.extra_tokens),
            "box_order": self.box_order,
            "bins": self.bins,
            "id_required": self.id_required,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> GroundingFormat:
        """Inverse of `to_json`. Raises ValueError naming a missing, unknown or wrong field."""
        if not isinstance(values, Mapping):
            raise ValueError("grounding format: a JSON object is needed")
        fields = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(fields - set(values)), sorted(set(values) - fields)
        if missing:
            raise ValueError(f"grounding format: missing field(s) {', '.join(missing)}")
        if unknown:
            raise ValueError(f"grounding format: unknown field(s) {', '.join(unknown)}")
        tokens = values["extra_tokens"]
        if not isinstance(tokens, list | tuple) or not all(isinstance(t, str) for t in tokens):
            raise ValueError("grounding format: extra_tokens must be a list of strings")
        order, bins, id_required = (values[k] for k in ("box_order", "bins", "id_required"))
        if not isinstance(order, str):
            raise ValueError(f"grounding format: box_order must be a string, not {order!r}")
        if isinstance(bins, bool) or not isinstance(bins, int):
            raise ValueError(f"grounding format: bins must be a whole number, not {bins!r}")
        if not isinstance(id_required, bool):
            raise ValueError(
                f"grounding format: id_required must be true or false, not {id_required!r}"
            )
        return cls(tuple(tokens), order, bins, id_required)


OURS = GroundingFormat()
PUBLISHED_DETECTION = GroundingFormat(
    (BOX_OPEN, BOX_CLOSE, CLASS_ID), box_order="xyxy", bins=512, id_required=True
)
PUBLISHED_SEGMENTATION = GroundingFormat(
    (MASK_OPEN, MASK_CLOSE), box_order="xyxy", bins=512, id_required=True
)
