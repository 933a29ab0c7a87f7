"""The analytic counts against the matrix products in the traced gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.config import LoraConfig, MaskDecoderConfig, from_variant
from rg_jax.model.flops import LORA_PARTS, PARTS, parts_of, train_step_flops
from rg_jax.model.losses import blockwise_cross_entropy
from rg_jax.model.mask_decoder import MaskDecoder
from rg_jax.model.paligemma import PaliGemma, apply, param_shapes
from rg_jax.weights.npz import flatten

core = jax.extend.core
BATCH, TEXT, TARGET = 2, 7, 3


def products(jaxpr) -> int:
    """FLOPs of all matrix products in a traced function, loops counted as often as they turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        assert eqn.primitive.name != "while", "a loop of unknown length"
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        leaves = jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        )
        for value in leaves:
            if isinstance(value, core.ClosedJaxpr):
                total += times * products(value.jaxpr)
            elif isinstance(value, core.Jaxpr):
                total += times * products(value)
    return total


def traced_flops(config, trained):
    model, shapes = PaliGemma(config), param_shapes(config)
    flat = flatten(shapes)
    mine = {name: leaf for name, leaf in flat.items() if parts_of([name]) <= set(trained)}
    rest = {name: leaf for name, leaf in flat.items() if name not in mine}
    order, treedef = list(flat), jax.tree_util.tree_structure(shapes)

    def loss(mine, rest, image, text):
        both = mine | rest
        params = jax.tree_util.tree_unflatten(treedef, [both[name] for name in order])
        out = apply(model, params, image, text, jnp.ones_like(text), text_only=True)
        hidden = out["hidden"]
        table = params["llm"]["embedder"]["input_embedding"]
        targets = text[:, -TARGET:]
        return blockwise_cross_entropy(
            hidden[:, -TARGET:], table, targets, jnp.ones(targets.shape), 25, config.valid_vocab
        )[0]

    side = config.img.image_size
    image = jax.ShapeDtypeStruct((BATCH, side, side, 3), jnp.float32)
    text = jax.ShapeDtypeStruct((BATCH, TEXT), jnp.int32)
    function = jax.grad(loss) if trained else loss
    # Through a jit and its dead-code elimination, as in a real step.
    jaxpr = jax.make_jaxpr(function)(mine, rest, image, text)
    return products(jaxpr.jaxpr) / BATCH


@pytest.mark.parametrize("unroll", [1, 64])
@pytest.mark.parametrize("remat", ["none", "full", "dots", "dots_no_batch"])
@pytest.mark.parametrize("trained", [PARTS, ("head", "embedder", "layers"), ("layers",)])
def test_matches_the_traced_step(small_config, remat, trained, unroll):
    config = small_config.replace(remat=remat, unroll=unroll, valid_vocab=50)
    ours = train_step_flops(config, TEXT, TARGET, trained)
    assert ours.hardware == pytest.approx(traced_flops(config, trained), rel=1e-9)
    assert ours.hardware >= ours.model


@pytest.mark.parametrize("remat", ["none", "dots_no_batch"])
@pytest.mark.parametrize(
    "where, unroll", [(LORA_PARTS, 1), (LORA_PARTS, 64), (("lora_layers",), 1)]
)
def test_factors_match_the_traced_step(small_config, where, remat, unroll):
    """Gradients pass through the weights to the factors, and none is made of a weight."""
    include = ["llm/layers/(attn|mlp)/.*"]
    if "lora_img" in where:
        include += ["img/Transformer/.*/kernel", "img/head/kernel"]
    lora = LoraConfig(rank=3, include=include)
    config = small_config.replace(valid_vocab=50, lora=lora, remat=remat, unroll=unroll)
    ours = train_step_flops(config, TEXT, TARGET, where)
    assert ours.hardware == pytest.approx(traced_flops(config, where), rel=1e-9)
    everything = train_step_flops(config, TEXT, TARGET, PARTS)
    assert ours.model < 0.9 * everything.model


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_forward_alone(small_config, kv_heads):
    config = small_config.replace(llm={"num_kv_heads": kv_heads, "post_norms": False})
    looped = train_step_flops(config, TEXT, TARGET, ())
    assert looped.hardware == traced_flops(config, ()) > looped.model
    config = config.replace(unroll=64)
    ours = train_step_flops(config, TEXT, TARGET, ())
    assert ours.model == looped.model
    assert ours.model == ours.hardware == traced_flops(config, ())


@pytest.mark.parametrize(
    "trained, over",
    [
        (PARTS, (0, 1, 2)),
        (("head", "layers", "embedder", "masks"), (0, 1)),
        (("masks",), (0,)),
    ],
)
@pytest.mark.parametrize("kind", ["sam", "published"])
def test_mask_decoder_matches_its_trace(small_config, kind, trained, over):
    """Forward and backward; without a gradient for inputs behind which nothing is trained."""
    masks = MaskDecoderConfig(kind=kind, width=16, num_heads=2, mlp_dim=24, mask_tokens=3)
    config = small_config.replace(masks=masks)
    slots, n = 5, config.img.num_tokens
    decoder = MaskDecoder(masks)
    features = jax.ShapeDtypeStruct((1, n, config.img.width), jnp.float32)
    prompts = jax.ShapeDtypeStruct((1, slots, config.llm.width), jnp.float32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), features, prompts)

    def loss(params, prompts, features):
        return decoder.apply(params, features, prompts).sum()

    traced = products(jax.make_jaxpr(jax.grad(loss, over))(params, prompts, features).jaxpr)
    ours = train_step_flops(config, TEXT, TARGET, trained, masks=slots).model
    ours -= train_step_flops(config, TEXT, TARGET, trained).model
    assert ours == pytest.approx(traced, rel=1e-9)


def test_a_frozen_model_gets_no_gradient_from_its_masks(small_config):
    config = small_config.replace(masks=MaskDecoderConfig(width=16, num_heads=2, mlp_dim=24))
    alone = train_step_flops(config, TEXT, TARGET, ("masks",), masks=3)
    forward = train_step_flops(config, TEXT, TARGET, (), masks=3)
    decoder = forward.model - train_step_flops(config, TEXT, TARGET, ()).model
    assert decoder < alone.model - forward.model < 2 * decoder


def test_3b_is_about_six_teraflop():
    """224 px, 200 text tokens, frozen encoder, no remat."""
    flops = train_step_flops(from_variant("3b"), 200, 100, ("head", "embedder", "layers"))
    assert flops.model == pytest.approx(6e12, rel=0.1)


def test_parts():
    names = ["img/head/bias", "img/pos_embedding", "llm/final_norm/scale"]
    assert parts_of(names) == {"head", "img", "layers"}
    assert parts_of(flatten(param_shapes(from_variant("3b")))) == set(PARTS) - {"masks"}
    with_masks = from_variant("3b", masks=MaskDecoderConfig())
    assert parts_of(flatten(param_shapes(with_masks))) == set(PARTS)
    with pytest.raises(ValueError, match="'llm/extra'"):
        parts_of(["llm/extra"])
    with pytest.raises(ValueError, match="Unknown part"):
        train_step_flops(from_variant("3b"), 1, 1, ("vision",))


def test_xla_agrees_on_the_forward_pass():
    """XLA also counts what is no matrix product, so it may only be a little higher."""
    config = from_variant("tiny", vocab_size=512, img={"depth": 1}, llm={"depth": 1})
    model = PaliGemma(config)
    text = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    image = jax.ShapeDtypeStruct((1, 112, 112, 3), jnp.float32)

    def forward(params, image, text):
        hidden = apply(model, params, image, text, text, text_only=True)["hidden"]
        return apply(model, params, hidden, method="logits")

    compiled = jax.jit(forward).lower(param_shapes(config), image, text).compile()
    counted = compiled.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted
    ours = train_step_flops(config, 64, 64, ()).model
    assert ours <= counted["flops"] < 1.15 * ours, np.round(counted["flops"] / ours, 3)
