"""Pixels of two bytes, stored as all their low bytes and then all their high ones.

A scanner's noise fills the low bytes, and a slice has few different high ones: kept apart, they are
compressed by a fifth better and read in half the time (`BENCHMARKS.md`).
"""

from typing import Any

import numpy as np
from jaxtyping import Integer
from tensorflow_datasets.core import features
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf


def split(pixels: Integer[np.ndarray, "*shape"]) -> bytes:
    """int16 or uint16 values of any shape → their low bytes, then their high bytes."""
    values = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<"))
    return np.moveaxis(values.view(np.uint8).reshape(*values.shape, 2), -1, 0).tobytes()


def join(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> Integer[np.ndarray, "*shape"]:
    """The values of `split`, read-only. Raises ValueError for another number of bytes."""
    low, high = np.frombuffer(data, np.uint8).reshape(2, *shape)
    values = np.multiply(high, 256, dtype=np.uint16)
    values += low
    values.flags.writeable = False
    return values.view(dtype)


class Planes(features.Tensor):
    """The TFDS feature of such pixels: for whoever reads it an array like any other.

    Its name stands in a data set's `features.json`, so that TFDS finds it where rg_jax is
    installed.
    """

    def encode_example(self, example_data: np.ndarray) -> dict[str, Any]:
        plain = super().encode_example(example_data)  # also looks at dtype and shape
        return plain | {"value": split(example_data)}

    def decode_example_np(self, example_data: dict[str, Any]) -> np.ndarray:
        value, shape = self._get_value_and_shape(example_data)
        return join(value, self._dtype, tuple(map(int, shape)))

    def decode_example(self, tfexample_data: dict[str, Any]) -> Any:
        """The same within TensorFlow's graphs, for who has it."""
        value, shape = self._get_value_and_shape(tfexample_data)
        planes = tf.reshape(tf.io.decode_raw(value, tf.uint8), [2, -1])
        pairs = tf.bitcast(tf.transpose(planes), tf.as_dtype(self._dtype))
        return tf.reshape(pairs, shape)
