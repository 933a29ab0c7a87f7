"""Factors beside the weights do what the merged weights do, and nothing before the first step."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model import lora
from rg_jax.model.config import LoraConfig, ModelConfig, count_params, from_variant
from rg_jax.model.losses import blockwise_token_losses
from rg_jax.model.paligemma import apply, cast_for_inference, init_params, param_shapes
from rg_jax.training.state import flatten, unflatten
from rg_jax.training.step import row_losses

EVERYTHING = (
    "img/embedding/kernel",
    "img/Transformer/.*/kernel",
    "img/head/kernel",
    "llm/layers/(attn|mlp)/.*",
)
ADAPTED = LoraConfig(rank=3, alpha=5.0, include=EVERYTHING, new_rows=4)


@pytest.fixture(scope="module", params=["grouped", "fused"])
def adapted(request, small_config, make_small):
    """A small model whose every matrix and last rows are adapted, all its numbers random."""
    heads = {"num_kv_heads": 4} if request.param == "fused" else {}
    config = small_config.replace(lora=ADAPTED, valid_vocab=46, llm=heads)
    small = make_small(config)
    small._forward = jax.jit(partial(apply, small.model))
    small.params[lora.ROOT] = jax.tree.map(lambda x: 0.3 * x, small.params[lora.ROOT])
    return small


def batch_of(small):
    """A training batch whose targets hold old tokens and all of the new ones."""
    text = np.array(small.text)
    text[:, -4:] = [[42, 43, 7, 44], [45, 5, 42, 20]]
    batch = {
        "image": small.image,
        "text": text,
        "mask_ar": small.mask_ar,
        "mask_loss": small.mask_ar,
        "mask_input": np.ones(text.shape, bool),
    }
    return jax.tree.map(jnp.asarray, batch)


def loss_of(small, params, block_size=16):
    return row_losses(small.model, params, batch_of(small), block_size)["text"].sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_the_start_the_model_is_the_old_one_to_the_bit(small_config, make_small, dtype):
    plain = small_config.replace(compute_dtype=dtype)
    small = make_small(plain)
    config = plain.replace(lora=ADAPTED)
    factors = jax.jit(lora.init_factors, static_argnums=0)(config, jax.random.key(3))
    flat = flatten(factors)
    assert {n.rpartition("/")[2] for n in flat} == {"a", "b", "rows"}
    for name, value in flat.items():
        assert bool(value.any()) == name.endswith("/a"), name
    small._forward = jax.jit(partial(apply, small.model))
    expected = small.hidden()
    small.model = small.model.clone(config=config)
    small._forward = jax.jit(partial(apply, small.model))
    small.params = {**small.params, lora.ROOT: factors}
    np.testing.assert_array_equal(small.hidden(), expected)


def test_fresh_factors_have_the_scale_of_their_inputs():
    config = from_variant("tiny", lora=LoraConfig(rank=64, include=EVERYTHING))
    made = flatten(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    factors = {n.removeprefix("lora/"): x for n, x in made.items() if n.startswith("lora/")}
    assert {f"lora/{n}" for n in factors} == set(lora.factor_shapes(config))
    for name, value in factors.items():
        if name.endswith("Dense_1/kernel/a"):  # 256 inputs
            assert abs(float(value.std()) * 16 - 1) < 0.05
        if name.endswith("attn_vec_einsum/w/a"):  # 4 heads of 32
            assert abs(float(value.std()) * 128**0.5 - 1) < 0.05


@pytest.fixture(scope="module")
def merge():
    return jax.jit(lora.merge, static_argnums=1)


def test_merged_weights_give_the_same_forward_pass_loss_and_logits(adapted, merge):
    merged = merge(adapted.params, adapted.config)
    assert lora.ROOT not in merged
    assert jax.tree.map(jnp.shape, merged) == {
        k: jax.tree.map(jnp.shape, v) for k, v in adapted.params.items() if k != lora.ROOT
    }
    hidden = adapted.hidden()
    factors, base = adapted.params, {**adapted.params}
    del base[lora.ROOT]
    found = []
    for params in (merged, base):
        adapted.params = params
        found.append(adapted.hidden())
    adapted.params = factors
    np.testing.assert_allclose(found[0], hidden, atol=1e-5, rtol=1e-5)
    assert np.abs(found[1] - hidden).max() > 0.1
    logits = jax.jit(partial(apply, adapted.model, method="logits"))
    np.testing.assert_allclose(logits(merged, hidden), logits(factors, hidden), atol=1e-5)
    assert np.abs(logits(base, hidden) - logits(factors, hidden)).max() > 0.1
    loss = jax.jit(partial(loss_of, adapted))
    np.testing.assert_allclose(loss(merged), loss(factors), rtol=1e-5)
    # What generation works with is the merged tree.
    kept = jax.jit(cast_for_inference, static_argnums=1)(factors, adapted.config)
    jax.tree.map(np.testing.assert_array_equal, kept, merged)


def test_gradients_are_those_of_the_merged_weights(adapted):
    base = {k: v for k, v in adapted.params.items() if k != lora.ROOT}

    def beside(factors):
        return loss_of(adapted, {**base, lora.ROOT: factors})

    def inside(factors):
        return loss_of(adapted, lora.merge({**base, lora.ROOT: factors}, adapted.config))

    factors = adapted.params[lora.ROOT]
    ours, theirs = (flatten(jax.jit(jax.grad(f))(factors)) for f in (beside, inside))
    assert ours.keys() == {n.removeprefix("lora/") for n in lora.factor_shapes(adapted.config)}
    for name, grad in theirs.items():
        largest = np.abs(grad).max()
        # A change of the keys' kernels is seen, that of their bias would not be.
        assert largest > 1e-6, name
        np.testing.assert_allclose(ours[name] / largest, grad / largest, atol=1e-4, err_msg=name)


def test_stacked_and_single_weights_are_merged_in_float32(small_config, merge):
    config = small_config.replace(lora=ADAPTED)
    rng = np.random.default_rng(0)
    shapes = flatten(param_shapes(config))
    params = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in shapes.items()}
    bf16 = {n: v if n.startswith("lora/") else v.astype(jnp.bfloat16) for n, v in params.items()}
    merged = flatten(merge(unflatten(bf16), config))
    name = "llm/layers/attn/kv_einsum/w"
    a, b = (params[f"lora/{name}/{part}"].astype(np.float64) for part in "ab")
    change = np.einsum("lcdr,lcrkh->lckdh", a, b) * 5 / 3
    expected = (bf16[name].astype(np.float64) + change).astype(np.float32).astype(jnp.bfloat16)
    assert merged[name].dtype == jnp.bfloat16
    # A product summed in another order may round the other way here and there.
    assert (np.asarray(merged[name]) == expected).mean() > 0.99
    name = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel"
    a, b = (params[f"lora/{name}/{part}"] for part in "ab")
    alone = merge(unflatten(params), config)
    change = np.einsum("lhdr,lrw->lhdw", a, b) * 5 / 3
    np.testing.assert_allclose(flatten(alone)[name], params[name] + change, atol=1e-5)
    # One weight with its own factors alone, as a file is converted leaf by leaf.
    for weight in (name, lora.TABLE):
        part = {n: v for n, v in params.items() if n == weight or n.startswith(f"lora/{weight}/")}
        found = flatten(lora.merge(unflatten(part), config))
        assert list(found) == [weight] and len(part) > 1
        np.testing.assert_allclose(found[weight], flatten(alone)[weight], atol=1e-6)
    plain = {"img": {"head": {"kernel": jnp.ones(2)}}}
    assert lora.merge(plain, small_config) == plain


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("block", [7, 64])
def test_rows_that_learn_stand_in_for_the_last_of_a_table(softcap, block):
    rng = np.random.default_rng(0)
    hidden, table, last = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 8), (40, 8), (3, 8))
    )
    targets = jnp.array([0, 33, 34, 36, 35, 12])
    given = {"block_size": block, "valid_vocab": 37, "softcap": softcap}

    def beside(hidden, last):
        return blockwise_token_losses(hidden, table, targets, last_rows=last, **given)

    def inside(hidden, last):
        return blockwise_token_losses(hidden, table.at[34:37].set(last), targets, **given)

    np.testing.assert_allclose(beside(hidden, last), inside(hidden, last), atol=1e-5)
    ours, theirs = (
        jax.grad(lambda h, t, f=f: (f(h, t) * jnp.arange(6)).sum(), (0, 1))(hidden, last)
        for f in (beside, inside)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    outside = blockwise_token_losses(hidden, table, targets + 1, last_rows=last, **given)
    assert np.isinf(outside).tolist() == [False, False, False, True, False, False]
    with pytest.raises(ValueError, match="last_rows 37"):
        blockwise_token_losses(hidden, table, targets, last_rows=table[:37], **given)


def test_under_five_percent_of_the_large_model_is_trained():
    config = from_variant("3b", lora=LoraConfig(rank=16, include=EVERYTHING, new_rows=5))
    share = sum(np.prod(s) for s in lora.factor_shapes(config).values()) / count_params(config)
    assert 0.005 < share < 0.05


@pytest.mark.parametrize(
    "fields, culprits",
    [
        ({"include": ("llm/layers/attn/.*", "llm/layer/mlp/.*")}, ["llm/layer/mlp/.*", "nothing"]),
        ({"include": ("llm/layers/.*",)}, ["llm/layers/.*", "scale", "no matrix"]),
        ({"include": ()}, ["include"]),
        ({"rank": 0}, ["lora.rank", "0"]),
        ({"alpha": -1.0}, ["lora.alpha", "-1"]),
    ],
)
def test_a_wrong_field_is_named(small_config, fields, culprits):
    with pytest.raises(ValueError) as error:
        param_shapes(small_config.replace(lora=LoraConfig(**fields)))
    message = str(error.value).replace("matches no parameter", "matches nothing")
    assert all(culprit in message for culprit in culprits), message


def test_the_config_survives_being_written(small_config):
    config = small_config.replace(lora=ADAPTED)
    written = config.to_dict()
    written["lora"]["include"] = list(written["lora"]["include"])  # as JSON has it
    assert ModelConfig.from_dict(written) == config
    assert dataclasses.asdict(config)["lora"]["rank"] == 3
