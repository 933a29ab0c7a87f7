"""Every golden siglip set: the published adapted encoder's keys, and what the tower computes.

Sets are `siglip_keys*.json` with an `.npz` of the same name.
"""

import json
import os
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rg_jax.errors import UserError
from rg_jax.model.config import DecoderConfig, ModelConfig, VisionConfig
from rg_jax.model.paligemma import param_shapes
from rg_jax.model.siglip import SigLIP
from rg_jax.weights import names
from rg_jax.weights.encoders import open_checkpoint
from rg_jax.weights.source import load

ROOT = Path(os.environ.get("RG_JAX_GOLDEN", Path(__file__).parents[1] / "golden"))
SETS = sorted(ROOT.glob("**/siglip_keys*.json"))
on_every_set = pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)


@cache
def content(path):
    with np.load(path.with_suffix(".npz")) as file:
        return json.loads(path.read_text()), {key: file[key] for key in file.files}


def group(path, start):
    arrays = content(path)[1]
    return {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}


def heads(path):
    return content(path)[0]["example"]["heads"]


def saved(tensors, file):
    """As Lightning saves it: the tensors below `state_dict`, other plain values beside."""
    state = {key: torch.tensor(array) for key, array in tensors.items()}
    torch.save({"epoch": 3, "global_step": 17, "state_dict": state, "hparams_name": "kwargs"}, file)
    return file


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    @cache
    def of(path):
        file = saved(group(path, "in/"), tmp_path_factory.mktemp("siglip") / "adapted.ckpt")
        return open_checkpoint(file, heads(path))

    return of


def vision(path):
    example = content(path)[0]["example"]
    return VisionConfig(
        image_size=example["image"],
        patch_size=example["patch"],
        width=example["hidden"],
        depth=example["layers"],
        mlp_dim=example["mlp"],
        num_heads=example["heads"],
    )


def expected(path):
    """Names and shapes of the encoder, without the projector."""
    model = ModelConfig(img=vision(path), llm=DecoderConfig(width=8, vocab_size=64))
    tree = param_shapes(model)["img"]
    del tree["head"]
    return {"img": tree}


def test_siglip_golden_is_there():
    assert SETS, f"no siglip_keys in {ROOT}"


@on_every_set
def test_siglip_golden_keys_become_ours(path, opened):
    """Through our leaves and back to the library's names: every array of the set, bit for bit."""
    source = opened(path)
    assert not source.unknown and not source.missing
    rules = names.encoder_rules(vision(path))
    assert source.leaves.keys() == rules.keys()
    found = {}
    for name, rule in rules.items():
        for key, leaf in names.tensors_of(rule, source.leaves[name], np.dtype("float32")).items():
            found["vision_model." + key.removeprefix("vision.")] = leaf.stored()
    golden = group(path, "out/")
    listed = set(content(path)[0].get("hf_keys") or golden)
    assert found.keys() == golden.keys() and listed <= found.keys()
    for key, array in golden.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@on_every_set
def test_siglip_golden_mapping_names_what_is_left_out(path, opened):
    mapping = content(path)[0]["mapping"]
    kept = {entry["ckpt_key"] for entry in mapping if entry["hf"]}
    held = set(group(path, "in/"))
    dropped = {key for key in held if key not in kept}
    assert set(opened(path).left_out) == dropped


@on_every_set
def test_siglip_golden_forward(path, opened):
    forward = group(path, "forward/")
    if "pixel_values" not in forward:
        return
    model = ModelConfig(
        img=vision(path), llm=DecoderConfig(width=8, vocab_size=64), compute_dtype="float32"
    )
    params = load(opened(path), expected(path))["img"]
    width = model.img.width
    params["head"] = {"kernel": np.zeros((width, 8), np.float32), "bias": np.zeros(8, np.float32)}
    image = jnp.asarray(forward["pixel_values"].transpose(0, 2, 3, 1))
    _, features = SigLIP(model).apply({"params": params}, image)
    golden = forward["last_hidden_state"]
    np.testing.assert_allclose(features, golden, rtol=0, atol=2e-5)


@on_every_set
def test_siglip_golden_loader_variants(path, tmp_path):
    """What the published loader refuses is refused, and nothing else."""
    given, whole = group(path, "in/"), expected(path)
    visual = next(k for k in given if k.endswith("trunk.norm.weight"))
    makes = {
        "final norm": {k: v for k, v in given.items() if ".trunk.norm." not in k},
        "leading 'model.'": {k.removeprefix("model."): v for k, v in given.items()},
        "unexpected visual key": {**given, "model.visual.head.proj.weight": given[visual]},
        "no attn_pool": {k: v for k, v in given.items() if "attn_pool" not in k},
    }
    for variant in content(path)[0].get("loader_variants", []):
        (tensors,) = (make for part, make in makes.items() if part in variant["case"])
        file = saved(tensors, tmp_path / "variant.ckpt")
        if variant["error"] is None:
            load(open_checkpoint(file, heads(path)), whole)
        else:
            with pytest.raises(UserError, match="missing|unknown|lacks"):
                load(open_checkpoint(file, heads(path)), whole)
