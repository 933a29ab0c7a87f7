"""Gemma 2's decoder: vectors in, vectors out, with an optional memory of earlier tokens.

Gemma 2 report: https://arxiv.org/abs/2408.00118. Norms before and after every branch, grouped
attention with a soft-cap, rotary positions, gated tanh GELU, embedding table tied with the output.
Parameter names are those of the original checkpoints; all layers are stacked on a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from rg_jax.model import lora
from rg_jax.model.attention import MADE, MASKED, attend, heads_first, soft_cap
from rg_jax.model.config import DecoderConfig, ModelConfig
from rg_jax.model.siglip import remat_block


def prefix_lm_mask(valid: Bool[Array, "B S"], mask_ar: Int[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Who sees whom, [batch, query, key].

    A 1 in `mask_ar` starts a new block: tokens see their own and earlier blocks. So zeros make a
    prefix in which everyone sees everyone, ones a causal suffix:

        mask_ar   0 0 0 1 1        x x x . .
                                   x x x . .
                                   x x x . .
                                   x x x x .
                                   x x x x x

    Keys that are not `valid` (padding) are seen by nobody.
    """
    block = jnp.cumsum(mask_ar, axis=1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :]


def positions_of(valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Positions that count valid tokens only: padding neither has nor takes a position."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)


def rotary_code(
    positions: Int[Array, "B S"], head_dim: int, base: float
) -> tuple[Float[Array, "B S half"], Float[Array, "B S half"]]:
    """Cosine and sine of every position's angles, float32 (RoPE, arXiv:2104.09864)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, :, None] / (base**exponents)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, code):
    """Turn each head's first half against its second half. x: (B, S, heads, H)."""
    # Halves on an axis of their own, turned by reversing it: XLA makes one pass of that on a GPU,
    # where slices that are put together again are written out one by one.
    cos, sin = (part[:, :, None, None, :] for part in code)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turned = halves * cos + jnp.flip(halves, axis=-2) * jnp.concatenate([-sin, sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), variance in float32 whatever the dtype of `x`."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        weight = (1 + scale.astype(jnp.float32)).reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * weight).astype(x.dtype)


class Einsum(nn.Module):
    """One weight `w` and the product it takes part in. `fan_in`: the axes summed over."""

    shape: tuple[int, ...]
    fan_in: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, equation, x):
        out = tuple(a for a in range(len(self.shape)) if a not in self.fan_in + self.batch)
        init = nn.initializers.lecun_normal(
            in_axis=self.fan_in, out_axis=out, batch_axis=self.batch
        )
        product = jnp.einsum(equation, x, self.param("w", init, self.shape).astype(x.dtype))
        factors = lora.factors_of(self, "w", x.dtype)
        if factors is not None:
            product = product + lora.low_rank(equation, x, factors, self.fan_in, self.batch)
        return checkpoint_name(product, MADE)


class Attention(nn.Module):
    """Grouped attention: query head n belongs to key head n // (N / K); keys are never repeated.

    `first`: the first token that asks; what is before it is only seen.
    """

    config: DecoderConfig
    first: int = 0

    @nn.compact
    def __call__(self, x, code, mask, memory=None, slot=None):
        c = self.config
        n, kv, h, d = c.num_heads, c.num_kv_heads, c.head_dim, c.width
        if c.fused_qkv:
            q, k, v = Einsum((3, n, d, h), (2,), (0,), name="qkv_einsum")("btd,cndh->cbtnh", x)
            q = q[:, self.first :]
        else:
            q = Einsum((n, d, h), (1,), name="q_einsum")("btd,ndh->btnh", x[:, self.first :])
            k, v = Einsum((2, kv, d, h), (2,), (0,), name="kv_einsum")("btd,ckdh->cbtkh", x)
        q = rotate(q, tuple(part[:, self.first :] for part in code)) * c.query_factor
        k, v = heads_first(rotate(k, code)), heads_first(v)
        if memory is not None:
            at = (0, 0, slot, 0)
            k, v = (
                jax.lax.dynamic_update_slice(old, new, at)
                for old, new in zip(memory, (k, v), strict=True)
            )
        mixed = attend(q, k, v, mask[:, self.first :], c.attn_softcap)
        out = Einsum((n, h, d), (0, 1), name="attn_vec_einsum")
        return out("btnh,nhd->btd", mixed), (k, v)


class FeedForward(nn.Module):
    """Gated GELU. `joined`: gate and other half are one product, as weights of `unstacked` lie."""

    config: DecoderConfig
    joined: bool = False

    @nn.compact
    def __call__(self, x):
        d, m = self.config.width, self.config.mlp_dim
        init = nn.initializers.lecun_normal
        gating = self.param("gating_einsum", init(batch_axis=(0,)), (2, d, m)).astype(x.dtype)
        linear = self.param("linear", init(), (m, d)).astype(x.dtype)
        gating_change = lora.factors_of(self, "gating_einsum", x.dtype)
        linear_change = lora.factors_of(self, "linear", x.dtype)

        def times(left, weight, change, *which):
            out = left @ weight[which] if which else left @ weight
            if change is not None:
                a, b = (factor[which] if which else factor for factor in change)
                out = out + (left @ a) @ b
            return checkpoint_name(out, MADE)

        # As one long matrix: XLA's CPU backend is twice as fast at the gradients of that.
        rows = x.reshape(-1, d)
        if self.joined:
            gate, up = jnp.einsum("td,cdm->ctm", rows, gating)
        else:
            gate, up = (times(rows, gating, gating_change, i) for i in (0, 1))
        hidden = nn.gelu(gate, approximate=True) * up
        return times(hidden, linear, linear_change).reshape(x.shape)


class DecoderBlock(nn.Module):
    """One layer. With a `memory` of keys and values new ones are written into it, at `slot`.

    What comes out begins with token `first`: the last layer need not make what nobody reads.
    """

    config: DecoderConfig
    keep_keys: bool
    first: int = 0

    @nn.compact
    def __call__(self, x, code, mask, memory=None, slot=None):
        def norm(name):
            return RMSNorm(self.config.norm_eps, name=name)

        attention = Attention(self.config, self.first, name="attn")
        mixed, keys = attention(norm("pre_attention_norm")(x), code, mask, memory, slot)
        mixed = norm("post_attention_norm")(mixed) if self.config.post_norms else mixed
        x = x[:, self.first :] + mixed
        joined = memory is not None
        fed = FeedForward(self.config, joined, name="mlp")(norm("pre_ffw_norm")(x))
        x = x + (norm("post_ffw_norm")(fed) if self.config.post_norms else fed)
        return x, keys if self.keep_keys else None


class Embedder(nn.Module):
    """The table of token vectors, read on the way in and multiplied with on the way out."""

    config: ModelConfig

    def setup(self):
        llm = self.config.llm
        # Rows of length one: scaled by sqrt(width) they enter as unit-size entries, and the tied
        # output starts with logits of unit size.
        self.table = self.param(
            "input_embedding",
            nn.initializers.normal(llm.width**-0.5),
            (llm.vocab_size, llm.width),
        )

    def encode(self, text):
        dtype = jnp.dtype(self.config.compute_dtype)
        vectors = self.table[text].astype(dtype)
        if self.has_variable(lora.ROOT, "input_embedding"):
            added = self._added_rows()
            row = text - (self.config.num_predictable - len(added))
            new = (row >= 0) & (row < len(added))
            change = jnp.where(new[..., None], added[jnp.clip(row, 0, len(added) - 1)], 0)
            vectors = (self.table[text].astype(jnp.float32) + change).astype(dtype)
        # The factor is rounded to the compute dtype, as it was when the weights were trained.
        return vectors * jnp.asarray(self.config.llm.width**0.5, dtype)

    def _added_rows(self):
        """What LoRA adds to the last of the rows that can be predicted."""
        return self.get_variable(lora.ROOT, "input_embedding")["rows"]

    def decode(self, hidden):
        table = self.table.astype(hidden.dtype)
        if self.has_variable(lora.ROOT, "input_embedding"):
            added, end = self._added_rows(), self.config.num_predictable
            last = self.table[end - len(added) : end].astype(jnp.float32) + added
            table = table.at[end - len(added) : end].set(last.astype(hidden.dtype))
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden,
            table,
            preferred_element_type=jnp.float32,
        )
        logits = soft_cap(logits, self.config.llm.final_softcap)
        rows = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
        return jnp.where(rows < self.config.num_predictable, logits, MASKED)


class Gemma2(nn.Module):
    config: ModelConfig

    def setup(self):
        self.embedder = Embedder(self.config)
        self.final_norm = RMSNorm(self.config.llm.norm_eps)

    def embed(self, text: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token vectors, scaled by sqrt(D), in the compute dtype."""
        return self.embedder.encode(text)

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """Float32 logits; soft-capped where the config says so; padding rows at -2.4e38."""
        return self.embedder.decode(hidden)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        keep_keys: bool = False,
        first: int = 0,
    ) -> tuple[Float[Array, "B R D"], Any]:
        """Hidden states after the final norm, and with `keep_keys` this call's keys and values.

        These are two arrays (L, B, K, T, H), heads first. `first`: the first token whose hidden
        state is wanted. Raises ValueError for sequences longer than the sliding window of the
        local layers.
        """
        llm = self.config.llm
        self._check_length(x.shape[1])
        # Reading a prompt keeps nothing for a backward pass: there a loop costs nothing.
        unroll = 1 if keep_keys else min(self.config.unroll, llm.depth)
        code = rotary_code(positions, llm.head_dim, llm.rope_base)
        if unroll == llm.depth and not keep_keys and not self.is_initializing():
            return self.final_norm(self._side_by_side(x, code, mask, first)), None
        layers = nn.scan(
            remat_block(DecoderBlock, self.config.remat, unroll == llm.depth),
            variable_axes={"params": 0, lora.ROOT: 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=llm.depth,
            unroll=unroll,
        )
        x, keys = layers(llm, keep_keys, name="layers")(x, code, mask)
        return self.final_norm(x[:, first:]), keys

    def _side_by_side(self, x, code, mask, first):
        """The layers without a loop: the last of them makes what is wanted and nothing else."""
        llm = self.config.llm
        stacks = {kind: tree["layers"] for kind, tree in self.variables.items() if "layers" in tree}
        leaves, tree = jax.tree.flatten(stacks)
        # Split, not indexed: the gradient of it is one stack, not a sum of as many as layers.
        pieces = [jax.lax.split(leaf, [1] * llm.depth) for leaf in leaves]
        block = remat_block(DecoderBlock, self.config.remat, unrolled=True)
        for layer, parts in enumerate(zip(*pieces, strict=True)):
            start = first if layer == llm.depth - 1 else 0
            given = jax.tree.unflatten(tree, [part[0] for part in parts])
            x, _ = block(llm, False, start, parent=None).apply(given, x, code, mask)
        return x

    def step(
        self,
        x: Float[Array, "B 1 D"],
        positions: Int[Array, "B 1"],
        visible: Bool[Array, "B 1 S"],
        memory: tuple[tuple[Array, Array], ...],
        slot: Int[Array, ""],
        layers: tuple[Any, ...],
    ) -> tuple[Float[Array, "B 1 D"], tuple[tuple[Array, Array], ...]]:
        """One more token per row: its hidden state after the final norm, and the memory with it in.

        `memory`: keys and values (B, K, S, H) of each layer, written to at `slot`; `visible`: the
        slots that the token sees, its own among them. `layers`: of `unstacked`; no LoRA factors.

        Without a loop over the layers: in one, XLA on a GPU copies each layer's weights and memory
        out of their stacks, and reading them once is most of what a step does.
        """
        llm = self.config.llm
        self._check_length(visible.shape[-1])
        code = rotary_code(positions, llm.head_dim, llm.rope_base)
        block, after = DecoderBlock(llm, True, parent=None), []
        for params, keys in zip(layers, memory, strict=True):
            given = {"params": _as_parameters(params, llm)}
            x, keys = block.apply(given, x, code, visible, keys, slot)
            after.append(keys)
        return self.final_norm(x), tuple(after)

    def _check_length(self, total: int) -> None:
        window = self.config.llm.sliding_window
        if window is not None and total > window:
            raise ValueError(
                f"A sequence of {total} tokens is longer than the sliding window of "
                f"{window} (llm.sliding_window), which is not implemented; shorten "
                "the text or set llm.sliding_window to None to let every layer see everything."
            )


def unstacked(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """A model's parameters → the tree of each layer of its decoder, as `Gemma2.step` takes them.

    Weights of several products of the same input are one matrix (D, all they make): read as it
    lies. As they are, XLA on a GPU would turn or copy them for every single token.
    """

    def as_matrix(path, x):
        if path[-1].key not in _SHAPES and path[-2].key not in _SHAPES:
            return x
        return jnp.moveaxis(x, -2, 0).reshape(x.shape[-2], -1)

    stacks = params["llm"]["layers"]
    depth = jax.tree.leaves(stacks)[0].shape[0]
    each = (jax.tree.map(lambda x, i=i: x[i], stacks) for i in range(depth))
    turned = tuple(jax.tree_util.tree_map_with_path(as_matrix, dict(layer)) for layer in each)
    # Or XLA moves the turning into the loop that reads them.
    return jax.lax.optimization_barrier(turned)


# What a layer's joint weights make, in order; in the parameters D stands before the last of these.
_SHAPES = {
    "qkv_einsum": lambda c: (3, c.num_heads, c.head_dim),
    "q_einsum": lambda c: (c.num_heads, c.head_dim),
    "kv_einsum": lambda c: (2, c.num_kv_heads, c.head_dim),
    "gating_einsum": lambda c: (2, c.mlp_dim),
}


def _as_parameters(layer: Mapping[str, Any], config: DecoderConfig) -> Any:
    """The inverse of what `unstacked` does to a layer."""

    def restore(path, x):
        for key in (path[-1].key, path[-2].key):
            if key in _SHAPES:
                return jnp.moveaxis(x.reshape(len(x), *_SHAPES[key](config)), 0, -2)
        return x

    return jax.tree_util.tree_map_with_path(restore, dict(layer))
