"""Masks in the training step: the same however it is cut, and free where there are none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import ROWS, TEXT, Setup, assert_same, make_batch

from rg_jax.model.config import MaskDecoderConfig, from_variant
from rg_jax.model.generate import generate, masks_of_generated
from rg_jax.model.mask_decoder import resize_logits
from rg_jax.model.paligemma import PaliGemma, apply
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.state import unflatten
from rg_jax.training.step import MASK_KEYS, MaskLoss

SLOTS, SIZE = 2, 12
WIDTH = {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2}


@pytest.fixture(scope="module")
def model():
    return PaliGemma(
        from_variant(
            "tiny",
            vocab_size=512,
            valid_vocab=90,
            img={"image_size": 16, "patch_size": 8, **WIDTH},
            llm={**WIDTH, "num_kv_heads": 1, "head_dim": 16},
            masks=MaskDecoderConfig(**{**WIDTH, "depth": 1}, mask_tokens=2),
        )
    )


def with_masks(batch, rows):
    """The batch with a mask in every slot of `rows`, of the same area everywhere."""
    rng = np.random.default_rng(1)
    masks = np.zeros((ROWS, SLOTS, SIZE, SIZE), np.uint8)
    valid = np.zeros((ROWS, SLOTS), bool)
    for row in rows:
        for slot in range(SLOTS):
            y, x = rng.integers(0, SIZE - 5, 2)
            masks[row, slot, y : y + 5, x : x + 5] = 1
        valid[row] = True
        valid[row, 1] = row % 3 > 0
    at = np.tile(np.arange(SLOTS, dtype=np.int32) + TEXT // 2, (ROWS, 1))
    return {**batch, "masks": masks, "mask_at": at, "mask_valid": valid}


@pytest.fixture(scope="module")
def batch():
    return with_masks(make_batch(0), range(0, ROWS, 2))


# Gradients of the masks are larger than those of the text: smaller steps, the same 1e-6.
SGD = {"name": "sgd", "lr": 0.1}


@pytest.fixture(scope="module")
def whole(model):
    return Setup(model, optimizer=SGD)


def test_mask_losses_are_means_over_all_masks_of_the_batch(whole, model, batch):
    metrics, grads, _ = whole.run(batch)
    assert metrics["mask_masks"] == batch["mask_valid"].sum()
    text = (metrics["task_loss"].sum() / metrics["task_tokens"].sum()).item()
    masks = (metrics["mask_pixels"] + metrics["mask_dice"]) / metrics["mask_masks"]
    np.testing.assert_allclose(metrics["loss"], text + masks, rtol=1e-5)
    assert all(np.abs(g).max() > 0 for name, g in grads.items() if name.startswith("img/"))
    learning = [np.abs(g).max() > 0 for name, g in grads.items() if "k_proj/bias" not in name]
    assert all(learning)


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 4), (8, 2)])
def test_accumulation_and_sharding_change_nothing_with_masks(
    model, whole, batch, monkeypatch, devices, accumulation
):
    """All masks lie in half of the rows: a mean over micro-batches would be another number."""
    monkeypatch.setattr(mesh_lib, "MIN_SHARDED_SIZE", 256)
    expected = whole.run(batch)
    found = Setup(model, devices, optimizer=SGD, accumulation=accumulation).run(batch)
    for metrics in (expected[0], found[0]):
        assert metrics["mask_dice"] > 1
    grads = [
        {n: g for n, g in run[1].items() if "k_proj/bias" not in n} for run in (expected, found)
    ]
    assert_same((expected[0], grads[0], expected[2]), (found[0], grads[1], found[2]))


def test_a_batch_without_masks_is_free(whole, model, batch):
    """Not a bit of text or image learns otherwise, and the decoder stays as it is."""
    none = with_masks(batch, [])
    none["masks"] = batch["masks"]  # what is not valid may hold anything
    metrics, grads, state = whole.run(none)
    plain = Setup(model, optimizer=SGD, mask_loss=MaskLoss(weight=7.0)).run(none)
    assert metrics["mask_masks"] == 0 and metrics["loss"] == plain[0]["loss"]
    for name, grad in grads.items():
        if name.startswith("masks/"):
            assert not grad.any(), name
            np.testing.assert_array_equal(state.trainable[name], whole.params[name])
        np.testing.assert_array_equal(grad, plain[1][name], err_msg=name)


def test_a_batch_without_masks_teaches_what_a_model_without_masks_learns(whole, model, batch):
    """Loss, gradients and new parameters to the last bit: having a mask decoder costs nothing."""
    boxes_only = PaliGemma(dataclasses.replace(model.config, masks=None))
    setup = Setup(boxes_only, optimizer=SGD)
    shared = {n: v for n, v in whole.params.items() if not n.startswith("masks/")}
    setup.params = shared
    metrics, grads, state = whole.run(with_masks(batch, []))
    plain = {k: v for k, v in batch.items() if k not in MASK_KEYS}
    expected, expected_grads, expected_state = setup.run(plain)
    assert metrics["loss"] == expected["loss"]
    assert set(expected_grads) == set(shared)
    for name in shared:
        np.testing.assert_array_equal(grads[name], expected_grads[name], err_msg=name)
        new = expected_state.trainable[name]
        np.testing.assert_array_equal(state.trainable[name], new, err_msg=name)


def test_the_state_read_is_that_of_the_closing_token(whole, model, batch):
    """Another token behind the `</seg>` changes no mask; another one at it does."""
    from rg_jax.training.step import row_losses

    run = jax.jit(lambda p, b: row_losses(model, p, b, 64)["dice"])
    params = unflatten(whole.params)
    dice = run(params, batch)
    row = int(np.flatnonzero(batch["mask_input"].all(1) & batch["mask_valid"].all(1))[0])
    at = int(batch["mask_at"][row, 1])
    for column, changes in ((at + 1, False), (at, True)):
        other = {**batch, "text": batch["text"].copy()}
        other["text"][row, column] = 3 + (other["text"][row, column] + 5) % 80
        other["mask_ar"] = np.tile(np.arange(TEXT) > 1, (ROWS, 1)).astype(np.int32)
        same = {**batch, "mask_ar": other["mask_ar"]}
        assert bool((run(params, other)[row] != run(params, same)[row]).item()) == changes
    assert dice.shape == (ROWS,)


def test_generated_masks_are_those_of_the_forward_pass(whole, model):
    """Decoded in one go after the loop, from states kept inside it."""
    params = unflatten(whole.params)
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    prompt = rng.integers(3, 90, (3, 4)).astype(np.int32)
    out = jax.jit(
        lambda p: generate(model, p, image, prompt, max_new_tokens=6, eos_id=1, return_hidden=True)
    )(params)
    tokens = np.asarray(out["tokens"])
    close = int(tokens[0, 1])  # take any generated token for `</seg>`
    masks = np.asarray(masks_of_generated(model, params, out, close, 2, SIZE))
    assert masks.shape == (3, 2, SIZE, SIZE)
    text = np.concatenate([prompt, tokens], axis=1)
    ar = (np.arange(10) >= 4).astype(np.int32)[None].repeat(3, 0)
    forward = jax.jit(functools.partial(apply, model))(params, image, text, ar)
    decode = jax.jit(functools.partial(apply, model, method="decode_masks"))
    features = forward["image_features"]
    for row in range(3):
        places = np.flatnonzero(tokens[row] == close)[:2]
        for slot in range(2):
            if slot >= len(places):
                assert not masks[row, slot].any()
                continue
            state = forward["hidden"][row, features.shape[1] + 4 + places[slot]]
            logits = decode(params, features[row : row + 1], state[None, None])
            expected = np.asarray(resize_logits(logits, (SIZE, SIZE)))[0, 0]
            sure = np.abs(expected) > 1e-3
            np.testing.assert_array_equal(masks[row, slot][sure], (expected > 0)[sure])
    assert jnp.asarray(masks).dtype == bool
    # More slots than tokens, as with a short `max_new_tokens`.
    more = np.asarray(masks_of_generated(model, params, out, close, 8, SIZE))
    np.testing.assert_array_equal(more[:, :2], masks)
    assert more.shape[1] == 8 and not more[:, tokens.shape[1] :].any()
