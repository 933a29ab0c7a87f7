"""The model's dimensions and numerical settings, as plain frozen dataclasses.

Nothing here touches JAX. A config says everything that decides parameter shapes and arithmetic, so
it can be written to a run's folder (`to_dict`) and read back strictly (`from_dict`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

QUERY_SCALES = ("rsqrt_head_dim", "rsqrt_emb_per_head")
REMAT = ("none", "full", "dots", "dots_no_batch")
VISION_ATTENTION = ("xla", "cudnn")
COMPUTE_DTYPES = ("float32", "bfloat16")


def _positive(owner: str, **fields: int) -> None:
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}.{name} must be a positive integer, not {value!r}.")


def _one_of(owner: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(allowed)}, not {value!r}.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP: square images of `image_size` pixels cut into `patch_size` patches, no pooling."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16

    def __post_init__(self):
        _positive("img", **dataclasses.asdict(self))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"img.image_size {self.image_size} is not a multiple of "
                f"img.patch_size {self.patch_size}."
            )
        if self.width % self.num_heads:
            raise ValueError(
                f"img.width {self.width} is not a multiple of img.num_heads {self.num_heads}."
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Gemma 2. `vocab_size` counts the rows of the embedding table, padding rows included.

    `sliding_window` is the length up to which local and global layers are the same thing; longer
    sequences are refused (None: every layer sees everything, whatever the length).
    """

    width: int = 2304
    depth: int = 26
    mlp_dim: int = 9216
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    vocab_size: int = 257_152
    query_scale: str = "rsqrt_head_dim"
    attn_softcap: float | None = 50.0
    final_softcap: float | None = None
    post_norms: bool = True
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    sliding_window: int | None = 4096

    def __post_init__(self):
        names = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        _positive("llm", **{name: getattr(self, name) for name in names})
        _one_of("llm", "query_scale", self.query_scale, QUERY_SCALES)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"llm.num_heads {self.num_heads} is not a multiple of "
                f"llm.num_kv_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"llm.head_dim {self.head_dim} must be even: the rotary code turns pairs."
            )
        for name in ("attn_softcap", "final_softcap"):
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise ValueError(f"llm.{name} must be positive or None, not {cap!r}.")
        if self.sliding_window is not None:
            _positive("llm", sliding_window=self.sliding_window)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by before they meet the keys."""
        if self.query_scale == "rsqrt_head_dim":
            return self.head_dim**-0.5
        return (self.width / self.num_heads) ** -0.5

    @property
    def fused_qkv(self) -> bool:
        """Whether the checkpoint keeps q, k and v in one array (as many KV heads as heads)."""
        return self.num_heads == self.num_kv_heads


MASK_KINDS = ("sam", "published")


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
    """Dimensions of a mask decoder.

    `width` is that of its tokens. `project_prompt` False takes the hidden states as they are, so
    that `width` must be the decoder's (the released checkpoints). `channels`: masks per mention of
    the published form. `mask_tokens`: learned tokens of kind "sam"; the first one makes the mask,
    the others are room to work in. Raises ValueError for dimensions that do not go together.
    """

    kind: str = "sam"
    width: int = 256
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 1024
    project_prompt: bool = True
    mask_tokens: int = 4
    channels: int = 1

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise ValueError(
                f"mask decoder kind={self.kind!r} is not one of {', '.join(MASK_KINDS)}"
            )
        names = ("width", "depth", "num_heads", "mlp_dim", "mask_tokens", "channels")
        _positive("masks", **{name: getattr(self, name) for name in names})
        if self.width % self.num_heads:
            raise ValueError(
                f"masks.width {self.width} is not a multiple of {self.num_heads} heads"
            )
        if self.kind == "sam" and (self.width % 8 or self.channels != 1):
            raise ValueError(
                "masks.kind sam needs a width that is a multiple of 8, and one channel"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors beside frozen weights, see `rg_jax.model.lora`.

    `include`: regexes for the whole names of the weights that get some, e.g.
    "llm/layers/attn/.*". `new_rows`: how many of the last predictable rows of the token table
    learn. Raises ValueError for a rank or alpha that is not positive.
    """

    rank: int = 16
    alpha: float = 32.0
    include: Sequence[str] = ("llm/layers/(attn|mlp)/.*",)
    new_rows: int = 0

    def __post_init__(self) -> None:
        _positive("lora", rank=self.rank)
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be positive, not {self.alpha!r}.")
        if not self.include:
            raise ValueError("lora.include names no parameter.")
        object.__setattr__(self, "include", tuple(self.include))

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    - `valid_vocab`: table rows from here on are padding: never predicted, never in a softmax's sum.
    - `compute_dtype`: what the matrix products run in; parameters keep their own dtype.
    - `remat`: what the backward pass recomputes: "none" keeps every intermediate, "full" only each
      layer's input, "dots" the results of matrix products, "dots_no_batch" those with weights and
      what attention mixed.
    - `vision_attention`: "cudnn" runs the encoder's attention in cuDNN's fused kernel (a GPU and
      bfloat16). The decoder's soft-cap rules that kernel out there.
    - `unroll`: how many layers one turn of the layer loop holds: more means longer compilation.
      From the number of layers on there is no loop: nothing is copied into stacks and out of them,
      and what is kept for the backward pass is freed layer by layer (an accelerator's choice).
    - `masks`: the mask decoder beside them; None: boxes only, exactly the original model.
    - `lora`: low-rank factors beside the weights; None: there are none.
    """

    img: VisionConfig = VisionConfig()
    llm: DecoderConfig = DecoderConfig()
    valid_vocab: int | None = None
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    vision_attention: str = "xla"
    unroll: int = 1
    masks: MaskDecoderConfig | None = None
    lora: LoraConfig | None = None

    def __post_init__(self):
        _one_of("model", "compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _one_of("model", "remat", self.remat, REMAT)
        _one_of("model", "vision_attention", self.vision_attention, VISION_ATTENTION)
        _positive("model", unroll=self.unroll)
        if self.valid_vocab is not None:
            _positive("model", valid_vocab=self.valid_vocab)
            if self.valid_vocab > self.llm.vocab_size:
                raise ValueError(
                    f"model.valid_vocab {self.valid_vocab} is larger than the "
                    f"{self.llm.vocab_size} rows of the table (llm.vocab_size)."
                )
        if self.vision_attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise ValueError("model.vision_attention 'cudnn' needs compute_dtype 'bfloat16'.")
        masks = self.masks
        if masks and not masks.project_prompt and masks.width != self.llm.width:
            raise ValueError(
                f"masks.project_prompt=False needs masks.width {self.llm.width}, that of the "
                f"decoder, not {masks.width}."
            )

    @property
    def num_predictable(self) -> int:
        """Rows of the table that can be predicted."""
        return self.valid_vocab or self.llm.vocab_size

    def replace(self, **overrides: Any) -> ModelConfig:
        """A copy with other settings; `img` and `llm` may be mappings of what changes in them.

        Raises ValueError for a setting that does not exist, naming it.
        """
        changes: dict[str, Any] = {}
        for name, value in overrides.items():
            if name in ("img", "llm") and isinstance(value, Mapping):
                value = _replace(name, getattr(self, name), value)
            changes[name] = value
        return _replace("model", self, changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for a missing or unknown field."""
        fields = _exactly("model", cls, fields)
        fields["img"] = VisionConfig(**_exactly("img", VisionConfig, fields["img"]))
        fields["llm"] = DecoderConfig(**_exactly("llm", DecoderConfig, fields["llm"]))
        if fields["masks"] is not None:
            masks = _exactly("masks", MaskDecoderConfig, fields["masks"])
            fields["masks"] = MaskDecoderConfig(**masks)
        if fields["lora"] is not None:
            fields["lora"] = LoraConfig(**_exactly("lora", LoraConfig, fields["lora"]))
        return cls(**fields)


def _replace(owner: str, config: Any, changes: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - names):
        raise ValueError(
            f"{owner} has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}."
        )
    return dataclasses.replace(config, **changes)


def _exactly(owner: str, cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - names):
        raise ValueError(f"{owner}: unknown field {', '.join(unknown)}.")
    if missing := sorted(names - set(fields)):
        raise ValueError(f"{owner}: missing field {', '.join(missing)}.")
    return dict(fields)


# PaliGemma 2 comes with three sizes of Gemma 2 behind one SigLIP So400m. "tiny" is for training
# from scratch on a CPU: it goes through every line the large ones go through.
_VARIANTS: dict[str, ModelConfig] = {
    "3b": ModelConfig(),
    "10b": ModelConfig(
        llm=DecoderConfig(width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8)
    ),
    "28b": ModelConfig(
        llm=DecoderConfig(
            width=4608,
            depth=46,
            mlp_dim=36_864,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            query_scale="rsqrt_emb_per_head",
        )
    ),
    "tiny": ModelConfig(
        img=VisionConfig(image_size=112, width=96, depth=3, mlp_dim=256, num_heads=4),
        llm=DecoderConfig(
            width=128,
            depth=3,
            mlp_dim=384,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            vocab_size=2048,
        ),
        compute_dtype="float32",
    ),
}
VARIANTS = tuple(_VARIANTS)


def from_variant(
    variant: str, *, image_size: int | None = None, vocab_size: int | None = None, **overrides: Any
) -> ModelConfig:
    """One of the known sizes ("3b", "10b", "28b", "tiny"), with whatever is to differ.

    `image_size` is in pixels and `vocab_size` in table rows; other overrides are those of
    `ModelConfig.replace`, e.g. `from_variant("3b", image_size=448, llm={"depth": 2})`.
    """
    if variant not in _VARIANTS:
        raise ValueError(f"Unknown model variant {variant!r}; known: {', '.join(VARIANTS)}.")
    config = _VARIANTS[variant]
    if image_size is not None:
        config = config.replace(img={"image_size": image_size})
    if vocab_size is not None:
        config = config.replace(llm={"vocab_size": vocab_size})
    return config.replace(**overrides)


def shape_table(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every parameter, names as in the original checkpoints (`img/…`, `llm/…`).

    A mask decoder is no part of those: its parameters (`masks/…`) are not listed.
    """
    img, llm = config.img, config.llm
    w, m, h, d = img.width, img.mlp_dim, img.num_heads, img.head_dim
    block: dict[str, tuple[int, ...]] = {}
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        block |= {f"{norm}/scale": (w,), f"{norm}/bias": (w,)}
    block |= {
        "MlpBlock_0/Dense_0/kernel": (w, m),
        "MlpBlock_0/Dense_0/bias": (m,),
        "MlpBlock_0/Dense_1/kernel": (m, w),
        "MlpBlock_0/Dense_1/bias": (w,),
    }
    for name in ("query", "key", "value"):
        block[f"MultiHeadDotProductAttention_0/{name}/kernel"] = (w, h, d)
        block[f"MultiHeadDotProductAttention_0/{name}/bias"] = (h, d)
    block["MultiHeadDotProductAttention_0/out/kernel"] = (h, d, w)
    block["MultiHeadDotProductAttention_0/out/bias"] = (w,)

    n, k, width, head, mlp = llm.num_heads, llm.num_kv_heads, llm.width, llm.head_dim, llm.mlp_dim
    layer: dict[str, tuple[int, ...]] = {}
    if llm.fused_qkv:
        layer["attn/qkv_einsum/w"] = (3, n, width, head)
    else:
        layer["attn/q_einsum/w"] = (n, width, head)
        layer["attn/kv_einsum/w"] = (2, k, width, head)
    layer["attn/attn_vec_einsum/w"] = (n, head, width)
    layer["mlp/gating_einsum"] = (2, width, mlp)
    layer["mlp/linear"] = (mlp, width)
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    if llm.post_norms:
        norms += ["post_attention_norm", "post_ffw_norm"]
    layer |= {f"{name}/scale": (width,) for name in norms}

    table = {
        "img/embedding/kernel": (img.patch_size, img.patch_size, 3, w),
        "img/embedding/bias": (w,),
        "img/pos_embedding": (1, img.num_tokens, w),
        "img/Transformer/encoder_norm/scale": (w,),
        "img/Transformer/encoder_norm/bias": (w,),
        "img/head/kernel": (w, width),
        "img/head/bias": (width,),
        "llm/embedder/input_embedding": (llm.vocab_size, width),
        "llm/final_norm/scale": (width,),
    }
    for name, shape in block.items():
        table[f"img/Transformer/encoderblock/{name}"] = (img.depth, *shape)
    for name, shape in layer.items():
        table[f"llm/layers/{name}"] = (llm.depth, *shape)
    return table


def count_params(config: ModelConfig) -> int:
    """How many numbers `shape_table` lists, from the dimensions alone."""
    return sum(math.prod(shape) for shape in shape_table(config).values())
