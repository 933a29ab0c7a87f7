"""Shapes, masks, recomputation and precision of the whole model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.config import shape_table
from rg_jax.model.gemma2 import (
    DecoderBlock,
    RMSNorm,
    positions_of,
    prefix_lm_mask,
    rotary_code,
    rotate,
)
from rg_jax.model.paligemma import (
    PaliGemma,
    apply,
    cast_for_inference,
    init_params,
    param_shapes,
)
from rg_jax.model.siglip import EncoderBlock, LayerNorm, patches_of
from rg_jax.weights.npz import flatten


def test_prefix_mask_drawn_by_hand():
    valid = np.array([[1, 1, 0, 1, 1, 1, 0]], bool)
    mask_ar = np.array([[0, 0, 0, 1, 0, 1, 1]], np.int32)
    drawn = """
        1 1 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 0 1 1 0 0
        1 1 0 1 1 0 0
        1 1 0 1 1 1 0
        1 1 0 1 1 1 0
    """
    expected = [[int(x) for x in row.split()] for row in drawn.strip().splitlines()]
    mask = prefix_lm_mask(jnp.asarray(valid), jnp.asarray(mask_ar))
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))
    np.testing.assert_array_equal(positions_of(jnp.asarray(valid))[0], [0, 1, 1, 2, 3, 4, 4])


def test_rotary_code_turns_halves_and_sees_only_distances():
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8)).astype(np.float32)
    y = np.random.default_rng(1).standard_normal((1, 1, 1, 8)).astype(np.float32)

    def at(vector, position):
        code = rotary_code(jnp.full((1, 1), position, jnp.int32), 8, 10_000.0)
        return np.asarray(rotate(jnp.asarray(vector), code))[0, 0, 0]

    # Pair (i, i + 4) turns by position * 10000^(-i/4).
    turned = at(x, 3)
    for i in range(4):
        angle = 3 * 10_000 ** (-i / 4)
        a, b = x[0, 0, 0, i], x[0, 0, 0, i + 4]
        assert turned[i] == pytest.approx(a * np.cos(angle) - b * np.sin(angle), abs=1e-5)
        assert turned[i + 4] == pytest.approx(b * np.cos(angle) + a * np.sin(angle), abs=1e-5)
    assert at(x, 5) @ at(y, 2) == pytest.approx(at(x, 13) @ at(y, 10), abs=1e-4)


@pytest.mark.parametrize(
    "kv_heads, query_scale, factor",
    [(1, "rsqrt_head_dim", 8), (2, "rsqrt_emb_per_head", 24 / 4), (4, "rsqrt_head_dim", 8)],
)
def test_every_number_of_key_heads_equals_plain_attention(
    make_small, small_config, kv_heads, query_scale, factor
):
    """K = 1, grouped, and K = N (one fused array) against attention with repeated keys."""
    config = small_config.replace(
        llm={"num_kv_heads": kv_heads, "depth": 1, "query_scale": query_scale}
    )
    small = make_small(config)
    names = {name for name in flatten(small.params) if "attn/" in name}
    fused = {"llm/layers/attn/qkv_einsum/w"}
    apart = {"llm/layers/attn/q_einsum/w", "llm/layers/attn/kv_einsum/w"}
    assert names - {"llm/layers/attn/attn_vec_einsum/w"} == (fused if kv_heads == 4 else apart)

    layer = jax.tree.map(lambda x: np.asarray(x[0]), small.params["llm"]["layers"])
    x = np.random.default_rng(3).standard_normal((1, 5, 24)).astype(np.float32)
    positions = jnp.arange(5)[None]
    code = rotary_code(positions, 8, 10_000.0)
    mask = np.tril(np.ones((1, 5, 5), bool))
    block = DecoderBlock(config.llm, False)
    ours, _ = jax.jit(lambda x: block.apply({"params": layer}, x, code, mask))(x)

    attn = layer["attn"]
    if kv_heads == 4:
        wq, wk, wv = attn["qkv_einsum"]["w"]
    else:
        wq, (wk, wv) = attn["q_einsum"]["w"], attn["kv_einsum"]["w"]
    wk, wv = (np.repeat(w, 4 // kv_heads, axis=0) for w in (wk, wv))

    def norm(name, y):
        return y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-6) * (1 + layer[name]["scale"])

    def gelu(y):
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    h = norm("pre_attention_norm", x)
    q, k, v = (np.einsum("btd,ndh->btnh", h, w) for w in (wq, wk, wv))
    q, k = (np.asarray(rotate(jnp.asarray(y), code)) for y in (q, k))
    scores = 50 * np.tanh(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(factor) / 50)
    scores = np.exp(np.where(mask[:, None], scores, -np.inf))
    mixed = np.einsum("bnts,bsnh->btnh", scores / scores.sum(-1, keepdims=True), v)
    y = x + norm(
        "post_attention_norm", np.einsum("btnh,nhd->btd", mixed, attn["attn_vec_einsum"]["w"])
    )
    gate, up = layer["mlp"]["gating_einsum"]
    h = norm("pre_ffw_norm", y)
    y = y + norm("post_ffw_norm", (gelu(h @ gate) * (h @ up)) @ layer["mlp"]["linear"])
    np.testing.assert_allclose(ours, y, rtol=0, atol=2e-5)


def test_image_patches_are_read_in_reading_order(small):
    """Changing the top right patch changes the embedding of patch 2 of a 3 × 3 grid, as a conv."""
    kernel = small.params["img"]["embedding"]["kernel"]
    expected = jax.lax.conv_general_dilated(
        small.image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(2, 9, 16)
    ours = patches_of(jnp.asarray(small.image), 4) @ kernel.reshape(-1, 16)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_encoder_attention_sees_every_patch_and_cudnn_needs_bfloat16(small, small_config):
    x = np.random.default_rng(0).standard_normal((1, 9, 16)).astype(np.float32)
    change = np.zeros_like(x)
    change[:, 8, ::2] = 1
    layer = jax.tree.map(lambda p: p[0], small.params["img"]["Transformer"]["encoderblock"])
    block = EncoderBlock(small_config.img, False)
    run = jax.jit(lambda x: block.apply({"params": layer}, x)[0])
    base = run(x)
    moved = run(x + change)
    assert (np.abs(base - moved).max(-1) > 0).all()
    with pytest.raises(ValueError, match="vision_attention"):
        small_config.replace(vision_attention="cudnn")


def test_target_token_leaves_everything_before_it_bit_identical(small):
    before = small.hidden()
    for t in range(5, 9):
        text = small.text.copy()
        text[:, t] = (text[:, t] + 7) % 50
        after = small.hidden(text=text)
        at = small.tokens + t
        np.testing.assert_array_equal(after[:, :at], before[:, :at])
        assert (after[:, at] != before[:, at]).any(-1).all()


def test_prefix_is_seen_from_everywhere(small):
    before = small.hidden()
    text = small.text.copy()
    text[:, 4] = (text[:, 4] + 7) % 50
    assert (small.hidden(text=text) != before).any(-1).all()


def test_padding_changes_nothing(small):
    mask = np.ones((2, 9), bool)
    mask[0, 7:] = False
    mask[1, 2:4] = False  # a hole in the prompt
    before = small.hidden(mask_input=mask)
    text = np.where(mask, small.text, 1).astype(np.int32)
    after = small.hidden(text=text, mask_input=mask)
    full = np.concatenate([np.ones((2, small.tokens), bool), mask], axis=1)
    np.testing.assert_array_equal(after[full], before[full])
    assert np.isfinite(after).all()

    # Row 1 with the hole is the row without these two tokens.
    out = small.hidden(text=small.text[:, mask[1]], mask_ar=small.mask_ar[:, mask[1]])
    np.testing.assert_allclose(out[1], before[1][full[1]], atol=1e-5)


def test_remat_and_unrolling_change_nothing(small, small_config):
    def loss_and_grads(**changes):
        model = PaliGemma(small_config.replace(**changes))

        def loss(params):
            out = apply(model, params, small.image, small.text, small.mask_ar)
            return jnp.square(out["hidden"]).sum() + jnp.square(out["image_features"]).mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(small.params)
        return value, flatten(grads)

    plain, plain_grads = loss_and_grads()
    largest = max(np.abs(grad).max() for grad in plain_grads.values())
    for remat, unroll in [("full", 1), ("dots_no_batch", 2), ("none", 64)]:
        value, grads = loss_and_grads(remat=remat, unroll=unroll)
        np.testing.assert_allclose(value, plain, rtol=1e-6)
        for name, expected in plain_grads.items():
            atol = 1e-5 * np.abs(expected).max() + 1e-6 * largest
            np.testing.assert_allclose(grads[name], expected, rtol=0, atol=atol)


@pytest.mark.parametrize("kv_heads", [2, 4])  # 4: queries, keys and values in one weight
def test_the_text_alone_is_the_text_of_all(make_small, small_config, kv_heads):
    """Where layers stand side by side the last one makes less; values and gradients are equal."""
    found = {}
    config = small_config.replace(llm={"num_kv_heads": kv_heads})
    small = make_small(config)
    for unroll, text_only in [(1, False), (64, True)]:
        model = PaliGemma(config.replace(unroll=unroll))

        def loss(params, model=model, text_only=text_only):
            given = (small.image, small.text, small.mask_ar)
            out = apply(model, params, *given, text_only=text_only)
            text = out["hidden"] if text_only else out["hidden"][:, small.tokens :]
            return jnp.sin(text).sum(), text

        (_, text), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(small.params)
        assert text.shape[1] == small.text.shape[1]
        found[unroll, text_only] = text, flatten(grads)
    text, grads = found.pop((1, False))
    largest = max(np.abs(grad).max() for grad in grads.values())
    for other, other_grads in found.values():
        np.testing.assert_allclose(other, text, rtol=0, atol=1e-5)
        for name, expected in grads.items():
            atol = 1e-5 * np.abs(expected).max() + 1e-6 * largest
            np.testing.assert_allclose(other_grads[name], expected, rtol=0, atol=atol)


def test_norms_compute_in_float32():
    """Values around 256 with a spread of 1: bfloat16 could not even hold their squares apart."""
    x = (256 + np.arange(64) % 3).astype(np.float32)[None]
    for norm in (RMSNorm(1e-6), LayerNorm()):
        params = norm.init(jax.random.key(0), jnp.asarray(x))
        exact = norm.apply(params, jnp.asarray(x))
        half = norm.apply(params, jnp.asarray(x, jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        # 256 and 258 are exact in bfloat16, 257 is not: compare with what went in.
        wide = norm.apply(params, jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(half, wide.astype(jnp.bfloat16))
        assert exact.dtype == jnp.float32


def test_bfloat16_stays_close_and_keeps_logits_float32(small, small_config):
    model = PaliGemma(small_config.replace(compute_dtype="bfloat16"))
    forward = jax.jit(partial(apply, model))
    out = forward(small.params, small.image, small.text, small.mask_ar)
    assert out["hidden"].dtype == jnp.bfloat16
    logits = apply(model, small.params, out["hidden"], method="logits")
    assert logits.dtype == jnp.float32
    exact = small.hidden()
    error = np.abs(out["hidden"].astype(jnp.float32) - exact)
    assert error.max() < 0.15 and error.mean() < 0.02
    # Weights cast beforehand give bit for bit the same.
    cast = cast_for_inference(small.params, model.config)
    assert cast["llm"]["final_norm"]["scale"].dtype == jnp.float32
    assert cast["llm"]["layers"]["mlp"]["linear"].dtype == jnp.bfloat16
    again = forward(cast, small.image, small.text, small.mask_ar)
    np.testing.assert_array_equal(again["hidden"], out["hidden"])


def test_masked_rows_and_final_cap(small, small_config):
    hidden = jnp.asarray(small.hidden())
    capped = small_config.replace(valid_vocab=45, llm={"final_softcap": 0.5})
    logits = np.asarray(apply(PaliGemma(capped), small.params, hidden, method="logits"))
    plain = np.asarray(apply(small.model, small.params, hidden, method="logits"))
    assert (logits[..., 45:] < -1e30).all() and logits.shape == plain.shape
    np.testing.assert_allclose(logits[..., :45], 0.5 * np.tanh(plain[..., :45] / 0.5), atol=1e-6)


def test_wrong_image_size_and_too_long_text_are_refused(small, small_config):
    with pytest.raises(ValueError, match=r"\(12, 12, 3\), not \(16, 16, 3\)"):
        apply(small.model, small.params, np.zeros((1, 16, 16, 3), np.float32), method="embed_image")
    short = PaliGemma(small_config.replace(llm={"sliding_window": 17}))
    with pytest.raises(ValueError, match="18 tokens is longer than the sliding window of 17"):
        jax.eval_shape(partial(apply, short), small.params, small.image, small.text, small.mask_ar)
    free = PaliGemma(small_config.replace(llm={"sliding_window": None}))
    jax.eval_shape(partial(apply, free), small.params, small.image, small.text, small.mask_ar)


def test_fresh_parameters_are_good_to_start_from(small_config):
    """Unit-size image and text tokens and hidden states, logits near those of a fair guess."""
    config = small_config.replace(
        img={"width": 64, "mlp_dim": 128}, llm={"width": 96, "mlp_dim": 192, "vocab_size": 500}
    )
    model = PaliGemma(config)
    params = jax.jit(lambda rng: init_params(config, rng))(jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    text = np.random.default_rng(0).integers(0, 500, (2, 8)).astype(np.int32)

    @jax.jit
    def run(params):
        tokens, _ = apply(model, params, image, method="embed_image")
        hidden = apply(model, params, image, text, np.ones_like(text))["hidden"]
        words = apply(model, params, text, method="embed_text")
        logits = apply(model, params, hidden, method="logits")
        return {"image": tokens, "text": words, "hidden": hidden}, logits

    sizes, logits = run(params)
    for name, array in sizes.items():
        assert 0.7 < np.sqrt(np.square(array).mean()) < 1.4, name
    assert 0.7 < np.sqrt(np.square(logits).mean()) < 1.4
    layers = params["llm"]["layers"]["attn"]["q_einsum"]["w"]
    assert not np.allclose(layers[0], layers[1])


def test_parameters_are_born_sharded(small_config):
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))

    def place(leaf):
        axis = next((i for i, n in enumerate(leaf.shape) if n % 2 == 0), None)
        spec = [None] * len(leaf.shape)
        if axis is not None:
            spec[axis] = "data"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    shardings = jax.tree.map(place, param_shapes(small_config))
    make = jax.jit(lambda rng: init_params(small_config, rng), out_shardings=shardings)
    params = make(jax.random.key(0))
    table = params["llm"]["embedder"]["input_embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(25, 24)}
    assert np.asarray(table).std() == pytest.approx(24**-0.5, rel=0.1)
    tree = jax.tree_util.tree_structure
    assert tree(params) == tree(param_shapes(small_config))


def test_shapes_follow_from_the_dimensions(small_config):
    for config in (
        small_config,
        small_config.replace(llm={"num_kv_heads": 4, "post_norms": False}),
    ):
        shapes = {name: leaf.shape for name, leaf in flatten(param_shapes(config)).items()}
        assert shapes == shape_table(config)
