"""Images and captions in one space: SigLIP's training task around PaliGemma's encoder.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343). PaliGemma's weights hold SigLIP's vision tower
but not its text tower, so captions are read by the first layers of the decoder (`llm`, as deep as
the config says), every token seeing every other. What joins the two is `pair`: an attention pool
over the patches (SigLIP's MAP head), a linear map behind the mean of the tokens, and the learned
scale and bias of the logits. Only `img` is kept afterwards; the projector (`img/head`) has no part.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rg_jax.model.attention import attend, heads_first
from rg_jax.model.config import ModelConfig
from rg_jax.model.gemma2 import Gemma2, positions_of
from rg_jax.model.paligemma import AnyArray
from rg_jax.model.siglip import LayerNorm, MlpBlock, Projection, SigLIP

ROOT = "pair"
# Where the paper starts: almost every pair is a wrong one, and the bias says so.
FIRST_SCALE, FIRST_BIAS = 10.0, -10.0


class AttentionPool(nn.Module):
    """One learned query looks at all patches, then an MLP: (B, N, W) → (B, W)."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        head_dim = width // self.num_heads
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        query = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, width))
        q = Projection((self.num_heads, head_dim), name="query")(query)
        k, v = (Projection((self.num_heads, head_dim), name=n)(x) for n in ("key", "value"))
        mixed = attend(q * head_dim**-0.5, heads_first(k), heads_first(v))
        pooled = Projection((width,), num_in=2, name="out")(mixed)
        normed = LayerNorm(name="LayerNorm_0")(pooled)
        return (pooled + MlpBlock(self.mlp_dim, name="MlpBlock_0")(normed))[:, 0]


class PairHead(nn.Module):
    """What is learned beside the two towers."""

    config: ModelConfig

    def setup(self):
        img = self.config.img
        self.pool = AttentionPool(img.num_heads, img.mlp_dim)
        self.text_head = Projection((img.width,), init=nn.initializers.lecun_normal)
        self.log_scale = self.param(
            "log_scale", nn.initializers.constant(math.log(FIRST_SCALE)), ()
        )
        self.bias = self.param("bias", nn.initializers.constant(FIRST_BIAS), ())


class Contrastive(nn.Module):
    """Call its methods with `paligemma.apply(model, params, …, method="…")`."""

    config: ModelConfig

    def setup(self):
        self.img = SigLIP(self.config)
        self.llm = Gemma2(self.config)
        self.pair = PairHead(self.config)

    def embed_images(self, image: Float[AnyArray, "B S S 3"]) -> Float[Array, "B W"]:
        """Images in [-1, 1] → vectors of length 1, float32."""
        _, features = self.img(jnp.asarray(image))
        return _unit(self.pair.pool(features))

    def embed_texts(
        self, text: Int[AnyArray, "B T"], valid: Bool[AnyArray, "B T"]
    ) -> Float[Array, "B W"]:
        """Token ids → vectors of length 1, float32. Tokens that are not `valid` have no part,
        wherever in the row they stand."""
        valid = jnp.asarray(valid)
        mask = jnp.broadcast_to(valid[:, None, :], (*valid.shape, valid.shape[1]))
        hidden, _ = self.llm(self.llm.embed(jnp.asarray(text)), positions_of(valid), mask)
        weight = valid.astype(jnp.float32)[:, :, None]
        mean = (hidden.astype(jnp.float32) * weight).sum(axis=1)
        mean = mean / jnp.maximum(weight.sum(axis=1), 1.0)
        return _unit(self.pair.text_head(mean.astype(hidden.dtype)))

    def logit_terms(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Scale and bias: logit = scale · (image · text) + bias."""
        return jnp.exp(self.pair.log_scale), self.pair.bias

    def everything(self, image, text):
        """Goes through all parameters, to make them (see `init_params`)."""
        self.embed_images(image)
        self.embed_texts(text, jnp.ones(text.shape, bool))
        self.logit_terms()


def _unit(x):
    wide = x.astype(jnp.float32)
    # Under the root, so that a vector of zeros has a gradient too.
    return wide * jax.lax.rsqrt(jnp.square(wide).sum(axis=-1, keepdims=True) + 1e-12)


def init_params(config: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """Random float32 parameters, as `paligemma.init_params` makes its own."""
    size = config.img.image_size
    image, text = np.zeros((1, size, size, 3), np.float32), np.zeros((1, 1), np.int32)
    return Contrastive(config).init(rng, image, text, method="everything")["params"]
