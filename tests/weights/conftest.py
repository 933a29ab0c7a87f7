"""What tests of weight formats share: a small tokenizer, inputs, our forward pass."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION
from rg_jax.model.paligemma import PaliGemma, apply, param_shapes
from rg_jax.weights.source import load

TEXTS = (
    "Caption this image and detect keywords:",
    "Beschreibe dieses Bild und segmentiere die Schlüsselwörter:",
    "large liver, small left kidney. Which organs are visible?",
    "große Leber, kleine linke Niere; Größe 12.5 mm\n\nAnswer:",
)
FORMATS = {
    "plain": None,
    "detection": PUBLISHED_DETECTION,
    "segmentation": PUBLISHED_SEGMENTATION,
    "ours": OURS,
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS * 5, path, vocab_size=1160, num_loc=512, num_seg=128)
    return path


@pytest.fixture(scope="session")
def tokenizers(tokenizer_file):
    """The same pieces with the extra tokens of every format, by its name."""
    return {
        name: Tokenizer.load(tokenizer_file, fmt.extra_tokens if fmt else ())
        for name, fmt in FORMATS.items()
    }


@cache
def _forward(config):
    model = PaliGemma(config)

    @jax.jit
    def run(params, image, text, mask_ar):
        out = apply(model, params, image, text, mask_ar)
        logits = apply(model, params, out["hidden"][:, -text.shape[1] :], method="logits")
        return {**out, "logits": logits}

    return run


@pytest.fixture(scope="session")
def our_forward():
    """`our_forward(model, params, image, text, mask_ar)`: hidden, image_features, logits."""

    def run(model, params, image, text, mask_ar):
        with jax.default_matmul_precision("highest"):
            out = _forward(model)(params, image, jnp.asarray(text), jnp.asarray(mask_ar))
        return {name: np.asarray(value) for name, value in out.items()}

    return run


@pytest.fixture(scope="session")
def params_of():
    """All parameters of a source, in float32, and the model that they are of."""

    def read(source):
        model = source.model.replace(compute_dtype="float32", masks=source.masks)
        return model, load(source, param_shapes(model), put=lambda _, x: jnp.asarray(x))

    return read


@pytest.fixture(scope="session")
def inputs():
    """`inputs(tokenizer)`: two images, texts of five prefix and four target tokens, mask_ar."""

    def make(tokenizer, side=12):
        random = np.random.default_rng(3)
        image = random.uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
        text = random.integers(3, tokenizer.base_size, (2, 9))
        text[:, 0] = tokenizer.bos_id
        if tokenizer.extra_ids:
            text[:, 5:7] = tokenizer.extra_ids[:2]
        return image, text.astype(np.int32), np.repeat([[0] * 5 + [1] * 4], 2, 0).astype(np.int32)

    return make


@pytest.fixture(scope="session")
def released(tokenizers, tmp_path_factory):
    """By kind: a stock folder, and one as each released model is saved. Not to be changed."""
    from torch_models import Released

    root = tmp_path_factory.mktemp("released")
    shards = {"detection": {"max_shard_size": "30KB"}}
    return {
        kind: Released(root / kind, tokenizers[kind], kind, **shards.get(kind, {}))
        for kind in ("plain", "detection", "segmentation")
    }
