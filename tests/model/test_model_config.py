"""Sizes, names and shapes of the known models, and what a config refuses."""

import pytest

from rg_jax.model.config import ModelConfig, count_params, from_variant
from rg_jax.model.paligemma import param_shapes
from rg_jax.weights.npz import flatten

ENCODER = "img/Transformer/encoderblock"
ATTENTION = f"{ENCODER}/MultiHeadDotProductAttention_0"
TABLE_3B = {
    "img/embedding/kernel": (14, 14, 3, 1152),
    "img/embedding/bias": (1152,),
    "img/pos_embedding": (1, 256, 1152),
    f"{ENCODER}/LayerNorm_0/scale": (27, 1152),
    f"{ENCODER}/LayerNorm_0/bias": (27, 1152),
    f"{ENCODER}/LayerNorm_1/scale": (27, 1152),
    f"{ENCODER}/LayerNorm_1/bias": (27, 1152),
    f"{ENCODER}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
    f"{ENCODER}/MlpBlock_0/Dense_0/bias": (27, 4304),
    f"{ENCODER}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
    f"{ENCODER}/MlpBlock_0/Dense_1/bias": (27, 1152),
    f"{ATTENTION}/query/kernel": (27, 1152, 16, 72),
    f"{ATTENTION}/query/bias": (27, 16, 72),
    f"{ATTENTION}/key/kernel": (27, 1152, 16, 72),
    f"{ATTENTION}/key/bias": (27, 16, 72),
    f"{ATTENTION}/value/kernel": (27, 1152, 16, 72),
    f"{ATTENTION}/value/bias": (27, 16, 72),
    f"{ATTENTION}/out/kernel": (27, 16, 72, 1152),
    f"{ATTENTION}/out/bias": (27, 1152),
    "img/Transformer/encoder_norm/scale": (1152,),
    "img/Transformer/encoder_norm/bias": (1152,),
    "img/head/kernel": (1152, 2304),
    "img/head/bias": (2304,),
    "llm/embedder/input_embedding": (257152, 2304),
    "llm/layers/attn/q_einsum/w": (26, 8, 2304, 256),
    "llm/layers/attn/kv_einsum/w": (26, 2, 4, 2304, 256),
    "llm/layers/attn/attn_vec_einsum/w": (26, 8, 256, 2304),
    "llm/layers/mlp/gating_einsum": (26, 2, 2304, 9216),
    "llm/layers/mlp/linear": (26, 9216, 2304),
    "llm/layers/pre_attention_norm/scale": (26, 2304),
    "llm/layers/post_attention_norm/scale": (26, 2304),
    "llm/layers/pre_ffw_norm/scale": (26, 2304),
    "llm/layers/post_ffw_norm/scale": (26, 2304),
    "llm/final_norm/scale": (2304,),
}


def test_3b_is_the_original_tree():
    config = from_variant("3b")
    shapes = {name: leaf.shape for name, leaf in flatten(param_shapes(config)).items()}
    assert shapes == TABLE_3B
    assert count_params(config) == 3_032_094_960


def test_3b_at_448_differs_in_its_positions_only():
    shapes = {
        name: leaf.shape
        for name, leaf in flatten(param_shapes(from_variant("3b", image_size=448))).items()
    }
    assert shapes.pop("img/pos_embedding") == (1, 1024, 1152)
    assert shapes == {name: s for name, s in TABLE_3B.items() if name != "img/pos_embedding"}


@pytest.mark.parametrize("variant, billions", [("10b", 9.66), ("28b", 27.65), ("tiny", 0.0012)])
def test_other_sizes(variant, billions):
    assert count_params(from_variant(variant)) / 1e9 == pytest.approx(billions, rel=0.01)


def test_28b_scales_queries_by_width_per_head():
    assert from_variant("28b").llm.query_factor == pytest.approx((4608 / 32) ** -0.5)
    assert from_variant("10b").llm.query_factor == pytest.approx(1 / 16)


def test_round_trip_and_overrides():
    config = from_variant("tiny", vocab_size=320, remat="full", llm={"depth": 1}, valid_vocab=300)
    assert (config.llm.vocab_size, config.llm.depth, config.num_predictable) == (320, 1, 300)
    assert config.llm.width == from_variant("tiny").llm.width
    fields = config.to_dict()
    assert ModelConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="img: missing field depth"):
        ModelConfig.from_dict(
            fields | {"img": {k: v for k, v in fields["img"].items() if k != "depth"}}
        )
    with pytest.raises(ValueError, match="model: unknown field depht"):
        ModelConfig.from_dict(fields | {"depht": 2})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"remat": "some"}, "remat must be one of none, full"),
        ({"depth": 3}, "model has no setting depth"),
        ({"llm": {"dept": 3}}, "llm has no setting dept"),
        ({"image_size": 225}, "225 is not a multiple"),
        ({"img": {"num_heads": 5}}, "not a multiple of img.num_heads 5"),
        ({"llm": {"num_kv_heads": 3}}, "not a multiple of llm.num_kv_heads 3"),
        ({"llm": {"head_dim": 31}}, "must be even"),
        ({"llm": {"final_softcap": 0.0}}, "final_softcap must be positive or None"),
        ({"llm": {"depth": 0}}, "llm.depth must be a positive integer"),
        ({"valid_vocab": 3000}, "valid_vocab 3000 is larger than the 2048 rows"),
    ],
)
def test_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        from_variant("tiny", **overrides)


def test_unknown_variant():
    with pytest.raises(ValueError, match="'4b'; known: 3b, 10b, 28b, tiny"):
        from_variant("4b")
