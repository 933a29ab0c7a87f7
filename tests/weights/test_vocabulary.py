"""More tokens and other image sizes for weights that exist."""

import ml_dtypes
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.weights.vocabulary import TABLE, adapters, grow_table, padded_rows, resize_positions


def test_rows_are_a_multiple_of_64():
    assert [padded_rows(n) for n in (1, 64, 65, 257_152, 257_158)] == [
        64,
        64,
        128,
        257_152,
        257_216,
    ]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_new_rows_start_near_the_mean(dtype):
    table = np.random.default_rng(0).normal(3, 2, (500, 32)).astype(dtype)
    grown = grow_table(table, 530)
    assert grown.shape == (576, 32) and grown.dtype == dtype
    np.testing.assert_array_equal(grown[:500], table)
    assert (grown[530:] == 0).all()
    new, mean = grown[500:530].astype(np.float32), table.astype(np.float32).mean(axis=0)
    distance = np.abs(new - mean)
    assert 0.1 < distance.mean() < 0.25 and distance.max() < 1.2
    assert len(np.unique(new, axis=0)) == 30
    np.testing.assert_array_equal(grown, grow_table(table, 530))
    assert (grown[500:530] != grow_table(table, 530, seed=1)[500:530]).any()


def test_mean_of_many_rows_is_exact():
    """More rows than one chunk, and a mean that float32 sums would miss."""
    table = np.full((40_000, 2), 1000.001, np.float32)
    grown = grow_table(table, 40_001, noise=0.5)
    np.testing.assert_array_equal(grown[40_000], table[0])


def test_padding_rows_of_the_file_are_not_tokens():
    table = np.ones((64, 4), np.float32)
    table[60:] = 99
    grown = grow_table(table, 62, known=60)
    assert grown.shape == (64, 4)
    np.testing.assert_array_equal(grown[:62], 1)
    np.testing.assert_array_equal(grown[62:], 0)


@pytest.mark.parametrize("rows", [13, 64])
def test_a_table_saved_with_our_tokens_is_kept(rows):
    """10 pieces and 3 added tokens, with and without padding, in a file that names no tokens."""
    table = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    table[13:] = 0
    told = []
    kept = adapters(13, known=10, tell=told.append)[TABLE](table, (64, 4))
    np.testing.assert_array_equal(kept[:13], table[:13])
    assert kept.shape == (64, 4) and (kept[13:] == 0).all()
    assert told == ["rows 10 to 12 are taken for the added tokens, in our order"]


@pytest.mark.parametrize(
    ("rows", "zero", "moved"),
    [
        (10, 10, None),  # stock: the pieces alone
        (64, 12, None),  # a token fewer than ours
        (12, 12, None),
        (64, 13, {}),  # the file says that it has none of ours
    ],
)
def test_other_rows_are_not_taken_for_our_tokens(rows, zero, moved):
    table = np.random.default_rng(0).normal(size=(rows, 4)).astype(np.float32)
    table[zero:] = 0
    grown = adapters(13, known=10, moved=moved)[TABLE](table, (64, 4))
    np.testing.assert_array_equal(grown, grow_table(table, 13, rows=64, known=10))


def test_a_vocabulary_does_not_shrink():
    table = np.ones((64, 4), np.float32)
    for changes, message in [
        ({"num_tokens": 63}, "knows 64 tokens but the tokenizer has only 63"),
        ({"num_tokens": 70, "rows": 64}, "cannot hold 70 tokens in 64 rows"),
        ({"num_tokens": 70, "known": 65}, "has 64 rows; 65"),
    ]:
        with pytest.raises(UserError, match=message):
            grow_table(table, **changes)


def test_positions_from_224_to_448():
    """256 → 1024 positions: a plane stays a plane, rows stay rows, columns columns."""
    y, x = np.mgrid[:16, :16].astype(np.float32)
    plane = np.stack([y, x, np.full_like(x, 7)], axis=-1).reshape(1, 256, 3)
    large = resize_positions(plane, 1024).reshape(32, 32, 3)
    # Half-pixel centres: position i of 32 lies at i / 2 - 1 / 4 of 16.
    centre = np.clip(np.arange(32) / 2 - 0.25, 0, 15)
    np.testing.assert_allclose(large[..., 0], np.repeat(centre[:, None], 32, axis=1), atol=1e-5)
    np.testing.assert_allclose(large[..., 1], np.repeat(centre[None], 32, axis=0), atol=1e-5)
    np.testing.assert_allclose(large[..., 2], 7, atol=1e-5)


def test_positions_are_upcast_first():
    half = np.random.default_rng(0).standard_normal((1, 256, 8)).astype(ml_dtypes.bfloat16)
    large = resize_positions(half, 1024)
    assert large.dtype == np.float32
    np.testing.assert_array_equal(large, resize_positions(half.astype(np.float32), 1024))
    assert (large != large.astype(ml_dtypes.bfloat16).astype(np.float32)).any()
    np.testing.assert_array_equal(resize_positions(half, 256), half.astype(np.float32))


def test_positions_are_square_grids():
    with pytest.raises(UserError, match="256 positions cannot be resized to 1000"):
        resize_positions(np.zeros((1, 256, 4), np.float32), 1000)
