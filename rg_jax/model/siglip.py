"""SigLIP's vision tower: an image in, one vector per patch out.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343) in the So400m/14 shape that PaliGemma uses: a
pre-norm ViT without pooling, LayerNorm eps 1e-6, tanh GELU, learned positions. Parameter names are
those of the original checkpoints; the weights of all layers are stacked on a leading axis.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rg_jax.model import lora
from rg_jax.model.attention import MADE, MIXED, SCORES, attend, heads_first
from rg_jax.model.config import ModelConfig, VisionConfig
from rg_jax.model.lora import factors_of

_EPS = 1e-6


def remat_block(block: type[nn.Module], remat: str, unrolled: bool) -> type[nn.Module]:
    """The layer class with the given recompute policy (see ModelConfig.remat).

    `unrolled`: the layers stand side by side in the program instead of in a loop.
    """
    if remat == "none":
        return block
    policies = jax.checkpoint_policies
    policy = {
        "full": policies.nothing_saveable,
        # The scores' product has a gradient of its own, which hides it from the general rule.
        "dots": policies.save_from_both_policies(
            policies.dots_saveable, policies.save_only_these_names(SCORES)
        ),
        # By name, where JAX has a policy for such products: that would keep the products of
        # LoRA's factors beside those of the weights they are added to.
        "dots_no_batch": policies.save_only_these_names(MADE, MIXED),
    }[remat]
    # Inside a loop XLA cannot merge the recomputation with the original, so no barrier is needed.
    return nn.remat(block, prevent_cse=unrolled, policy=policy)


class LayerNorm(nn.Module):
    """Mean and variance in float32 whatever the dtype of `x`; returns the dtype of `x`."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + _EPS)
        out = normed * _row(scale, x.ndim, jnp.float32) + _row(bias, x.ndim, jnp.float32)
        return out.astype(x.dtype)


class Projection(nn.Module):
    """A linear map from the last `num_in` axes to `features` axes, with a bias."""

    features: tuple[int, ...]
    num_in: int = 1
    init: Any = nn.initializers.xavier_uniform

    @nn.compact
    def __call__(self, x):
        shape_in = x.shape[-self.num_in :]
        shape = (*shape_in, *self.features)
        axes_in = tuple(range(self.num_in))
        axes_out = tuple(range(self.num_in, len(shape)))
        kernel = self.param("kernel", self.init(in_axis=axes_in, out_axis=axes_out), shape)
        bias = self.param("bias", nn.initializers.zeros, self.features)
        # All tokens as one long axis: XLA's CPU backend is twice as fast at the gradients of that.
        rows = x.reshape(-1, *shape_in)

        def times(left, right):
            axes = tuple(range(1, left.ndim))
            axes_right = tuple(range(left.ndim - 1))
            return jax.lax.dot_general(left, right, ((axes, axes_right), ((), ())))

        out = times(rows, kernel.astype(x.dtype))
        factors = factors_of(self, "kernel", x.dtype)
        if factors is not None:
            out = out + times(times(rows, factors[0]), factors[1])
        out = checkpoint_name(out, MADE)
        out = out + _row(bias, out.ndim, x.dtype)
        return out.reshape(*x.shape[: x.ndim - self.num_in], *self.features)


class MlpBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(Projection((self.hidden,), name="Dense_0")(x), approximate=True)
        return Projection((x.shape[-1],), name="Dense_1")(hidden)


class SelfAttention(nn.Module):
    """Every patch sees every patch. `fused` hands the work to cuDNN's kernel."""

    num_heads: int
    fused: bool

    @nn.compact
    def __call__(self, x):
        head_dim = x.shape[-1] // self.num_heads
        q, k, v = (
            Projection((self.num_heads, head_dim), name=name)(x)
            for name in ("query", "key", "value")
        )
        if self.fused:
            mixed = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            mixed = attend(q * head_dim**-0.5, heads_first(k), heads_first(v))
        return Projection((x.shape[-1],), num_in=2, name="out")(mixed)


class EncoderBlock(nn.Module):
    config: VisionConfig
    fused: bool

    @nn.compact
    def __call__(self, x):
        attention = SelfAttention(
            self.config.num_heads, self.fused, name="MultiHeadDotProductAttention_0"
        )
        x = x + attention(LayerNorm(name="LayerNorm_0")(x))
        x = x + MlpBlock(self.config.mlp_dim, name="MlpBlock_0")(LayerNorm(name="LayerNorm_1")(x))
        return x, None


class Transformer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            remat_block(
                EncoderBlock, self.config.remat, self.config.unroll >= self.config.img.depth
            ),
            variable_axes={"params": 0, lora.ROOT: 0},
            split_rngs={"params": True},
            length=self.config.img.depth,
            unroll=min(self.config.unroll, self.config.img.depth),
        )
        fused = self.config.vision_attention == "cudnn"
        x, _ = layers(self.config.img, fused, name="encoderblock")(x)
        return LayerNorm(name="encoder_norm")(x)


def sine_positions(rng, shape, dtype=jnp.float32):
    """Where a learned position embedding starts from: sines and cosines of row and column.

    A model that has to point learns from scratch sooner if places start out different and
    neighbours alike (2-D sine code, as in MoCo v3). The random key is not used.
    """
    del rng
    _, tokens, width = shape
    side = math.isqrt(tokens)
    # From one radian per patch to one per side: every wave tells places of this grid apart.
    omega = 1 / side ** (jnp.arange(width // 4) / max(width // 4 - 1, 1))
    row, column = jnp.divmod(jnp.arange(tokens), side)
    waves = [f(place[:, None] * omega) for place in (column, row) for f in (jnp.sin, jnp.cos)]
    code = jnp.concatenate(waves, axis=1)
    return jnp.pad(code, ((0, 0), (0, width - code.shape[1])))[None].astype(dtype)


class SigLIP(nn.Module):
    """`(B, S, S, 3)` images in [-1, 1] → tokens for the decoder, and the features behind them."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, image: Float[Array, "B S S 3"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N W"]]:
        """Image tokens (B, N, decoder width), features before the head (B, N, W), reading order.

        Raises ValueError where the image is not of the size the positions were made for.
        """
        img, dtype = self.config.img, jnp.dtype(self.config.compute_dtype)
        side, patch = img.image_size, img.patch_size
        if image.shape[1:] != (side, side, 3):
            raise ValueError(
                f"The model takes images of shape ({side}, {side}, 3), not {image.shape[1:]}."
            )
        patches = patches_of(image.astype(dtype), patch)
        x = PatchEmbedding(img.width, patch, name="embedding")(patches)
        positions = self.param("pos_embedding", sine_positions, (1, img.num_tokens, img.width))
        x = x + positions.astype(dtype)
        features = Transformer(self.config, name="Transformer")(x)
        head = Projection((self.config.llm.width,), init=nn.initializers.lecun_normal, name="head")
        return head(features), features


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, i.e. one matrix product; kernel (p, p, 3, W)."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, patches):
        shape = (self.patch, self.patch, 3, self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        flat = kernel.reshape(-1, self.width).astype(patches.dtype)
        out = patches @ flat
        factors = factors_of(self, "kernel", patches.dtype)
        if factors is not None:
            out = out + (patches @ factors[0].reshape(len(flat), -1)) @ factors[1]
        return out + _row(bias, 3, patches.dtype)


def patches_of(image, patch: int):
    """(B, S, S, 3) → (B, N, patch * patch * 3), patches in reading order."""
    batch, side = image.shape[:2]
    grid = side // patch
    x = image.reshape(batch, grid, patch, grid, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, grid * grid, patch * patch * 3)


def _row(parameter, ndim: int, dtype):
    """A parameter as the trailing axes of an array of `ndim` axes (no implicit rank promotion)."""
    lead = (1,) * (ndim - parameter.ndim)
    return parameter.reshape(lead + parameter.shape).astype(dtype)
