"""Attention and its own gradient against the plain formulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.attention import attend, attention_weights, heads_first

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def problem():
    random = np.random.default_rng(0)
    q = 3 * random.standard_normal((B, T, N, H)).astype(np.float32)
    k, v = (random.standard_normal((B, S, K, H)).astype(np.float32) for _ in range(2))
    mask = random.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask


def plain(q, k, v, mask, cap):
    """Keys repeated for every head, softmax by JAX, gradient by JAX."""
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize("cap", [None, 5.0, 50.0, 100.0])
def test_values_and_gradients(cap):
    """A cap of 100 is above what exp takes unshifted."""
    q, k, v, mask = problem()

    def ours(q, k, v):
        return attend(q, heads_first(k), heads_first(v), mask, cap)

    def loss(function):
        return lambda *x: (function(*x) * jnp.arange(float(H))).sum()

    reference = lambda *x: plain(*x, mask, cap)  # noqa: E731
    np.testing.assert_allclose(ours(q, k, v), reference(q, k, v), atol=2e-6)
    found = jax.grad(loss(ours), (0, 1, 2))(q, k, v)
    expected = jax.grad(loss(reference), (0, 1, 2))(q, k, v)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("cap", [None, 50.0])
def test_large_scores_and_rows_that_see_nothing_stay_numbers(cap):
    scores = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1.0, 2.0, 3.0]])
    visible = jnp.asarray([[True, True, False], [True, True, True], [False, False, False]])
    weights = attention_weights(scores, visible, cap)
    np.testing.assert_allclose(weights[0], [1, 0, 0], atol=1e-30)
    np.testing.assert_allclose(weights[1], [1 / 3] * 3, rtol=1e-6)
    assert (np.asarray(weights)[~np.asarray(visible)] == 0).all()
    grad = jax.grad(lambda s: attention_weights(s, visible, cap)[:, 0].sum())(scores)
    assert np.isfinite(grad).all() and (np.asarray(grad[2]) == 0).all()


def test_the_gradient_keeps_two_arrays_of_the_scores_size():
    """What the backward pass of a layer holds in memory: the softmax and the tanh, no more."""
    scores = jnp.ones((4, 6))
    _, saved = jax.vjp(lambda s: attention_weights(s, None, 50.0), scores)
    kept = [x for x in jax.tree.leaves(saved) if getattr(x, "shape", ()) == scores.shape]
    assert len(kept) == 2
