"""Cross-entropy in blocks: the same values and gradients as the plain formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.losses import blockwise_cross_entropy, blockwise_token_losses, per_example

VOCAB, WIDTH = 53, 12


def problem(dtype=jnp.float32, shape=(3, 5), valid=VOCAB, scale=2.0):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(scale * random.standard_normal((*shape, WIDTH)), dtype)
    table = jnp.asarray(random.standard_normal((VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(random.integers(0, valid, shape), jnp.int32)
    weights = jnp.asarray(random.integers(0, 3, shape), jnp.float32)
    return hidden, table, targets, weights


def plain(hidden, table, targets, weights, valid, softcap):
    logits = jnp.einsum(
        "...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logs = jax.nn.log_softmax(logits[..., :valid], axis=-1)
    losses = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    return (losses * weights).sum()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("valid", [VOCAB, 47])
@pytest.mark.parametrize("block", [7, 47, 52, 1000])
def test_value_and_gradients_equal_the_plain_loss(block, valid, softcap):
    hidden, table, targets, weights = problem(valid=valid)

    def ours(h, t):
        return blockwise_cross_entropy(h, t, targets, weights, block, valid, softcap)[0]

    value, grads = jax.value_and_grad(ours, (0, 1))(hidden, table)
    expected, expected_grads = jax.value_and_grad(plain, (0, 1))(
        hidden, table, targets, weights, valid, softcap
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.shape == wanted.shape and grad.dtype == wanted.dtype
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=2e-5)


def test_sums_weights_and_rows():
    hidden, table, targets, weights = problem()
    total, count = blockwise_cross_entropy(hidden, table, targets, weights, 16)
    assert count == weights.sum()
    losses = blockwise_token_losses(hidden, table, targets, block_size=16)
    assert losses.shape == targets.shape and (losses >= 0).all()
    rows, counts = per_example(losses, weights)
    np.testing.assert_allclose(rows.sum(), total, rtol=1e-6)
    np.testing.assert_array_equal(counts, weights.sum(axis=1))


def test_weight_zero_adds_exactly_nothing_and_a_wrong_target_is_not_quiet():
    hidden, table, targets, weights = problem(valid=40)
    bad = targets.at[0, 0].set(45).at[1, 1].set(-1)
    off = weights.at[0, 0].set(0).at[1, 1].set(0)

    def loss(h, t, which, w):
        return blockwise_cross_entropy(h, t, which, w, 16, 40)[0]

    value, grads = jax.value_and_grad(loss, (0, 1))(hidden, table, bad, off)
    expected, expected_grads = jax.value_and_grad(loss, (0, 1))(hidden, table, targets, off)
    assert value == expected
    jax.tree.map(np.testing.assert_array_equal, grads, expected_grads)
    assert (np.asarray(grads[0])[0, 0] == 0).all() and (np.asarray(grads[1])[40:] == 0).all()
    assert loss(hidden, table, bad, jnp.ones_like(weights)) == np.inf
    nothing = blockwise_cross_entropy(hidden, table, bad, jnp.zeros_like(weights), 16, 40)
    assert nothing == (0, 0)


def test_huge_logits_stay_finite():
    hidden, table, targets, weights = problem(scale=1e4)
    value, grad = jax.value_and_grad(
        lambda h: blockwise_cross_entropy(h, table, targets, weights, 16)[0]
    )(hidden)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_bfloat16_hidden_states_give_float32_losses():
    hidden, table, targets, weights = problem(jnp.bfloat16)
    value, (d_hidden, d_table) = jax.value_and_grad(
        lambda h, t: blockwise_cross_entropy(h, t, targets, weights, 16)[0], (0, 1)
    )(hidden, table)
    assert (value.dtype, d_hidden.dtype, d_table.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    expected = plain(hidden, table, targets, weights, VOCAB, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def shapes_in(jaxpr, found):
    for eqn in jaxpr.eqns:
        found |= {(var.aval.shape, str(var.aval.dtype)) for var in eqn.outvars}
        for value in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr),
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                shapes_in(value.jaxpr, found)
            elif isinstance(value, jax.extend.core.Jaxpr):
                shapes_in(value, found)
    return found


def test_never_all_logits_and_no_gradient_for_a_frozen_table():
    hidden, table, targets, weights = problem()

    def loss(h, t):
        return blockwise_cross_entropy(h, t, targets, weights, 16)[0]

    both = shapes_in(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, table).jaxpr, set())
    assert ((15, 16), "float32") in both and ((VOCAB, WIDTH), "float32") in both
    assert not any(shape[-1:] == (VOCAB,) for shape, _ in both)
    frozen = shapes_in(jax.make_jaxpr(jax.grad(loss))(hidden, table).jaxpr, set())
    assert ((VOCAB, WIDTH), "float32") not in frozen


def test_refuses_nonsense():
    hidden, table, targets, _ = problem()
    with pytest.raises(ValueError, match="block_size"):
        blockwise_token_losses(hidden, table, targets, block_size=0)
    with pytest.raises(ValueError, match="valid_vocab 54"):
        blockwise_token_losses(hidden, table, targets, valid_vocab=54)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("block", [7, 1000])
def test_only_counted_tokens_are_computed(block, share, groups):
    """Values and gradients as if all were; the others cost nothing and get no gradient."""
    hidden, table, targets, _ = problem(shape=(3, 8))
    random = np.random.default_rng(1)
    counted = jnp.asarray(random.random((3, 8)) < share)
    factor = jnp.asarray(random.standard_normal((3, 8)), jnp.float32)

    def total(h, t, counted, groups):
        losses = blockwise_token_losses(
            h, t, targets, block_size=block, counted=counted, groups=groups
        )
        return (jnp.where(mask, losses, 0.0) * factor).sum()

    mask = counted
    both = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=3)
    value, grads = both(hidden, table, counted, groups)
    expected, wanted = both(hidden, table, None, 1)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert (np.asarray(grads[0])[~np.asarray(counted)] == 0).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_an_uncounted_token_gets_no_gradient_through_its_own_loss(groups):
    """What it is said to cost is no cost: nobody learns from it, weighted or not."""
    hidden, table, targets, _ = problem(shape=(3, 8))
    counted = jnp.asarray(np.random.default_rng(1).random((3, 8)) < 0.5)

    def total(h):
        losses = blockwise_token_losses(
            h, table, targets, block_size=7, counted=counted, groups=groups
        )
        return losses.sum()

    grad = jax.jit(jax.grad(total))(hidden)
    assert (np.asarray(grad)[~np.asarray(counted)] == 0).all()
    assert (np.asarray(grad)[np.asarray(counted)] != 0).any()


def test_logits_are_made_for_the_share_that_counts():
    """Of eight shares of the tokens the smallest that holds the counted ones is computed."""
    hidden, table, targets, _ = problem(shape=(4, 8))
    counted = jnp.arange(32).reshape(4, 8) % 8 < 3  # 12 of 32
    program = jax.jit(
        lambda c: blockwise_token_losses(hidden, table, targets, block_size=1000, counted=c)
    )
    made = [f"tensor<{rows}x{VOCAB}xf32>" for rows in (4, 8, 12, 16, 20, 24, 28, 32)]
    text = program.lower(counted).as_text()
    assert all(shape in text for shape in made)
    with pytest.raises(ValueError, match="32 tokens are not 5 equal groups"):
        blockwise_token_losses(hidden, table, targets, counted=counted, groups=5)
