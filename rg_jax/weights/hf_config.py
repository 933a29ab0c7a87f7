"""`config.json` of a Hugging Face PaliGemma 2 or SigLIP folder ↔ the model's dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rg_jax.errors import UserError
from rg_jax.model.config import DecoderConfig, MaskDecoderConfig, ModelConfig, VisionConfig

CONFIG = "config.json"
# What the library takes for a field that a file leaves out.
_VISION = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
_TEXT = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
}
_VISION_FIELDS = dict(zip(_VISION, VisionConfig.__dataclass_fields__, strict=True))
_TEXT_FIELDS = dict(
    zip(
        _TEXT,
        ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size"),
        strict=True,
    )
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for a file that is not there or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def vision_config(path: Path, given: Mapping[str, Any]) -> VisionConfig:
    """The encoder of a `vision_config`. Raises UserError for one that computes something else."""
    _expect(path, "vision_config", given, "hidden_act", "gelu_pytorch_tanh")
    _expect(path, "vision_config", given, "layer_norm_eps", 1e-6)
    _expect(path, "vision_config", given, "num_channels", 3)
    fields = {ours: given.get(name, _VISION[name]) for name, ours in _VISION_FIELDS.items()}
    for name in ("image_size", "patch_size"):  # a pair in some versions
        if isinstance(fields[name], list) and len(set(fields[name])) == 1:
            fields[name] = fields[name][0]
    return _built(path, "vision_config", VisionConfig, fields)


def text_config(path: Path, given: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a `text_config`, its final cap left out (see `final_cap`).

    Raises UserError for a decoder that is not Gemma 2, as in the first PaliGemma.
    """
    kind = given.get("model_type")
    if kind != "gemma2":
        raise UserError(f"{path}: text_config.model_type is {kind!r}; only gemma2 is known")
    _expect(path, "text_config", given, "hidden_activation", "gelu_pytorch_tanh")
    fields = {ours: given.get(name, _TEXT[name]) for name, ours in _TEXT_FIELDS.items()}
    head_dim, per_head = fields["head_dim"], fields["width"] / fields["num_heads"]
    scalar = given.get("query_pre_attn_scalar", 256)
    scales = {head_dim: "rsqrt_head_dim", per_head: "rsqrt_emb_per_head"}
    if scalar not in scales:
        raise UserError(
            f"{path}: text_config.query_pre_attn_scalar is {scalar}; known are the width of a "
            f"head ({head_dim}) and the model's width per head ({per_head:g})"
        )
    rope = given.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or given.get("rope_scaling"):
        raise UserError(f"{path}: text_config scales its rotary positions: not supported")
    fields |= {
        "query_scale": "rsqrt_head_dim" if scalar == head_dim else scales[scalar],
        "attn_softcap": given.get("attn_logit_softcapping", 50.0),
        "rope_base": float(rope.get("rope_theta", given.get("rope_theta", 10_000.0))),
        "norm_eps": given.get("rms_norm_eps", 1e-6),
        "sliding_window": given.get("sliding_window", 4096),
    }
    return _built(path, "text_config", DecoderConfig, fields)


def final_cap(given: Mapping[str, Any]) -> float | None:
    """The soft-cap that a `text_config` names for the logits.

    It is not taken over: PaliGemma 2 was trained without, and so were the published models, by
    versions of the library that wrote this field and did not apply it.
    """
    return given.get("text_config", {}).get("final_logit_softcapping")


def image_token(given: Mapping[str, Any]) -> int:
    """The id of `<image>`, behind which a model's extra tokens begin."""
    return given.get("image_token_index", given.get("image_token_id", 257_152))


def write_config(model: ModelConfig, image_id: int, dtype: str) -> dict[str, Any]:
    """`config.json` of a PaliGemma 2 folder. `image_id` is that of `<image>`.

    The final cap is written as null where there is none: left out, the library would cap at 30.
    Raises UserError for a decoder that Gemma 2 in that library cannot be.
    """
    img, llm = model.img, model.llm
    if not llm.post_norms:
        raise UserError("llm.post_norms=False has no counterpart in Hugging Face's Gemma 2")
    scalar = llm.head_dim if llm.query_scale == "rsqrt_head_dim" else llm.width / llm.num_heads
    if scalar != int(scalar):
        raise UserError(f"a query scale of 1/sqrt({scalar}) cannot be written to config.json")
    if llm.width % llm.num_heads:
        raise UserError(
            f"llm.width {llm.width} is not a multiple of llm.num_heads {llm.num_heads}, as Hugging "
            "Face's Gemma 2 wants it"
        )
    vision = {theirs: getattr(img, ours) for theirs, ours in _VISION_FIELDS.items()}
    text = {theirs: getattr(llm, ours) for theirs, ours in _TEXT_FIELDS.items()}
    kinds = ["full_attention"] * llm.depth
    if llm.sliding_window is not None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(llm.depth)]
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "image_token_index": image_id,
        "hidden_size": llm.width,
        "projection_dim": llm.width,
        "vocab_size": llm.vocab_size,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "text_config": {
            **text,
            "model_type": "gemma2",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": int(scalar),
            "attn_logit_softcapping": llm.attn_softcap,
            "final_logit_softcapping": llm.final_softcap,
            "rms_norm_eps": llm.norm_eps,
            "rope_theta": llm.rope_base,
            "rope_parameters": {"rope_theta": llm.rope_base, "rope_type": "default"},
            "sliding_window": llm.sliding_window,
            "layer_types": kinds,
            "num_image_tokens": img.num_tokens,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "dtype": dtype,
        },
        "vision_config": {
            **vision,
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "num_channels": 3,
            "num_image_tokens": img.num_tokens,
            "projection_dim": llm.width,
            "vision_use_head": False,
            "dtype": dtype,
        },
    }


def config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The dimensions that leaves of these shapes have; None where a part of the model is missing.

    What shapes do not show (the query scale) is that of the known size of the same dimensions.
    """
    try:
        patch, _, _, width = shapes["img/embedding/kernel"]
        tokens = shapes["img/pos_embedding"][1]
        block = "img/Transformer/encoderblock/"
        depth, _, heads, _ = shapes[f"{block}MultiHeadDotProductAttention_0/query/kernel"]
        mlp = shapes[f"{block}MlpBlock_0/Dense_0/kernel"][-1]
        img = VisionConfig(round(tokens**0.5) * patch, patch, width, depth, mlp, heads)
        layers, n, head_dim, d = shapes["llm/layers/attn/attn_vec_einsum/w"]
        kv = shapes.get("llm/layers/attn/kv_einsum/w")
        llm = DecoderConfig(
            width=d,
            depth=layers,
            mlp_dim=shapes["llm/layers/mlp/linear"][1],
            num_heads=n,
            num_kv_heads=kv[2] if kv else n,
            head_dim=head_dim,
            vocab_size=shapes["llm/embedder/input_embedding"][0],
            post_norms="llm/layers/post_attention_norm/scale" in shapes,
            # The 27B decoder alone divides by its width per head; it has 4608 and 32 of them.
            query_scale="rsqrt_emb_per_head" if (d, n) == (4608, 32) else "rsqrt_head_dim",
        )
    except (KeyError, ValueError, IndexError):
        return None
    return ModelConfig(img=img, llm=llm)


def masks_of_shapes(shapes: Mapping[str, tuple[int, ...]], num_heads: int) -> MaskDecoderConfig:
    """The mask decoder whose leaves (`masks/…`) have these shapes; heads do not show in them.

    Raises KeyError or ValueError where they are no mask decoder.
    """
    layer = "masks/transformer/layers_{}/mlp_in/kernel"
    depth = 0
    while layer.format(depth) in shapes:
        depth += 1
    width, mlp = shapes[layer.format(0)]
    published = "masks/output_proj/kernel" in shapes
    return MaskDecoderConfig(
        kind="published" if published else "sam",
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=mlp,
        project_prompt="masks/prompt_projection/kernel" in shapes,
        mask_tokens=1 if published else shapes["masks/mask_tokens"][0],
        channels=shapes["masks/output_proj/kernel"][1] if published else 1,
    )


def _expect(path: Path, part: str, given: Mapping[str, Any], field: str, value: Any) -> None:
    if given.get(field, value) != value:
        raise UserError(f"{path}: {part}.{field} is {given[field]!r}; only {value!r} is known")


def _built(path: Path, part: str, cls: type, fields: Mapping[str, Any]) -> Any:
    try:
        return cls(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {part}: {error}") from error
