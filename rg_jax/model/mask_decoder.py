"""The mask decoder: image features and one hidden state per mention in, one mask per mention out.

A two-way transformer as in Segment Anything (Kirillov et al., arXiv:2304.02643): a few tokens and
the image's patches look at each other in turn. Two kinds of it:

"sam" (default)   the mention's hidden state beside learned mask tokens, sine positions on the image
                  side, learned upsampling to four times the patch grid; a mask is the product of
                  upsampled features with what an MLP makes of the mask token.
"published"       the form of the released RadGrounder checkpoints, for loading them: one token, no
                  positions, one logit per patch. It can hardly point: with a single token two of
                  its attentions are softmaxes over one key.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rg_jax.model.config import MaskDecoderConfig

AnyArray = Array | np.ndarray
_EPS = 1e-5


class _Attention(nn.Module):
    """Queries look at keys; width, heads and output as wide as the input."""

    num_heads: int

    @nn.compact
    def __call__(self, queries, keys, values):
        width = queries.shape[-1]

        def heads(x, name):
            x = nn.Dense(width, name=name, dtype=x.dtype)(x)
            return x.reshape(*x.shape[:-1], self.num_heads, width // self.num_heads)

        q, k, v = heads(queries, "q_proj"), heads(keys, "k_proj"), heads(values, "v_proj")
        scale = (width // self.num_heads) ** -0.5
        scores = jnp.einsum("mqnh,mknh->mnqk", q * scale, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed = jnp.einsum("mnqk,mknh->mqnh", weights, v).reshape(queries.shape)
        return nn.Dense(width, name="out_proj", dtype=mixed.dtype)(mixed)


def _norm(name):
    return nn.LayerNorm(epsilon=_EPS, name=name, use_fast_variance=False)


class _TwoWayLayer(nn.Module):
    config: MaskDecoderConfig
    first: bool

    @nn.compact
    def __call__(self, tokens, token_code, image, image_code):
        c = self.config
        # Tokens start out as their own code: adding it again in the first layer says nothing new.
        query = tokens if self.first else tokens + token_code
        mixed = _Attention(c.num_heads, name="self_attn")(query, query, tokens)
        tokens = _norm("norm1")(tokens + mixed)

        mixed = _Attention(c.num_heads, name="cross_attn_token_to_image")(
            tokens + token_code, image + image_code, image
        )
        tokens = _norm("norm2")(tokens + mixed)

        hidden = nn.Dense(c.mlp_dim, name="mlp_in", dtype=tokens.dtype)(tokens)
        fed = nn.Dense(c.width, name="mlp_out", dtype=tokens.dtype)(
            nn.gelu(hidden, approximate=False)
        )
        tokens = _norm("norm3")(tokens + fed)

        mixed = _Attention(c.num_heads, name="cross_attn_image_to_token")(
            image + image_code, tokens + token_code, tokens
        )
        return tokens, _norm("norm4")(image + mixed)


class _TwoWayTransformer(nn.Module):
    config: MaskDecoderConfig

    @nn.compact
    def __call__(self, tokens, image, image_code):
        c, token_code = self.config, tokens
        for index in range(c.depth):
            layer = _TwoWayLayer(c, first=index == 0, name=f"layers_{index}")
            tokens, image = layer(tokens, token_code, image, image_code)
        # The published form looks once more without any code; ours with both.
        last = tokens + token_code if c.kind == "sam" else tokens
        attention = _Attention(c.num_heads, name="final_attn_token_to_image")
        tokens = _norm("norm_final_attn")(tokens + attention(last, image + image_code, image))
        return tokens, image


class _Upsample(nn.Module):
    """Twice the grid, learned: every cell becomes 2 × 2 cells (a transposed convolution)."""

    features: int

    @nn.compact
    def __call__(self, x):
        m, rows, columns, _ = x.shape
        x = nn.Dense(4 * self.features, name="kernel", dtype=x.dtype)(x)
        x = x.reshape(m, rows, columns, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(m, 2 * rows, 2 * columns, self.features)


class MaskDecoder(nn.Module):
    """Masks of the mentions of every image; see the module. Works in the dtype of its inputs."""

    config: MaskDecoderConfig

    @nn.compact
    def __call__(
        self, image_features: Float[AnyArray, "B N W"], prompts: Float[AnyArray, "B K D"]
    ) -> Float[Array, "B K C h w"]:
        """Mask logits, float32, on the decoder's own grid: h = w = the patch grid (published) or
        four times it (sam). `image_features`: the encoder's, before its head, in reading order.
        `prompts`: the hidden state at each `</seg>`. Resize with `resize_logits`.
        Raises ValueError if N is not a square or the prompts do not fit the width.
        """
        c = self.config
        batch, patches, _ = image_features.shape
        slots, side = prompts.shape[1], math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"{patches} image tokens are not a square grid")
        if not c.project_prompt and prompts.shape[-1] != c.width:
            raise ValueError(
                f"prompts of width {prompts.shape[-1]} need project_prompt or a decoder of that"
                f" width, not {c.width}"
            )
        image = nn.Dense(c.width, name="img_projection", dtype=image_features.dtype)(image_features)
        # One row per mention from here on: mentions of one image do not see each other.
        image = jnp.repeat(image, slots, axis=0)
        prompt = prompts.reshape(batch * slots, 1, -1)
        if c.project_prompt:
            prompt = nn.Dense(c.width, name="prompt_projection", dtype=prompt.dtype)(prompt)
        masks = (
            self._published(prompt, image)
            if c.kind == "published"
            else self._sam(prompt, image, side)
        )
        height = math.isqrt(masks.shape[1])
        masks = jnp.moveaxis(masks.astype(jnp.float32), -1, 1)
        return masks.reshape(batch, slots, -1, height, height)

    def _published(self, prompt, image):
        zero = jnp.zeros((1, 1, self.config.width), image.dtype)
        transformer = _TwoWayTransformer(self.config, name="transformer")
        tokens, image = transformer(prompt, image, zero)
        return nn.Dense(self.config.channels, name="output_proj", dtype=image.dtype)(image + tokens)

    def _sam(self, prompt, image, side):
        c, rows = self.config, image.shape[0]
        learned = self.param(
            "mask_tokens", nn.initializers.normal(c.width**-0.5), (c.mask_tokens, c.width)
        )
        learned = jnp.broadcast_to(learned.astype(image.dtype)[None], (rows, *learned.shape))
        tokens = jnp.concatenate([learned, prompt], axis=1)
        code = sine_code(side, c.width).astype(image.dtype)[None]
        tokens, image = _TwoWayTransformer(c, name="transformer")(tokens, image, code)

        grid = image.reshape(rows, side, side, c.width)
        grid = nn.gelu(_norm("upsample_norm")(_Upsample(c.width // 4, name="upsample_0")(grid)))
        grid = nn.gelu(_Upsample(c.width // 8, name="upsample_1")(grid))
        hyper = tokens[:, 0]
        for index in range(2):
            hyper = nn.relu(nn.Dense(c.width, name=f"hyper_{index}", dtype=hyper.dtype)(hyper))
        hyper = nn.Dense(c.width // 8, name="hyper_2", dtype=hyper.dtype)(hyper)
        features = grid.reshape(rows, -1, c.width // 8)
        masks = jnp.einsum("mpf,mf->mp", features, hyper, preferred_element_type=jnp.float32)
        return masks[:, :, None]


def sine_code(side: int, width: int) -> Float[Array, "N width"]:
    """Sines and cosines of every patch's row and column, waves from one cell to the whole side."""
    omega = math.pi / side ** (jnp.arange(width // 4) / max(width // 4 - 1, 1))
    row, column = jnp.divmod(jnp.arange(side * side), side)
    waves = [f(place[:, None] * omega) for place in (column, row) for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate(waves, axis=1)


def resize_logits(logits: Float[Array, "*n h w"], size: tuple[int, int]) -> Float[Array, "*n H W"]:
    """Bilinear with half-pixel centres and no antialias, to (rows, columns) of any size."""
    return jax.image.resize(logits, (*logits.shape[:-2], *size), "bilinear", antialias=False)
