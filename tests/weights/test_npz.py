"""Weights in and out: exact, strict, and one line for every mistake."""

import re
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.weights.npz import flatten, load_npz, save_npz
from rg_jax.weights.vocabulary import POSITIONS, TABLE, adapters

SHAPES = {
    "img": {"pos_embedding": (1, 4, 6), "head": {"kernel": (6, 8), "bias": (8,)}},
    "llm": {"embedder": {"input_embedding": (10, 8)}, "layers": {"mlp": {"linear": (2, 5, 8)}}},
}
KEYS = {
    "params/img/pos_embedding",
    "params/img/head/kernel",
    "params/img/head/bias",
    "params/llm/embedder/input_embedding",
    "params/llm/layers/mlp/linear",
}


def tree(make):
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def expected(dtype=jnp.float32):
    return tree(lambda shape: jax.ShapeDtypeStruct(shape, dtype))


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    return tree(lambda shape: random.standard_normal(shape).astype(np.float32))


@pytest.fixture
def file(tmp_path, weights):
    path = tmp_path / "w.npz"
    save_npz(path, weights)
    return path


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def fails(path, *messages, adapt=None):
    with pytest.raises(UserError) as caught:
        load_npz(path, expected(), adapt=adapt)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(str(path))
    for message in messages:
        assert re.search(message, text), text
    return text


def test_round_trip_keeps_names_and_every_bit(file, weights):
    assert set(arrays_of(file)) == KEYS
    loaded = load_npz(file, expected())
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    assert jax.tree_util.tree_structure(loaded) == jax.tree_util.tree_structure(weights)
    assert [path.name for path in file.parent.iterdir()] == ["w.npz"]


def test_bfloat16_is_two_byte_void_as_in_the_original_files(tmp_path, weights):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), weights)
    save_npz(tmp_path / "h.npz", half)
    assert {array.dtype for array in arrays_of(tmp_path / "h.npz").values()} == {np.dtype("V2")}
    loaded = load_npz(tmp_path / "h.npz", expected(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(ml_dtypes.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, loaded, half)
    # Upcast without loss where the model wants float32 masters.
    wide = load_npz(tmp_path / "h.npz", expected())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), wide, half)

    # As np.savez itself writes such arrays.
    flat = {f"params/{name}": np.asarray(leaf) for name, leaf in flatten(half).items()}
    np.savez(tmp_path / "s.npz", **flat)
    again = load_npz(tmp_path / "s.npz", expected(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, again, half)


def test_put_places_every_leaf(file):
    seen = []

    def put(name, array):
        seen.append(name)
        return (name, array.shape)

    loaded = load_npz(file, expected(), put=put)
    assert {f"params/{name}" for name in seen} == KEYS
    assert loaded["img"]["head"]["bias"] == ("img/head/bias", (8,))


def test_an_error_in_put_is_not_blamed_on_the_file(file):
    def put(name, array):
        raise ValueError("no such device")

    with pytest.raises(ValueError, match="^no such device$"):
        load_npz(file, expected(), put=put)


def test_every_wrong_key_is_named(file):
    arrays = arrays_of(file)
    del arrays["params/img/head/bias"], arrays["params/img/head/kernel"]
    arrays["params/llm/extra"] = np.zeros(3, np.float32)
    arrays["opt/state"] = np.zeros(3, np.float32)
    arrays["params/llm/layers/mlp/linear"] = np.zeros((2, 8, 5), np.float32)
    arrays["params/llm/embedder/input_embedding"] = np.zeros((10, 8), np.int32)
    np.savez(file, **arrays)
    fails(
        file,
        "missing: params/img/head/bias, params/img/head/kernel",
        "unknown: params/llm/extra, opt/state",
        r"params/llm/layers/mlp/linear is \(2, 8, 5\) but the model needs \(2, 5, 8\)",
        "params/llm/embedder/input_embedding holds int32",
    )


def test_the_prefix_belongs_to_the_name(file):
    arrays = {key.removeprefix("params/"): array for key, array in arrays_of(file).items()}
    np.savez(file, **arrays)
    fails(file, "missing: params/img", "without the leading 'params/': ")


def test_missing_and_foreign_files(tmp_path):
    fails(tmp_path / "none.npz", "no such weights file")
    fails(tmp_path, "no such weights file")
    (tmp_path / "text.npz").write_text("<html>404</html>")
    fails(tmp_path / "text.npz", "not a whole .npz file")
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    fails(tmp_path / "other.npz", "not a whole .npz file")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(file, share):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    fails(file, "not a whole .npz file")


def test_flipped_bytes(file, weights):
    whole = bytearray(file.read_bytes())
    at = whole.find(weights["llm"]["layers"]["mlp"]["linear"].tobytes())
    whole[at] ^= 255
    file.write_bytes(whole)
    fails(file, "not a whole .npz file")


def test_a_failed_save_leaves_the_old_file_alone(file, weights):
    before = file.read_bytes()
    weights["llm"]["embedder"]["input_embedding"] = np.array([object()])
    with pytest.raises(ValueError):
        save_npz(file, weights)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["w.npz"]


def test_adapting_to_more_tokens_and_another_image_size(file, weights):
    larger = expected()
    larger["llm"]["embedder"]["input_embedding"] = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    larger["img"]["pos_embedding"] = jax.ShapeDtypeStruct((1, 16, 6), jnp.float32)
    with pytest.raises(UserError, match=r"input_embedding is \(10, 8\) but the model needs"):
        load_npz(file, larger)
    flat = flatten(load_npz(file, larger, adapt=adapters(13)))
    assert flat[TABLE].shape == (64, 8) and flat[POSITIONS].shape == (1, 16, 6)
    np.testing.assert_array_equal(flat[TABLE][:10], weights["llm"]["embedder"]["input_embedding"])
    assert (flat[TABLE][13:] == 0).all() and (flat[TABLE][10:13] != 0).all()
    # Only the number of rows may differ.
    larger["llm"]["embedder"]["input_embedding"] = jax.ShapeDtypeStruct((64, 9), jnp.float32)
    with pytest.raises(UserError, match=r"input_embedding is \(10, 8\) but the model needs"):
        load_npz(file, larger, adapt=adapters(13))
