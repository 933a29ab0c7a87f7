"""The training step: however a batch is cut and wherever it runs, the numbers are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax import recipes
from rg_jax.data.tasks import TASK_NAMES
from rg_jax.model.config import from_variant
from rg_jax.model.paligemma import PaliGemma, param_shapes
from rg_jax.training import mesh as mesh_lib
from rg_jax.training import step as step_lib
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import flatten, new_state, split_names, state_shapes, unflatten
from rg_jax.training.step import jit_update, make_update, row_losses

ROWS, TEXT, IDS = 16, 12, 90
# A row without any target, in the middle of the batch.
NO_TARGET = 3
ALL = [(".*", {"decay": "constant"})]
SGD = {"name": "sgd", "lr": 1.0}


@pytest.fixture(scope="module")
def model():
    width = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}
    config = from_variant(
        "tiny",
        vocab_size=512,
        valid_vocab=IDS,
        img={"image_size": 16, "patch_size": 8, **width},
        llm={**width, "num_kv_heads": 1, "head_dim": 16},
    )
    return PaliGemma(config)


def make_batch(seed):
    """Rows of unequal length, with unequal numbers of target tokens; one row has none.

    The rows resemble one another, so that their gradients add up: where they cancel, what is left
    are the roundings of the parts, and those are not what is compared here.
    """
    rng = np.random.default_rng(seed)
    prefix, length = rng.integers(2, 6, ROWS), rng.integers(7, TEXT + 1, ROWS)
    prefix[NO_TARGET] = length[NO_TARGET]
    column = np.arange(TEXT)
    valid = column < length[:, None]
    target = (valid & (column >= prefix[:, None])).astype(np.int32)
    image = rng.uniform(-1, 1, (16, 16, 3)) + rng.uniform(-0.1, 0.1, (ROWS, 16, 16, 3))
    other = rng.integers(3, IDS, (ROWS, TEXT))
    text = np.where(rng.random((ROWS, TEXT)) < 0.2, other, rng.integers(3, IDS, TEXT))
    return {
        "image": image.astype(np.float32),
        "text": np.where(valid, text, 0).astype(np.int32),
        "mask_ar": target,
        "mask_loss": target.copy(),
        "mask_input": valid,
        "task": rng.integers(0, len(TASK_NAMES), ROWS).astype(np.int32),
    }


@pytest.fixture(scope="module")
def batch():
    made = make_batch(0)
    tokens = made["mask_loss"].sum(1)
    assert tokens[NO_TARGET] == 0 and len(set(tokens)) > 4
    return made


def make_params(shapes):
    """No entry is zero or one: everything has a gradient. NumPy, for the step donates its state."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in shapes.items():
        value = 0.15 * rng.standard_normal(shape.shape)
        # Those of encoder and mask decoder are factors, the language model's are added to one.
        value += name.startswith(("img/", "masks/")) and name.endswith("scale")
        params[name] = value.astype(np.float32)
    return params


class Recorder(Optimizer):
    """Hands the gradients out with the metrics."""

    def update(self, grads, state, params, step):
        params, state, metrics = super().update(grads, state, params, step)
        return params, state, {**metrics, "grads": grads}


class Setup:
    """One way to run the step: so many devices, micro-batches and this normalisation."""

    def __init__(self, model, devices=1, rules=ALL, optimizer=SGD, **options):
        self.mesh = mesh_lib.make_mesh(jax.devices()[:devices])
        shapes = flatten(param_shapes(model.config))
        schedules, _ = split_names(list(shapes), rules)
        self.optimizer = Recorder(optimizer, schedules, 10)
        self.shapes = state_shapes(shapes, schedules, self.optimizer)
        self.shardings = mesh_lib.shard_tree(self.shapes, self.mesh)
        self.params = make_params(shapes)
        self.traces = 0
        update = make_update(model, self.optimizer, self.mesh, tasks=len(TASK_NAMES), **options)

        def counted(state, batch):
            self.traces += 1
            return update(state, batch)

        self.step = jit_update(counted, self.shardings, self.mesh)
        self.compiled = None

    def state(self):
        return new_state(self.shapes, self.shardings, self.params, self.optimizer)

    def run(self, batch, steps=1):
        """The last metrics and gradients, and the state after the steps."""
        arrays, state = mesh_lib.to_devices(batch, self.mesh), self.state()
        if self.compiled is None:
            self.compiled = self.step.lower(state, arrays).compile()
        for _ in range(steps):
            state, metrics = self.compiled(state, arrays)
        metrics = jax.device_get(metrics)
        return metrics, metrics.pop("grads"), state


@pytest.fixture(scope="module")
def whole(model):
    """The plain step on one device, for each way to normalise."""
    return {n: Setup(model, normalise=n) for n in ("tokens", "examples")}


def assert_same(one, other):
    """Loss, gradients relative to each tensor's largest entry, and parameters, within 1e-6."""
    (metrics, grads, state), (metrics_2, grads_2, state_2) = one, other
    for name in ("loss", "task_loss", "task_tokens", "grad_norm"):
        np.testing.assert_allclose(metrics[name], metrics_2[name], rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        # The gradient of the keys' bias is zero but for roundings: it has no size of its own.
        largest = np.abs(grads[name.replace("key/bias", "key/kernel")]).max()
        assert largest > 0, name
        np.testing.assert_allclose(grad / largest, grads_2[name] / largest, atol=1e-6, err_msg=name)
        new, new_2 = np.asarray(state.trainable[name]), np.asarray(state_2.trainable[name])
        np.testing.assert_allclose(new, new_2, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("normalise", "devices", "accumulation"),
    [
        ("tokens", 1, 2),
        ("tokens", 1, 4),
        ("tokens", 8, 1),
        ("tokens", 8, 2),
        ("examples", 8, 2),
    ],
)
def test_accumulation_and_sharding_change_nothing(
    model, whole, batch, monkeypatch, normalise, devices, accumulation
):
    monkeypatch.setattr(mesh_lib, "MIN_SHARDED_SIZE", 256)
    setup = Setup(model, devices, normalise=normalise, accumulation=accumulation)
    sharded = [n for n, s in setup.shardings.trainable.items() if not s.is_fully_replicated]
    assert len(sharded) > 10 if devices > 1 else not sharded
    expected, found = whole[normalise].run(batch), setup.run(batch)
    assert expected[0]["loss"] > 1
    for name in sharded:
        assert len({str(s.index) for s in found[2].trainable[name].addressable_shards}) == 8
    assert_same(expected, found)


def test_the_loss_is_what_it_is_called(model, whole, batch):
    """Written out from the logits: position t predicts token t + 1."""
    text, weights = batch["text"], batch["mask_loss"][:, 1:]
    params = whole["tokens"].params
    sums, counts = losses_of(model, params, batch)
    np.testing.assert_array_equal(counts, weights.sum(1))
    metrics = {n: setup.run(batch)[0] for n, setup in whole.items()}
    np.testing.assert_allclose(metrics["tokens"]["loss"], sums.sum() / counts.sum(), rtol=1e-6)
    has = counts > 0
    assert not has[NO_TARGET] and has.sum() == ROWS - 1
    mean = (sums[has] / counts[has]).mean()
    np.testing.assert_allclose(metrics["examples"]["loss"], mean, rtol=1e-6)
    assert abs(metrics["tokens"]["loss"] - metrics["examples"]["loss"]) > 1e-3
    for task in range(len(TASK_NAMES)):
        rows = batch["task"] == task
        for name, values in (("task_loss", sums), ("task_tokens", counts)):
            found = metrics["tokens"][name][task]
            np.testing.assert_allclose(found, values[rows].sum(), rtol=1e-6, err_msg=name)
    # The token behind the last one that is fed is still predicted, the first one never.
    late = {**batch, "text": text.copy()}
    full = int(np.flatnonzero(batch["mask_input"].all(1) & has)[0])
    late["text"][full, -1] = 3 + (late["text"][full, -1] - 2) % (IDS - 3)
    changed, _ = losses_of(model, params, late)
    assert (changed != sums).nonzero()[0].tolist() == [full]


def test_the_step_is_traced_once(whole, batch):
    """One program serves all batches: none is told apart by anything but its numbers."""
    setup = whole["tokens"]
    setup.run(batch)
    seen = set()
    for seed in range(1, 4):
        other = make_batch(seed)
        setup.step.lower(setup.state(), mesh_lib.to_devices(other, setup.mesh))
        seen.add(float(setup.run(other)[0]["loss"]))
    assert setup.traces == 1
    assert len(seen) == 3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_and_have_no_optimizer_state(model, batch, name):
    rules = [("img/head/.*", {"decay": "constant"}), ("img/.*", None), *ALL]
    optimizer = {"name": name, "lr": 1e-2, "weight_decay": 0.1, "min_dim_size_to_factor": 8}
    setup = Setup(model, rules=rules, optimizer=optimizer)
    metrics, grads, state = setup.run(batch, steps=3)
    head = {"img/head/kernel", "img/head/bias"}
    assert set(state.frozen) == {n for n in setup.params if n.startswith("img/")} - head
    assert set(state.trainable) == set(grads) == set(setup.params) - set(state.frozen)
    for key, value in state.frozen.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, setup.params[key].astype(jnp.bfloat16), err_msg=key)
    for key, value in state.trainable.items():
        assert value.dtype == jnp.float32
        assert (np.asarray(value) != setup.params[key]).any(), key
    assert int(state.step) == 3 and np.isfinite(metrics["loss"])
    paths = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    # The optimizer's state is kept by parameter: no frozen one has any.
    keys = {str(k.key) for path, _ in paths for k in path if hasattr(k, "key")}
    kept = {key for key in keys if "/" in key}
    assert kept == set(state.trainable)
    if name == "adamw":
        trained = sum(v.size for v in state.trainable.values())
        assert sum(leaf.size for _, leaf in paths) == 2 * trained + 1


def losses_of(model, params, batch):
    """Summed losses and target tokens of each row."""
    sums, counts = _losses(model)(unflatten(params), batch)
    return np.asarray(sums), np.asarray(counts)


@functools.cache
def _losses(model):
    def losses(params, batch):
        rows = row_losses(model, params, batch, 64)
        return rows["text"], rows["tokens"]

    return jax.jit(losses)


def predictions_of(model, params, batch, monkeypatch):
    """A number for each row that is made of everything the weighted predictions are made from."""
    probe = np.random.default_rng(2).standard_normal(model.config.llm.width).astype(np.float32)

    def probed(hidden, table, targets, **_):
        return hidden @ probe

    with monkeypatch.context() as patch:
        patch.setattr(step_lib, "blockwise_token_losses", probed)
        program = jax.jit(lambda p, b: row_losses(model, p, b, 64)["text"])
        program = program.lower(unflatten(params), batch).compile()
    return lambda batch: np.asarray(program(unflatten(params), batch))


def leaking_columns(predictions, batch):
    """Columns t where another target token t changes what token t or one before is predicted by."""
    found = []
    for column in range(2, TEXT):
        target = batch["mask_loss"][:, column] > 0
        # Weights on all predictions of the tokens up to t, those of the prefix too.
        before = np.broadcast_to(np.arange(TEXT) <= column, target.shape + (TEXT,))
        early = {**batch, "mask_loss": before.astype(np.int32)}
        changed = {**early, "text": early["text"].copy()}
        moved = 3 + (changed["text"][:, column] + 1) % (IDS - 3)
        changed["text"][:, column] = np.where(target, moved, changed["text"][:, column])
        if (predictions(early) != predictions(changed)).any():
            found.append(column)
    return found


def test_no_answer_leaks_through_the_step(model, whole, batch, monkeypatch):
    """A target token matters to what stands behind it, and to nothing before, to the last bit."""
    predictions = predictions_of(model, whole["tokens"].params, batch, monkeypatch)
    assert batch["mask_loss"][:, 2:].any(0).all()
    assert leaking_columns(predictions, batch) == []
    # The same search finds the leak where the mask lets all see all, in every token that is fed.
    open_mask = {**batch, "mask_ar": np.zeros_like(batch["mask_ar"])}
    assert leaking_columns(predictions, open_mask) == list(range(2, TEXT - 1))


def test_padding_changes_nothing(whole, batch):
    """Neither the loss nor any gradient, to the last bit, whatever stands in the padding."""
    noise = np.random.default_rng(1).integers(0, 512, batch["text"].shape)
    other = {**batch, "text": np.where(batch["mask_input"], batch["text"], noise).astype(np.int32)}
    assert (other["text"] != batch["text"]).sum() > 20
    (metrics, grads, _), (metrics_2, grads_2, _) = (whole["tokens"].run(b) for b in (batch, other))
    assert metrics["loss"] == metrics_2["loss"]
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, grads_2[name], err_msg=name)


def test_a_batch_that_does_not_fill_the_devices_is_refused():
    mesh = mesh_lib.make_mesh()
    mesh_lib.check_batch(16, 2, mesh)
    with pytest.raises(ValueError, match=r"batch_size=12 .* 8 devices"):
        mesh_lib.check_batch(12, 1, mesh)
    with pytest.raises(ValueError, match="accumulation=3"):
        mesh_lib.check_batch(16, 3, mesh)


def test_recipes_freeze_what_the_paper_freezes():
    config = recipes.paper(recipes.base())
    shapes = flatten(param_shapes(from_variant("3b")))
    trained, frozen = split_names(list(shapes), config.schedule)
    assert {name for name in trained if name.startswith("img/")} == {
        "img/head/kernel",
        "img/head/bias",
    }
    assert frozen and all(name.startswith("img/") for name in frozen)
