"""How much accelerator memory a run needs, told before it is asked for."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rg_jax.model.config import ModelConfig
from rg_jax.training.state import TrainState
from rg_jax.training.step import in_compute_dtype

GIB = 2**30


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of a tree of shapes or arrays."""
    return sum(
        int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree_util.tree_leaves(tree)
    )


def activation_bytes(
    model: ModelConfig,
    rows: int,
    text_len: int,
    block_size: int,
    encoder_trained: bool,
    mask_slots: int = 0,
    mask_size: int = 0,
    decoder_trained: bool = True,
    pairs: bool = False,
) -> dict[str, int]:
    """Estimate of what a forward and backward pass keeps for `rows` examples on one device.

    With remat "full" only the input of every layer is kept, plus the largest layer's own
    intermediates while it is differentiated; with "dots…" also the results of its matrix products;
    with "none" every layer's intermediates. What gets no gradient keeps nothing: of it the largest
    layer counts. The loss keeps one vocabulary block of logits in float32, and its gradient; with
    `pairs` (a contrastive run, whose decoder sees texts alone) this device's images against as many
    texts.
    """
    half = 2 if model.compute_dtype == "bfloat16" else 4
    img, llm = model.img, model.llm
    image_tokens = (img.image_size // img.patch_size) ** 2
    tokens = text_len if pairs else image_tokens + text_len

    def layer(length, width, mlp, heads, gates):
        """What one layer makes: (everything, results of products with weights, of all products)."""
        scores = heads * length * length * 4  # float32
        everything = length * (8 * width + (gates + 1) * mlp) * half + 2 * scores
        # Queries, keys and values, what attention mixed, its output, gate and up, down.
        made = 2 * width + gates * mlp + 2 * heads * head_dim + 2 * kv_heads * head_dim
        return everything, length * made * half, length * made * half + scores

    def kept_of(depth, inputs, layer):
        everything, with_weights, products = layer
        if model.remat == "none":
            return rows * depth * everything
        saved = {"full": 0, "dots": products, "dots_no_batch": with_weights}[model.remat]
        return rows * (depth * (inputs + saved) + everything)

    head_dim, kv_heads = llm.head_dim, llm.num_kv_heads
    decoder = layer(tokens, llm.width, llm.mlp_dim, llm.num_heads, 2)
    kept = kept_of(llm.depth, tokens * llm.width * half, decoder)
    head_dim, kv_heads = img.width // img.num_heads, img.num_heads
    encoder = layer(image_tokens, img.width, img.mlp_dim, img.num_heads, 1)
    if not decoder_trained:
        kept = rows * decoder[0]
    if encoder_trained:
        kept += kept_of(img.depth, image_tokens * img.width * half, encoder)
    else:
        kept += rows * encoder[0]
    rows_in_block = min(block_size, model.llm.vocab_size)
    loss = 2 * rows * text_len * rows_in_block * 4
    if pairs:
        loss = 4 * rows * rows * 4
    parts = {"activations": kept, "loss block": loss}
    if model.masks is not None and mask_slots:
        m = model.masks
        per_layer = image_tokens * m.width * 10 * half + image_tokens * m.num_heads * 12 * 4
        upsampled = image_tokens * (m.width + 2 * m.width) * 3 * half if m.kind == "sam" else 0
        pixels = 6 * mask_size**2 * 4  # logits, probabilities and their gradients in float32
        parts["masks"] = rows * mask_slots * (m.depth * per_layer + upsampled + pixels)
    return parts


def estimate(
    shapes: TrainState,
    model: ModelConfig,
    *,
    rows: int,
    text_len: int,
    block_size: int,
    accumulation: int,
    devices: int,
    mask_slots: int = 0,
    mask_size: int = 0,
    pairs: bool = False,
) -> dict[str, int]:
    """Bytes per device, by part. `rows`: examples of one micro-batch on one device.

    Parameters, gradients and optimizer state are exact (evenly sharded); activations are a
    formula. `compiled.memory_analysis()` gives the compiler's own figure once it has compiled.
    """
    encoder_trained = any(
        n.removeprefix("lora/").startswith(("img/Transformer", "img/embedding"))
        for n in shapes.trainable
    )
    parts = {
        "trainable parameters (float32)": tree_bytes(shapes.trainable) // devices,
        "frozen parameters": tree_bytes(shapes.frozen) // devices,
        "optimizer state": tree_bytes(shapes.opt_state) // devices,
    }
    cast = jax.eval_shape(lambda x: in_compute_dtype(x, model), shapes.trainable)
    changed = {n: s for n, s in cast.items() if s.dtype != shapes.trainable[n].dtype}
    if changed:
        parts["weights in the compute dtype"] = tree_bytes(changed) // devices
    parts["gradients"] = tree_bytes(cast) // devices
    if accumulation > 1:
        parts["gradients added up (float32)"] = tree_bytes(shapes.trainable) // devices
    # Gradients reach the decoder wherever anything before or in it is trained.
    decoder_trained = any(not n.startswith("masks/") for n in shapes.trainable)
    parts |= activation_bytes(
        model,
        rows,
        text_len,
        block_size,
        encoder_trained,
        mask_slots,
        mask_size,
        decoder_trained,
        pairs,
    )
    return parts


def table(parts: Mapping[str, int], devices: int) -> str:
    """The estimate as text, in GiB (MiB where that reads better)."""
    lines = [f"memory estimate per device ({devices} device{'s' if devices > 1 else ''}):"]
    for name, size in {**parts, "sum": sum(parts.values())}.items():
        value = (
            f"{size / GIB:9.2f} GiB" if sum(parts.values()) > GIB else f"{size / 2**20:9.1f} MiB"
        )
        lines.append(f"  {name:<34}{value}")
    return "\n".join(lines)


def compiled_bytes(compiled: Any) -> int | None:
    """Peak of a compiled step by XLA's own analysis, or None where the backend has none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return int(
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
