"""The loss over all pairs is the same number however many devices share it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.config import from_variant
from rg_jax.model.contrastive import Contrastive, init_params
from rg_jax.model.paligemma import apply
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.contrastive import NO_TOKEN, captions_of, make_pair_update, pair_losses
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import flatten, new_state, split_names, state_shapes, unflatten
from rg_jax.training.step import jit_update

ROWS, TEXT = 16, 10
# These programs are compiled more often than they are run.


@pytest.fixture(scope="module")
def model():
    width = {"width": 16, "depth": 1, "mlp_dim": 24, "num_heads": 2}
    return Contrastive(
        from_variant(
            "tiny",
            vocab_size=64,
            img={"image_size": 16, "patch_size": 8, **width},
            llm={**width, "num_kv_heads": 1, "head_dim": 8},
        )
    )


@pytest.fixture(scope="module")
def batch():
    """Prompts of unequal length in front of captions; rows 3, 9 and 12 say the same."""
    rng = np.random.default_rng(0)
    text = rng.integers(3, 60, (ROWS, TEXT)).astype(np.int32)
    target = np.zeros((ROWS, TEXT), np.int32)
    for row in range(ROWS):
        start = 1 + row % 4
        target[row, start : start + 4 + row % 2] = 1
    for row in (3, 9, 12):
        start = 1 + row % 4
        target[row] = 0
        target[row, start : start + 4] = 1
        text[row, start : start + 4] = [11, 12, 13, 14]
    return {
        "image": rng.uniform(-1, 1, (ROWS, 16, 16, 3)).astype(np.float32),
        "text": text,
        "mask_ar": target,
        "mask_loss": target,
        "mask_input": np.ones((ROWS, TEXT), bool),
        "task": np.zeros(ROWS, np.int32),
    }


def dense(images, texts, same, scale, bias):
    """Written out: every pair asked for itself, from the whole matrix of logits."""
    logits = scale * images @ texts.T + bias
    losses = -jax.nn.log_sigmoid(jnp.where(same, 1, -1) * logits).sum(axis=1)
    found = jnp.take_along_axis(same, logits.argmax(axis=1)[:, None], axis=1)[:, 0]
    return losses, found.astype(jnp.float32)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_pair_counts_once_on_any_number_of_devices(devices):
    rng = np.random.default_rng(1)
    images, texts = (jnp.asarray(rng.standard_normal((ROWS, 6)), jnp.float32) for _ in range(2))
    tokens = jnp.asarray(rng.integers(0, 2, (ROWS, 2)), jnp.int32)  # four captions, often equal
    same = (tokens[:, None] == tokens[None]).all(-1)
    weights = jnp.arange(ROWS) / ROWS + 0.5  # every row's loss is looked at for itself
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    spread = mesh_lib.batch_sharding(mesh)
    given = [jax.device_put(x, spread) for x in (images, texts)] + [jnp.float32(3), jnp.float32(-2)]
    tokens = jax.device_put(tokens, spread)

    def ours(images, texts, scale, bias):
        losses, found = pair_losses(images, texts, tokens, scale, bias, mesh)
        return (losses * weights).sum(), found

    def theirs(images, texts, scale, bias):
        losses, found = dense(images, texts, same, scale, bias)
        return (losses * weights).sum(), found

    grads = {}
    for f in (ours, theirs):
        program = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))
        grads[f] = jax.device_get(program(*given))
    ((loss, found), ours), ((loss_2, found_2), theirs) = grads.values()
    np.testing.assert_allclose(loss, loss_2, rtol=1e-6)
    np.testing.assert_array_equal(found, found_2)
    assert 0 < found.mean() < 1
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_no_device_ever_holds_all_pairs():
    mesh = mesh_lib.make_mesh(jax.devices()[:8])
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    call = partial(pair_losses, mesh=mesh)
    rows = shape((128, 4)), shape((128, 4)), jax.ShapeDtypeStruct((128, 3), jnp.int32)
    loss = jax.grad(lambda *x: call(*x)[0].sum(), (0, 1))
    text = str(jax.make_jaxpr(loss)(*rows, shape(()), shape(())))
    assert "f32[16,16]" in text and "f32[16,128]" not in text and "f32[128,128]" not in text


def test_captions_are_known_whatever_stands_before_them(batch):
    tokens, valid = (np.asarray(x) for x in captions_of(jax.tree.map(jnp.asarray, batch)))
    assert tokens[3].tolist() == tokens[9].tolist() == [11, 12, 13, 14] + [NO_TOKEN] * 6
    assert valid.sum(1).tolist() == batch["mask_loss"].sum(1).tolist()
    for row in range(ROWS):
        wanted = batch["text"][row][batch["mask_loss"][row] > 0]
        assert tokens[row][valid[row]].tolist() == wanted.tolist()


def test_a_caption_is_read_alike_wherever_it_stands(model):
    params = jax.jit(partial(init_params, model.config))(jax.random.key(0))
    text = np.array([[7, 8, 9, 0, 0, 0], [5, 6, 7, 8, 9, 4]], np.int32)
    valid = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], bool)
    read = jax.jit(partial(apply, model, method="embed_texts"))
    first, second = np.asarray(read(params, text, valid))
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(first), 1, atol=1e-6)
    other = np.asarray(read(params, np.where(valid, text[:, ::-1], text), valid))
    assert np.abs(other[1] - second).max() > 1e-3
    # A row without any caption is a number too.
    assert np.isfinite(np.asarray(read(params, text, np.zeros_like(valid)))).all()


def step_on(model, batch, devices):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    params = flatten(jax.jit(partial(init_params, model.config))(jax.random.key(0)))
    rules = [("img/head/.*", None), (".*", {"decay": "constant"})]
    schedules, _ = split_names(list(params), rules)
    optimizer = Optimizer({"name": "sgd", "lr": 1.0}, schedules, 10)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shapes = state_shapes(shapes, schedules, optimizer)
    shardings = mesh_lib.shard_tree(shapes, mesh)
    params = {k: np.asarray(v) for k, v in params.items()}
    state = new_state(shapes, shardings, params, optimizer)
    update = jit_update(make_pair_update(model, optimizer, mesh), shardings, mesh)
    arrays = mesh_lib.to_devices(batch, mesh)
    program = update.lower(state, arrays).compile()
    state, metrics = program(state, arrays)
    return params, jax.device_get(state.trainable), jax.device_get(metrics)


@pytest.fixture(scope="module")
def one_device(model, batch):
    return step_on(model, batch, 1)


def test_a_step_on_eight_devices_is_that_on_one(model, batch, one_device, monkeypatch):
    monkeypatch.setattr(mesh_lib, "MIN_SHARDED_SIZE", 64)
    before, one, metrics = one_device
    _, eight, metrics_8 = step_on(model, batch, 8)
    np.testing.assert_allclose(metrics["loss"], metrics_8["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], metrics_8["grad_norm"], rtol=1e-4)
    assert metrics["batch_recall"] == metrics_8["batch_recall"]
    assert set(before) - set(one) == {"img/head/kernel", "img/head/bias"}
    for name, value in one.items():
        largest = np.abs(value - before[name]).max()
        if "key/bias" not in name:  # zero but for roundings
            assert largest > 0, name
            np.testing.assert_allclose(
                (value - before[name]) / largest,
                (eight[name] - before[name]) / largest,
                atol=1e-4,
                err_msg=name,
            )


def test_the_loss_of_a_step_is_the_dense_one(model, batch, one_device):
    params, _, metrics = one_device
    tokens, valid = captions_of(jax.tree.map(jnp.asarray, batch))

    def vectors(params):
        call = partial(apply, model, params)
        images = call(batch["image"], method="embed_images")
        return images, call(jnp.maximum(tokens, 0), valid, method="embed_texts")

    images, texts = jax.jit(vectors)(unflatten(params))
    same = (tokens[:, None] == tokens[None]).all(-1)
    assert same.sum() == ROWS + 6
    losses, found = dense(images, texts, same, 10.0, -10.0)
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["batch_recall"], found.mean())
