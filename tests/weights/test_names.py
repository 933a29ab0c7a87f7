"""PyTorch's names against ours, for every size: nothing is missing, nothing rounded."""

import numpy as np
import pytest

from rg_jax.model.config import (
    DecoderConfig,
    MaskDecoderConfig,
    ModelConfig,
    VisionConfig,
    from_variant,
    shape_table,
)
from rg_jax.weights import hf_config, names
from rg_jax.weights.source import Leaf

TINY = ModelConfig(
    img=VisionConfig(image_size=8, patch_size=4, width=8, depth=2, mlp_dim=6, num_heads=2),
    llm=DecoderConfig(
        width=8, depth=12, mlp_dim=10, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=9
    ),
)


@pytest.mark.parametrize("variant", ["3b", "10b", "28b", "tiny"])
@pytest.mark.parametrize("fused", [False, True])
def test_rules_make_every_leaf_in_its_shape(variant, fused):
    model = from_variant(variant)
    if fused:
        model = model.replace(llm={"num_kv_heads": model.llm.num_heads})
    table = shape_table(model)
    rules = names.model_rules(model)
    assert rules.keys() == table.keys()
    for name, shape in table.items():
        rule = rules[name]
        empty = {
            key: Leaf(s, np.dtype("f4"), lambda dtype, s=s: np.empty(s, dtype))
            for i in range(max(rule.depth, 1))
            for key, s in zip(rule.keys_of(i), rule.shapes, strict=True)
        }
        assert names.leaf_of(rule, empty).shape == shape, name
    keys = [key for rule in rules.values() for key in rule.all_keys]
    assert len(keys) == len(set(keys))
    assert sorted(names.canonical(names.written(key)) for key in keys) == sorted(keys)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_there_and_back_bit_for_bit(kv):
    """Twelve layers, so that layer 10 does not come before layer 2."""
    model = TINY.replace(llm={"num_kv_heads": kv})
    random = np.random.default_rng(0)
    for name, rule in names.model_rules(model).items():
        array = random.standard_normal(shape_table(model)[name]).astype(np.float32)
        leaf = Leaf(array.shape, array.dtype, lambda dtype, x=array: x.astype(dtype))
        tensors = names.tensors_of(rule, leaf, np.dtype("f4"))
        held = {key: (tensor.shape, tensor.stored()) for key, tensor in tensors.items()}
        assert all(shape == x.shape for shape, x in held.values())
        back = names.leaf_of(
            rule,
            {
                key: Leaf(shape, np.dtype("f4"), lambda dtype, x=x: x)
                for key, (shape, x) in held.items()
            },
        )
        np.testing.assert_array_equal(back.stored(), array, err_msg=name)
        if rule.depth == 12:
            np.testing.assert_array_equal(rule.theirs(array[10])[0], held[rule.keys_of(10)[0]][1])


def test_a_leaf_is_read_once_for_all_its_tensors():
    reads = []
    rule = names.model_rules(TINY)["llm/layers/mlp/gating_einsum"]

    def read(dtype):
        reads.append(dtype)
        return np.zeros((12, 2, 8, 10), np.float32)

    for tensor in names.tensors_of(
        rule, Leaf((12, 2, 8, 10), np.dtype("f4"), read), np.dtype("f4")
    ).values():
        tensor.stored()
    assert len(reads) == 1


def test_dimensions_are_read_off_shapes():
    for model in (
        TINY,
        from_variant("3b"),
        from_variant("28b"),
        from_variant("3b", image_size=448),
    ):
        assert (
            hf_config.config_of_shapes(shape_table(model)).to_dict()
            == ModelConfig(img=model.img, llm=model.llm).to_dict()
        )
    assert hf_config.config_of_shapes({"img/head/bias": (3,)}) is None


def test_config_json_there_and_back(tmp_path):
    for model in (TINY, from_variant("3b"), from_variant("28b"), from_variant("10b")):
        written = hf_config.write_config(model, 257_152, "bfloat16")
        assert written["text_config"]["final_logit_softcapping"] is None
        assert hf_config.text_config(tmp_path, written["text_config"]) == model.llm
        assert hf_config.vision_config(tmp_path, written["vision_config"]) == model.img
        assert hf_config.image_token(written) == 257_152


@pytest.mark.parametrize("kind", ["sam", "published"])
def test_names_of_a_mask_decoder(kind):
    from rg_jax.model.paligemma import param_shapes
    from rg_jax.weights.source import flatten

    masks = MaskDecoderConfig(
        kind=kind,
        width=16,
        depth=2,
        num_heads=4,
        mlp_dim=24,
        mask_tokens=3 if kind == "sam" else 1,
    )
    shapes = flatten(param_shapes(TINY.replace(masks=masks)))
    random = np.random.default_rng(0)
    arrays = {n: random.random(s.shape, np.float32) for n, s in shapes.items() if "masks/" in n}
    leaves = {
        n: Leaf(x.shape, x.dtype, lambda dtype, x=x: x.astype(dtype)) for n, x in arrays.items()
    }
    tensors = names.mask_tensors(leaves)
    assert "transformer.layers.1.norm4.weight" in tensors and len(tensors) == len(arrays)
    back = names.mask_leaves(tensors)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name].stored(), array, err_msg=name)
    found = hf_config.masks_of_shapes({n: x.shape for n, x in arrays.items()}, num_heads=4)
    assert found == masks
