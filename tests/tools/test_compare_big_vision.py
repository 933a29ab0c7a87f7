"""The bridge to big_vision, with a stand-in that has its interface and computes what ours does."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.model.config import DecoderConfig, ModelConfig, VisionConfig
from rg_jax.model.paligemma import param_shapes
from rg_jax.weights.formats import open_weights
from rg_jax.weights.npz import save_npz
from tools import compare_big_vision as bridge

MODEL = ModelConfig(
    img=VisionConfig(image_size=12, patch_size=4, width=16, depth=1, mlp_dim=24, num_heads=2),
    llm=DecoderConfig(
        width=24, depth=2, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=50
    ),
    compute_dtype="float32",
)
GEMMA = """
import ml_collections
def get_config(variant):
    if variant != "gemma2_9b":
        raise ValueError(variant)
    return ml_collections.ConfigDict(dict(width=24, depth=2, final_logits_softcap={cap}))
"""
PALIGEMMA = """
import jax.numpy as jnp
from rg_jax.model.paligemma import PaliGemma, apply
from rg_jax.weights.formats import open_weights
from rg_jax.weights.npz import load_npz
from rg_jax.model.paligemma import param_shapes
MODEL = None
class Model:
    def __init__(self, img, llm):
        assert img == dict(variant="mu/4", pool_type="none", scan=True), img
        assert llm == dict(variant="gemma2_9b", vocab_size=50), llm
    def apply(self, variables, image, text, mask_ar):
        params, net = variables["params"], PaliGemma(MODEL)
        zimg, _ = apply(net, params, image, method="embed_image")
        hidden = apply(net, params, image, text, mask_ar)["hidden"] * {scale}
        logits = apply(net, params, hidden[:, zimg.shape[1]:], method="logits")
        return logits, {{"img/zimg": zimg, "llm/pre_logits": hidden, "llm/encoded": hidden}}
def load(init_params, init_files, model_cfg, img_load_kw={{}}, llm_load_kw={{}}):
    assert not init_params and model_cfg.img.variant == "mu/4"
    return load_npz(init_files, param_shapes(MODEL))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A big_vision of our own making on the path; `scale` 1 computes exactly what ours does."""

    def make(scale=1.0, cap=0.0):
        root = tmp_path / "checkout"
        for name, text in (
            (bridge.GEMMA, GEMMA.format(cap=cap)),
            (bridge.PALIGEMMA, PALIGEMMA.format(scale=scale)),
        ):
            path = root.joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(root))
        for name in [name for name in sys.modules if name.startswith("big_vision")]:
            monkeypatch.delitem(sys.modules, name)
        capped = MODEL.replace(llm={"final_softcap": cap or None})
        monkeypatch.setattr(bridge.imported(bridge.PALIGEMMA), "MODEL", capped)
        return capped

    return make


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bridge") / "w.npz"
    save_npz(
        path,
        jax.tree.map(
            lambda s: (random.standard_normal(s.shape) * 0.3).astype(np.float32),
            param_shapes(MODEL),
        ),
    )
    return str(path)


def gaps(weights, model):
    config = bridge.their_config(open_weights(weights).model, "mu/4")
    assert (config.final_softcap or None) == model.llm.final_softcap
    inputs = bridge.random_inputs(model, 2, 6)
    assert inputs[2].tolist() == [[0, 0, 0, 1, 1, 1]] * 2
    return bridge.differences(
        bridge.run_theirs(weights, config, inputs), bridge.run_ours(weights, model, inputs)
    )


@pytest.mark.parametrize("cap", [0.0, 30.0])
def test_the_same_model_shows_no_difference(weights, stand_in, cap):
    found = gaps(weights, stand_in(cap=cap))
    assert set(found) == {"image tokens", "hidden", "logits"}
    assert max(absolute for absolute, _ in found.values()) < 1e-5


def test_another_model_shows_how_different_it_is(weights, stand_in):
    found = gaps(weights, stand_in(scale=1.01))
    assert found["image tokens"][1] < 1e-5
    assert found["hidden"][1] == pytest.approx(0.01 / 1.01, rel=1e-2)
    assert found["logits"][1] > 1e-3


def test_what_is_missing_is_said(weights, stand_in, monkeypatch):
    stand_in()
    with pytest.raises(UserError, match="--encoder is needed"):
        bridge.their_config(MODEL)
    with pytest.raises(UserError, match="newer checkout"):
        bridge.their_config(MODEL.replace(llm={"depth": 3}), "mu/4")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "big_vision").is_dir()])
    for name in [name for name in sys.modules if name.startswith("big_vision")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="PYTHONPATH"):
        bridge.imported(bridge.GEMMA)
