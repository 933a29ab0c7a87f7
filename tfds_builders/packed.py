"""Examples that a worker process has made ready to be written.

TFDS would check and lay out every array in the writing process, one record after the other; a
worker does it here, and TFDS is given the bytes. The files compress what they hold themselves.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

from rg_jax.data import planes, record

TENSORS = ("image", "segmentation")
LEVEL = 1  # of what `record.features` says is zlib


@dataclasses.dataclass(frozen=True)
class Packed:
    """A record's id and its example; in it, tensors are dicts of "value" (bytes) and "shape"."""

    id: str
    example: dict[str, Any]


def pack(item: record.Record) -> Packed:
    """Checks a record with `record.encode` and lays out its pixels. Raises UserError."""
    example = record.encode(item)
    image, segmentation = (np.ascontiguousarray(example[name]) for name in TENSORS)
    values = (
        image.tobytes() if image.itemsize == 1 else planes.split(image),
        zlib.compress(segmentation.tobytes(), LEVEL),
    )
    for name, value in zip(TENSORS, values, strict=True):
        example[name] = {"value": value, "shape": example[name].shape}
    return Packed(item["id"], example)


def accept_packed(features: Any) -> Any:
    """TFDS features that take a packed tensor for what it is; returns them.

    An attribute of the object rather than a class of ours: its class is written beside the data,
    and whoever reads that needs no rg_jax.
    """
    for name in TENSORS:
        feature = features[name]
        feature.encode_example = _Encode(feature.encode_example)
    return features


class _Encode:
    """What the feature does for an array; nothing for a tensor that is packed already."""

    def __init__(self, encode: Any):
        self.encode = encode

    def __call__(self, value: Any) -> Any:
        return value if isinstance(value, dict) else self.encode(value)
