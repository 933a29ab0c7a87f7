"""Small models that go through every line the large ones go through."""

from functools import partial

import jax
import numpy as np
import pytest

from rg_jax.model.config import DecoderConfig, ModelConfig, VisionConfig
from rg_jax.model.paligemma import PaliGemma, apply, param_shapes

SMALL = ModelConfig(
    img=VisionConfig(image_size=12, patch_size=4, width=16, depth=2, mlp_dim=24, num_heads=2),
    llm=DecoderConfig(
        width=24, depth=2, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=50
    ),
    compute_dtype="float32",
)


class Small:
    """A config, its model, random parameters, inputs, and the forward pass compiled once."""

    def __init__(self, config: ModelConfig, batch: int = 2, length: int = 9, seed: int = 0):
        self.config, self.model = config, PaliGemma(config)
        random = np.random.default_rng(seed)

        def draw(shape):
            # Also what starts at 0 or 1 in a fresh model, so that nothing goes unnoticed.
            fan_in = max(2, np.prod(shape.shape[-2:-1], dtype=int))
            values = random.standard_normal(shape.shape) / np.sqrt(fan_in)
            return jax.numpy.asarray(values, jax.numpy.float32)

        self.params = jax.tree.map(draw, param_shapes(config))
        self._forward = jax.jit(partial(apply, self.model))
        side = config.img.image_size
        self.image = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
        self.text = random.integers(3, 50, (batch, length)).astype(np.int32)
        self.mask_ar = np.repeat([[0] * (length - 4) + [1] * 4], batch, axis=0).astype(np.int32)
        self.tokens = config.img.num_tokens

    def hidden(self, **changes) -> np.ndarray:
        given = {"text": self.text, "mask_ar": self.mask_ar, "mask_input": None} | changes
        return np.asarray(self._forward(self.params, self.image, **given)["hidden"])


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def small() -> Small:
    return Small(SMALL)


@pytest.fixture(scope="session")
def make_small():
    return Small
