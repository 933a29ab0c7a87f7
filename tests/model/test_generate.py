"""Decoding: the same as reading everything again, one row or many, compiled once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.generate import generate
from rg_jax.model.paligemma import apply

NEW = 6
LENGTHS = (9, 4, 1)


@pytest.fixture(scope="module")
def ragged(make_small, small_config):
    small = make_small(small_config, batch=3)
    small.mask = np.arange(9)[None] < np.array(LENGTHS)[:, None]
    small.text = np.where(small.mask, small.text, 0).astype(np.int32)
    small.generate = jax.jit(partial(generate, small.model, max_new_tokens=NEW, eos_id=-1))
    small.tokens_out = np.asarray(small.generate(small.params, small.image, small.text, small.mask))
    return small


def test_cached_decoding_equals_reading_it_all_again(ragged):
    """Each token is the argmax of a full forward pass over everything before it."""
    forward = jax.jit(
        lambda params, image, text, ar: apply(
            ragged.model,
            params,
            apply(ragged.model, params, image, text, ar)["hidden"],
            method="logits",
        )
    )
    for row, length in enumerate(LENGTHS):
        text = np.concatenate([ragged.text[row, :length], ragged.tokens_out[row]])[None]
        mask_ar = (np.arange(text.shape[1]) >= length)[None].astype(np.int32)
        logits = forward(ragged.params, ragged.image[row : row + 1], text, mask_ar)
        first = ragged.tokens + length - 1
        expected = np.asarray(logits)[0, first : first + NEW].argmax(-1)
        np.testing.assert_array_equal(ragged.tokens_out[row], expected)


def test_steps_give_the_hidden_states_of_a_full_pass(ragged):
    run = partial(generate, max_new_tokens=NEW, eos_id=-1, return_hidden=True)
    out = jax.jit(partial(run, ragged.model))(ragged.params, ragged.image, ragged.text, ragged.mask)
    np.testing.assert_array_equal(out["tokens"], ragged.tokens_out)
    row, length = 1, LENGTHS[1]
    text = np.concatenate([ragged.text[row, :length], ragged.tokens_out[row]])[None]
    mask_ar = (np.arange(text.shape[1]) >= length)[None].astype(np.int32)
    forward = jax.jit(partial(apply, ragged.model))
    full = forward(ragged.params, ragged.image[row : row + 1], text, mask_ar)
    at = ragged.tokens + length
    np.testing.assert_allclose(out["hidden"][row], full["hidden"][0, at:], atol=2e-5)
    np.testing.assert_allclose(out["image_features"][row], full["image_features"][0], atol=1e-5)


def test_ragged_batch_equals_one_by_one(ragged):
    alone = jax.jit(partial(generate, ragged.model, max_new_tokens=NEW, eos_id=-1))
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        out = alone(ragged.params, ragged.image[one], ragged.text[one, :length])
        np.testing.assert_array_equal(out[0], ragged.tokens_out[row])


def test_what_lies_in_the_padding_is_not_read(ragged):
    text = np.where(ragged.mask, ragged.text, 7).astype(np.int32)
    again = ragged.generate(ragged.params, ragged.image, text, ragged.mask)
    np.testing.assert_array_equal(again, ragged.tokens_out)


def test_compiled_once(ragged):
    traces = []

    def counted(*args):
        traces.append(1)
        return generate(ragged.model, *args, max_new_tokens=NEW, eos_id=-1)

    run = jax.jit(counted)
    first = run(ragged.params, ragged.image, ragged.text, ragged.mask)
    run(ragged.params, ragged.image[::-1].copy(), ragged.text, np.ones_like(ragged.mask))
    assert len(traces) == 1
    np.testing.assert_array_equal(first, ragged.tokens_out)


def scripted(monkeypatch, script):
    """Stand in for the model: row r says script[r]. Returns the list of turns in which it read."""
    import rg_jax.model.generate as module

    reads = []
    table = jnp.asarray(script, jnp.int32)

    def fake(model, params, *args, method):
        if method == "prefill":
            batch = args[0].shape[0]
            return jnp.zeros((batch, 1)), jnp.int32(0), jnp.zeros((batch, 1, 1))
        if method == "decode_step":
            tokens, at, _ = args
            jax.debug.callback(lambda at: reads.append(int(at)), at)
            return jnp.full((len(table), 1), at + 1, jnp.float32), at + 1
        at = args[0][:, 0].astype(jnp.int32)
        return jax.nn.one_hot(table[jnp.arange(len(table)), at], 9)

    monkeypatch.setattr(module, "apply", fake)
    monkeypatch.setattr(module, "cast_for_inference", lambda params, config: params)
    monkeypatch.setattr(module, "unstacked", lambda params: ())
    return reads


@pytest.mark.parametrize("return_hidden", [False, True])
def test_stops_when_every_row_has_ended(small, monkeypatch, return_hidden):
    reads = scripted(monkeypatch, [[5, 6, 1, 7, 7, 7, 7], [4, 1, 8, 8, 8, 8, 8]])
    out = generate(
        small.model,
        {},
        small.image,
        small.text,
        max_new_tokens=7,
        eos_id=1,
        return_hidden=return_hidden,
    )
    jax.effects_barrier()
    tokens = out["tokens"] if return_hidden else out
    np.testing.assert_array_equal(tokens, [[5, 6, 1, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0]])
    assert sorted(reads) == [0, 1]  # two tokens read, five turns saved
    if return_hidden:
        np.testing.assert_array_equal(out["hidden"][..., 0], [[1, 2] + [0] * 5, [1, 0] + [0] * 5])


def test_last_token_is_read_only_for_its_hidden_state(small, monkeypatch):
    script = [[5, 6, 7], [4, 4, 4]]
    reads = scripted(monkeypatch, script)
    run = partial(generate, small.model, {}, small.image, small.text, max_new_tokens=3, eos_id=1)
    np.testing.assert_array_equal(run(), script)
    jax.effects_barrier()
    assert sorted(reads) == [0, 1]
    scripted(monkeypatch, [[*row, 1] for row in script])
    np.testing.assert_array_equal(run(return_hidden=True)["hidden"][..., 0], [[1, 2, 3]] * 2)


def test_fillers_generate_nothing_and_keep_nobody_waiting(small, monkeypatch):
    reads = scripted(monkeypatch, [[5, 1, 7, 7], [4, 4, 4, 4]])
    tokens = generate(
        small.model,
        {},
        small.image,
        small.text,
        max_new_tokens=4,
        eos_id=1,
        pad_id=3,
        active=np.array([True, False]),
    )
    jax.effects_barrier()
    np.testing.assert_array_equal(tokens, [[5, 1, 3, 3], [3, 3, 3, 3]])
    assert reads == [0]


def test_padding_rows_of_the_table_are_never_chosen(make_small, small_config):
    small = make_small(small_config.replace(valid_vocab=10))
    small.params["llm"]["embedder"]["input_embedding"] *= np.where(
        np.arange(50) < 10, 1, 100
    ).astype(np.float32)[:, None]
    run = jax.jit(partial(generate, small.model, max_new_tokens=4, eos_id=-1))
    tokens = run(small.params, small.image, small.text % 10)
    assert (np.asarray(tokens) < 10).all()


def test_at_least_one_token(small):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(small.model, small.params, small.image, small.text, max_new_tokens=0, eos_id=1)
