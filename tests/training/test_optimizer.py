"""Schedules, freezing by regex, and the optimizers against their references."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rg_jax.errors import UserError
from rg_jax.model.config import LoraConfig, from_variant
from rg_jax.model.lora import factor_shapes
from rg_jax.model.paligemma import param_shapes
from rg_jax.training.optimizer import Optimizer, _matrices, assign, make_schedule
from rg_jax.training.state import flatten

NAMES = ["img/Transformer/encoder_norm/scale", "img/head/kernel", "llm/final_norm/scale"]


def test_the_first_matching_rule_wins_and_covers_everything():
    rules = [("img/head/.*", 1), ("img/.*", None), (".*", 2)]
    assert list(assign(NAMES, rules).values()) == [None, 1, 2]
    with pytest.raises(UserError, match="llm/final_norm/scale"):
        assign(NAMES, rules[:2])
    with pytest.raises(UserError, match="img/haed"):
        assign(NAMES, [("img/haed/.*", 1), (".*", 2)])


def test_schedule_values():
    cosine = make_schedule(100, {"decay": "cosine", "warmup_percent": 10})
    np.testing.assert_allclose(cosine(0), 0.1, rtol=1e-6)
    np.testing.assert_allclose(cosine(9), 1.0, rtol=1e-6)
    np.testing.assert_allclose(cosine(55), 0.5, atol=1e-6)
    np.testing.assert_allclose(cosine(100), 0.0, atol=1e-7)
    linear = make_schedule(10, {"decay": "linear", "floor": 0.2, "scale": 0.5})
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [0.5, 0.3, 0.1], rtol=1e-6)
    for wrong in ({"decay": "cos"}, {"warm": 3}, {"warmup_steps": 1, "warmup_percent": 1}):
        with pytest.raises(UserError):
            make_schedule(10, wrong)


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "llm/embedder/input_embedding": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "llm/final_norm/scale": jnp.asarray(rng.normal(size=(4,)), jnp.float32),
    }


def _optimizer(**config):
    schedules = dict.fromkeys(_params(), {"decay": "constant"})
    return Optimizer({"lr": 0.1, **config}, schedules, 10)


def test_adamw_is_optax_adamw():
    params, grads = _params(), _params(1)
    ours, theirs = (
        _optimizer(name="adamw", weight_decay=0.3),
        optax.adamw(0.1, weight_decay=0.3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    )
    a, state_a, b, state_b = params, ours.init(params), params, theirs.init(params)
    for step in range(3):
        a, state_a, _ = ours.update(grads, state_a, a, step)
        updates, state_b = theirs.update(grads, state_b, b)
        b = optax.apply_updates(b, updates)
    for name in params:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-6, atol=1e-7)


IMG_ATTENTION = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0"


@pytest.mark.parametrize(
    "name, shape, order, matrices",
    [  # `order`, `matrices`: how its author would cut it into (matrix, summed over, produced)
        ("llm/layers/attn/q_einsum/w", (2, 3, 8, 4), (0, 2, 1, 3), (2, 8, 12)),
        ("llm/layers/attn/kv_einsum/w", (2, 2, 2, 8, 4), (0, 1, 3, 2, 4), (4, 8, 8)),
        ("llm/layers/attn/qkv_einsum/w", (2, 3, 2, 8, 4), (0, 1, 3, 2, 4), (6, 8, 8)),
        ("llm/layers/attn/attn_vec_einsum/w", (2, 2, 4, 8), (0, 1, 2, 3), (2, 8, 8)),
        ("llm/layers/mlp/gating_einsum", (2, 2, 8, 12), (0, 1, 2, 3), (4, 8, 12)),
        ("llm/layers/mlp/linear", (2, 12, 8), (0, 1, 2), (2, 12, 8)),
        (f"{IMG_ATTENTION}/key/kernel", (2, 8, 2, 4), (0, 1, 2, 3), (2, 8, 8)),
        (f"{IMG_ATTENTION}/out/kernel", (2, 2, 4, 8), (0, 1, 2, 3), (2, 8, 8)),
        ("img/embedding/kernel", (2, 2, 3, 8), (0, 1, 2, 3), (1, 12, 8)),
        ("lora/llm/layers/attn/q_einsum/w/a", (2, 8, 4), (0, 1, 2), (2, 8, 4)),
        ("lora/llm/layers/attn/q_einsum/w/b", (2, 4, 3, 4), (0, 1, 2, 3), (2, 4, 12)),
        ("lora/llm/layers/attn/kv_einsum/w/b", (2, 2, 3, 2, 4), (0, 1, 2, 3, 4), (4, 3, 8)),
        (f"lora/{IMG_ATTENTION}/out/kernel/a", (2, 2, 4, 3), (0, 1, 2, 3), (2, 8, 3)),
    ],
)
def test_muon_steps_are_orthogonal_and_as_large_as_those_of_adamw(name, shape, order, matrices):
    rng = np.random.default_rng(0)
    norm = "llm/final_norm/scale"
    params = {name: jnp.zeros(shape), norm: jnp.zeros(8)}
    grads = {n: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for n, p in params.items()}
    optimizer = Optimizer(
        {"name": "muon", "lr": 0.1}, dict.fromkeys(params, {"decay": "constant"}), 10
    )
    new, _, _ = optimizer.update(grads, optimizer.init(params), params, 0)

    def cut(x):
        return np.asarray(x).transpose(order).reshape(matrices)

    step, gradient = -cut(new[name]) / 0.1, cut(grads[name])
    values = np.linalg.svd(step, compute_uv=False) / (0.2 * np.sqrt(max(matrices[1:])))
    # Five Newton–Schulz turns bring all but the smallest singular values near 1.
    assert values.max() < 1.3 and np.median(values) > 0.6
    assert np.linalg.svd(gradient, compute_uv=False).max() > 3
    assert (np.einsum("mij,mij->m", step, gradient) > 0).all()
    # Adam with Nesterov's momentum: its first step is the sign, made larger by 0.09 / 0.19.
    np.testing.assert_allclose(new[norm], -0.1 * (1 + 9 / 19) * np.sign(grads[norm]), rtol=1e-4)


def test_muon_takes_every_matrix_of_the_model():
    names = flatten(param_shapes(from_variant("tiny", vocab_size=64)))
    left = {name for name, axes in _matrices(names).items() if axes is None}
    assert "img/embedding/kernel" not in left
    lora = from_variant("tiny", vocab_size=64, lora=LoraConfig(rank=2, new_rows=3))
    factors = _matrices(
        {name: jnp.zeros(shape) for name, shape in factor_shapes(lora).items()}
    ).items()
    assert [n for n, axes in factors if axes is None] == ["lora/llm/embedder/input_embedding/rows"]
    assert {n for n in left if not n.endswith(("bias", "scale"))} == {
        "img/pos_embedding",
        "llm/embedder/input_embedding",
    }


def test_adafactor_follows_the_paper_on_a_matrix():
    """One and two steps written out: factored second moment, update clipped at RMS 1."""
    optimizer = _optimizer(name="adafactor", min_dim_size_to_factor=2)
    params, grads = _params(), _params(1)
    state = optimizer.init(params)
    name = "llm/embedder/input_embedding"
    value, g = np.asarray(params[name], np.float64), np.asarray(grads[name], np.float64)
    row = col = 0.0
    for step in range(2):
        params, state, _ = optimizer.update(grads, state, params, step)
        beta = 1 - (step + 1) ** -0.8
        row = beta * row + (1 - beta) * (g**2 + 1e-30).mean(1)
        col = beta * col + (1 - beta) * (g**2 + 1e-30).mean(0)
        update = g / np.sqrt(np.outer(row, col) / row.mean())
        update /= max(1.0, np.sqrt((update**2).mean()))
        value = value - 0.1 * update
    np.testing.assert_allclose(params[name], value, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    params, grads = _params(), _params(1)
    norm = float(optax.tree.norm(grads))
    optimizer = _optimizer(name="sgd", clip_norm=norm / 2)
    new, _, metrics = optimizer.update(grads, optimizer.init(params), params, 0)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(new[name], params[name] - 0.05 * grads[name], rtol=1e-5)


def test_mistakes_in_the_config_are_named():
    with pytest.raises(UserError, match="lion"):
        _optimizer(name="lion")
    with pytest.raises(UserError, match="freezes every parameter"):
        Optimizer({"name": "sgd", "lr": 1.0}, {}, 10)
