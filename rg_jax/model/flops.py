"""How much arithmetic one training step is, from the dimensions alone.

Only matrix products are counted (2 · m · n · k each), as everybody who reports MFU does. `model` is
what the mathematics needs; `hardware` adds what is computed a second time, layers under remat and
the loss's blocks (it takes the vocabulary to be several), and what is computed for nobody. MFU is
`model` over time and peak.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from rg_jax.model.config import ModelConfig
from rg_jax.model.lora import factor_shapes

# Norm scales and biases need no matrix product and are not told apart.
PARTS = ("img", "head", "embedder", "layers", "masks")
# Factors beside the weights of the encoder (and its head) and of the decoder.
LORA_PARTS = ("lora_img", "lora_layers")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating point operations per sample."""

    model: int
    hardware: int


def parts_of(names: Iterable[str]) -> frozenset[str]:
    """Which parts the named parameters ("llm/layers/mlp/linear", …) belong to: some of PARTS and
    LORA_PARTS, and "pair", which joins the two towers of a contrastive run.

    Raises ValueError for a name of none of them.
    """
    prefixes = {
        "img/head/": "head",
        "img/": "img",
        "llm/embedder/": "embedder",
        "llm/layers/": "layers",
        "llm/final_norm/": "layers",
        "masks/": "masks",
        "pair/": "pair",
        "lora/img/": "lora_img",
        "lora/llm/": "lora_layers",
    }
    parts = set()
    for name in names:
        part = next((p for prefix, p in prefixes.items() if name.startswith(prefix)), None)
        if part is None:
            raise ValueError(f"{name!r} is not a parameter of the model.")
        parts.add(part)
    return frozenset(parts)


def train_step_flops(
    config: ModelConfig,
    text_len: int,
    target_len: int,
    trained: Iterable[str] = PARTS,
    masks: int = 0,
) -> Flops:
    """One sample's forward and backward pass.

    `text_len`: text tokens that go through the decoder (padding included: it is computed too);
    `target_len`: tokens whose logits the loss makes; `trained`: some of PARTS and LORA_PARTS,
    none of them for the forward pass alone; `masks`: how many slots the mask decoder fills. Remat
    is the config's. Raises ValueError for an unknown part.
    """
    trained = frozenset(trained)
    if unknown := trained - {*PARTS, *LORA_PARTS}:
        raise ValueError(f"Unknown part {sorted(unknown)}; known: {', '.join(PARTS + LORA_PARTS)}.")
    img, llm = config.img, config.llm
    n, w = img.num_tokens, img.width

    # Encoder. Attention products have two inputs that need gradients, so they count twice in the
    # backward pass; a product with weights counts once for its input, once for the weights.
    patches = 2 * n * img.patch_size**2 * 3 * w
    weights = img.depth * (4 * 2 * n * w * w + 2 * 2 * n * w * img.mlp_dim)
    attention = img.depth * 2 * 2 * n * n * w
    last_linear = img.depth * 2 * n * img.mlp_dim * w
    head = 2 * n * w * llm.width
    forward = patches + weights + attention + head
    backward = recomputed = 0
    if "img" in trained:
        backward += patches + 2 * weights + 2 * attention + head
    elif "lora_img" in trained:  # gradients pass through, to the factors
        backward += weights + 2 * attention + head
    if trained & {"img", "lora_img"}:
        # The last product of a layer only enters a sum: its value is not needed again.
        recomputed += _again(config.remat, weights - last_linear, attention)
    if "head" in trained:
        backward += head

    needed = _decoder(config, text_len, target_len, trained, loops=False)
    done = _decoder(config, text_len, target_len, trained, config.unroll < llm.depth)
    adapted = _factors(config, "lora/img/", {"": float(n)}, "lora_img" in trained)
    forward += needed[0] + adapted[0]
    backward += needed[1] + adapted[1]
    recomputed += sum(done) - needed[0] - needed[1] + adapted[2]

    if masks and config.masks is not None:
        once, image_projection, prompt_projection = mask_decoder_flops(config, masks)
        forward += once
        if trained:
            # No gradient where nothing is trained behind an input: neither image nor text.
            backward += 2 * once - (0 if "img" in trained else image_projection)
            backward -= 0 if trained - {"masks"} else prompt_projection
    return Flops(model=forward + backward, hardware=forward + backward + recomputed)


def _decoder(
    config: ModelConfig, text_len: int, target_len: int, trained: frozenset[str], loops: bool
) -> tuple[int, int, int]:
    """The decoder and its logits: forward, backward, and what is computed a second time.

    Of the last layer only the text is read: there image tokens make keys and values and nothing
    else, unless layers are the turns of a loop (`loops`), which are all alike.
    """
    llm, n = config.llm, config.img.num_tokens
    s, d = n + text_len, llm.width
    heads = llm.num_heads * llm.head_dim
    kv_heads = llm.num_kv_heads * llm.head_dim
    seen = llm.depth * s  # tokens of all layers; those that ask, and are fed:
    asking = seen if loops else seen - n
    queries = seen if llm.fused_qkv else asking  # joint weights make all that there is
    weights = seen * 2 * kv_heads + queries * heads + asking * (heads + 3 * llm.mlp_dim)
    weights *= 2 * d
    attention = 2 * 2 * asking * s * heads
    last_linear = 0 if llm.post_norms else 2 * asking * d * llm.mlp_dim
    logits = 2 * target_len * d * config.num_predictable
    forward, backward, recomputed = weights + attention + logits, 0, 0
    # As soon as anything before or in it is trained, gradients pass through all of it. (Where
    # factors of the layers alone are, those side by side spare the first one's input: not counted.)
    if trained - {"masks"}:
        backward += weights + 2 * attention + logits
        recomputed += _again(config.remat, weights - last_linear, attention) + logits
    if "layers" in trained:
        backward += weights
    if "embedder" in trained:
        backward += logits
    tokens = {"kv_einsum": seen / llm.depth, "": asking / llm.depth}
    factors = _factors(config, "lora/llm/", tokens, "lora_layers" in trained)
    return forward + factors[0], backward + factors[1], recomputed + factors[2]


def _factors(
    config: ModelConfig, prefix: str, tokens: Mapping[str, float], trained: bool
) -> tuple[int, int, int]:
    """LoRA's factors whose names begin with `prefix`: forward, backward, a second time.

    `tokens`: how many go through those of a layer whose names hold the key, the first that fits.
    """
    forward = again = 0
    for name, shape in factor_shapes(config).items():
        if name.startswith(prefix):
            through = next(count for key, count in tokens.items() if key in name)
            products = round(2 * through * math.prod(shape))
            forward += products
            # Kept is only what they add to: x A is made again, in the layers.
            inside = name.endswith("/a") and "img/head" not in name
            if config.remat == "dots_no_batch" and inside:
                again += products
    if not trained:
        return forward, 0, 0
    return forward, 2 * forward, again + _again(config.remat, forward, 0)


def pair_step_flops(config: ModelConfig, text_len: int, trained: Iterable[str]) -> Flops:
    """One image and its caption through the two towers of `model.contrastive`, and back.

    Products behind the towers (pool, heads, images with captions) are not counted.
    """
    img, llm, trained = config.img, config.llm, frozenset(trained)
    n, w, d, s = img.num_tokens, img.width, llm.width, text_len
    heads, kv_heads = llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    towers = {
        "img": (
            img.depth * (4 * 2 * n * w * w + 2 * 2 * n * w * img.mlp_dim)
            + 2 * n * img.patch_size**2 * 3 * w,
            img.depth * 2 * 2 * n * n * w,
        ),
        "layers": (
            llm.depth * 2 * s * d * (2 * heads + 2 * kv_heads + 3 * llm.mlp_dim),
            llm.depth * 2 * 2 * s * s * heads,
        ),
    }
    model = recomputed = 0
    for part, (weights, attention) in towers.items():
        model += weights + attention
        if part in trained:
            model += 2 * (weights + attention)
            recomputed += _again(config.remat, weights, attention)
    return Flops(model=model, hardware=model + recomputed)


def mask_decoder_flops(config: ModelConfig, masks: int) -> tuple[int, int, int]:
    """One image's masks, forward; and what of it projects the image features and the prompts."""
    c, n = config.masks, config.img.num_tokens
    d = c.width
    sam = c.kind == "sam"
    t = c.mask_tokens + 1 if sam else 1

    def attention(queries, keys):
        return 2 * d * d * (2 * queries + 2 * keys) + 2 * 2 * queries * keys * d

    layer = attention(t, t) + attention(t, n) + 2 * 2 * t * d * c.mlp_dim + attention(n, t)
    each = c.depth * layer + attention(t, n)
    prompt_projection = 2 * config.llm.width * d if c.project_prompt else 0
    each += prompt_projection
    if sam:
        each += 2 * n * d * d + 2 * 4 * n * (d // 4) * (d // 2)  # the two upsamplings
        each += 2 * (2 * d * d + d * (d // 8)) + 2 * 16 * n * (d // 8)
    else:
        each += 2 * n * d * c.channels
    image_projection = 2 * n * config.img.width * d
    return image_projection + masks * each, image_projection, masks * prompt_projection


def _again(remat: str, weights: int, attention: int) -> int:
    """What a layer's backward pass computes for the second time."""
    return {
        "none": 0,
        "dots": 0,
        "dots_no_batch": attention // 2,  # the scores, not what they mix
        "full": weights + attention,
    }[remat]
