"""Pixels stored as their low bytes and then their high ones."""

import numpy as np
import pytest
from array_record.python import array_record_module
from fabricate import make_record, write_dataset

from rg_jax.data import planes, record
from rg_jax.data.sources import open_source


@pytest.mark.parametrize("dtype", ["int16", "uint16"])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5, 1), (2, 0, 1)])
def test_every_value_comes_back(dtype, shape):
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    values = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    values.flat[:2] = limits.min, limits.max
    back = planes.join(planes.split(values), np.dtype(dtype), shape)
    assert back.dtype == dtype and back.shape == shape
    np.testing.assert_array_equal(back, values)


def test_the_low_bytes_come_first_whatever_the_memory_looks_like():
    values = np.array([[0x0102, 0x0304], [-2, 0x0708]], np.int16)
    stored = bytes([2, 4, 0xFE, 8, 1, 3, 0xFF, 7])
    assert planes.split(values) == stored
    assert planes.split(values.astype(">i2")) == stored
    assert planes.split(np.asfortranarray(values)) == stored


def test_another_number_of_bytes_is_refused_and_pixels_are_read_only():
    with pytest.raises(ValueError):
        planes.join(bytes(10), np.dtype(np.int16), (2, 3))
    with pytest.raises(ValueError, match="read-only"):
        planes.join(bytes(12), np.dtype(np.int16), (2, 3))[0] = 1


def a_set(tmp_path):
    rows = [make_record(i) for i in range(4)]
    write_dataset(tmp_path, {"train": rows})
    return {row["id"]: row["image"] for row in rows}


def plain(**options):
    import tensorflow_datasets as tfds

    return tfds.features.Tensor(**options)


def by_zlib(**options):
    return plain(**options | {"encoding": "zlib"})


@pytest.mark.parametrize("feature", [planes.Planes, plain, by_zlib])
def test_sets_built_before_are_read_as_before(tmp_path, monkeypatch, feature):
    with monkeypatch.context() as before:
        before.setattr(planes, "Planes", feature)
        images = a_set(tmp_path)
    source = open_source("made_up", "train", tmp_path)
    assert len(source) == len(images)
    for row in range(len(source)):
        found = source[row]
        np.testing.assert_array_equal(found["image"], images[found["id"]])
        assert found["image"].dtype == np.int16


def test_whoever_reads_with_tfds_alone_sees_pixels(tmp_path):
    import tensorflow_datasets as tfds

    images = a_set(tmp_path)
    data = tfds.builder_from_directory(tmp_path / "made_up" / "1.0.0").as_data_source("train")
    for example in data:
        found = record.decode(example)
        np.testing.assert_array_equal(found["image"], images[found["id"]])


def test_noise_is_stored_in_less_room(tmp_path):
    """What it is for: a slice of noise in its low bits, compressed as the files compress."""
    noise = np.random.default_rng(0).normal(1000, 30, (512, 512)).astype(np.int16)
    sizes = []
    for way, value in (("planes", planes.split(noise)), ("plain", noise.tobytes())):
        path = tmp_path / way
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:-1")
        writer.write(value)
        writer.close()
        sizes.append(path.stat().st_size)
    assert sizes[0] < 0.75 * sizes[1]
