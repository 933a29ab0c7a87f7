"""PaliGemma 2 as the transformers library has it: what benchmarks are measured against.

Needs the extra "bench" (torch, transformers); nothing here is imported by the package. The model
is made from dimensions alone, takes our parameters where the two are to agree, trains as the
published code does, and decodes greedily with the library's own `generate`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.optimization import Adafactor

from rg_jax.model.config import ModelConfig

IGNORED = -100  # the label of a token without loss, as transformers has it


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a peer runs.

    `vision`: attention of the encoder (the decoder's soft-cap leaves only "eager" there);
    `checkpointing`: layers are computed again in the backward pass; `compile`: through
    torch.compile, in training.
    """

    vision: str
    checkpointing: bool
    compile: bool


# As the published run trained, and what a careful user of the same library would set.
KINDS = {
    "published": Kind("eager", checkpointing=True, compile=False),
    "tuned": Kind("sdpa", checkpointing=False, compile=False),
    "compiled": Kind("sdpa", checkpointing=False, compile=True),
}


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """The most that torch has held on the GPU, or None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def make_config(config: ModelConfig, image_token: int) -> PaliGemmaConfig:
    """The library's config of the same dimensions; `image_token`: id that stands for a patch."""
    img, llm = config.img, config.llm
    scale = llm.head_dim if llm.query_scale == "rsqrt_head_dim" else llm.width // llm.num_heads
    return PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": img.width,
            "intermediate_size": img.mlp_dim,
            "num_hidden_layers": img.depth,
            "num_attention_heads": img.num_heads,
            "image_size": img.image_size,
            "patch_size": img.patch_size,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma2",
            "hidden_size": llm.width,
            "intermediate_size": llm.mlp_dim,
            "num_hidden_layers": llm.depth,
            "num_attention_heads": llm.num_heads,
            "num_key_value_heads": llm.num_kv_heads,
            "head_dim": llm.head_dim,
            "vocab_size": llm.vocab_size,
            "query_pre_attn_scalar": scale,
            "attn_logit_softcapping": llm.attn_softcap,
            "final_logit_softcapping": llm.final_softcap,
            "sliding_window": llm.sliding_window or 4096,
            "rms_norm_eps": llm.norm_eps,
        },
        projection_dim=llm.width,
        hidden_size=llm.width,
        image_token_index=image_token,
        vocab_size=llm.vocab_size,
    )


def make_model(
    config: ModelConfig, kind: str, image_token: int
) -> PaliGemmaForConditionalGeneration:
    """Random weights: bfloat16 on the GPU where there is one, float32 on a CPU."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    how = KINDS[kind]
    hf = make_config(config, image_token)
    hf._attn_implementation = {"": "eager", "text_config": "eager", "vision_config": how.vision}
    with torch.device(device()):
        model = PaliGemmaForConditionalGeneration._from_config(
            hf, dtype=dtype, attn_implementation=hf._attn_implementation
        )
    model.generation_config.update(do_sample=False, pad_token_id=0)
    return model.to(device())


def copy_params(model: PaliGemmaForConditionalGeneration, params: Mapping[str, Any]) -> None:
    """Our parameters (flat names) into the library's model; ValueError if one has no place."""
    state = {name: torch.from_numpy(x.copy()) for name, x in state_dict(params).items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name != "lm_head.weight"]  # tied to the table
    if missing or unknown:
        raise ValueError(f"parameters do not fit: missing {missing}, unknown {unknown}")


def state_dict(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our flat parameters under the library's names and in its layout: (out, in) matrices."""
    ours = {name: np.asarray(x, np.float32) for name, x in params.items()}
    out: dict[str, np.ndarray] = {}

    def vision(name: str, value: np.ndarray) -> None:
        out[f"model.vision_tower.{name}"] = value

    kernel = ours["img/embedding/kernel"]
    vision("embeddings.patch_embedding.weight", kernel.transpose(3, 2, 0, 1))
    vision("embeddings.patch_embedding.bias", ours["img/embedding/bias"])
    vision("embeddings.position_embedding.weight", ours["img/pos_embedding"][0])
    for ending, theirs in (("scale", "weight"), ("bias", "bias")):
        norm = ours[f"img/Transformer/encoder_norm/{ending}"]
        vision(f"post_layernorm.{theirs}", norm)
    block = "img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    for i in range(ours[f"{block}LayerNorm_0/scale"].shape[0]):
        at = f"encoder.layers.{i}."
        for n in (0, 1):
            vision(f"{at}layer_norm{n + 1}.weight", ours[f"{block}LayerNorm_{n}/scale"][i])
            vision(f"{at}layer_norm{n + 1}.bias", ours[f"{block}LayerNorm_{n}/bias"][i])
            dense = f"{block}MlpBlock_0/Dense_{n}/"
            vision(f"{at}mlp.fc{n + 1}.weight", ours[f"{dense}kernel"][i].T)
            vision(f"{at}mlp.fc{n + 1}.bias", ours[f"{dense}bias"][i])
        for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            matrix = ours[f"{attention}{name}/kernel"][i]
            vision(f"{at}self_attn.{theirs}.weight", matrix.reshape(matrix.shape[0], -1).T)
            vision(f"{at}self_attn.{theirs}.bias", ours[f"{attention}{name}/bias"][i].reshape(-1))
        matrix = ours[f"{attention}out/kernel"][i]
        vision(f"{at}self_attn.out_proj.weight", matrix.reshape(-1, matrix.shape[-1]).T)
        vision(f"{at}self_attn.out_proj.bias", ours[f"{attention}out/bias"][i])

    out["model.multi_modal_projector.linear.weight"] = ours["img/head/kernel"].T
    out["model.multi_modal_projector.linear.bias"] = ours["img/head/bias"]

    text = "model.language_model."
    out[f"{text}embed_tokens.weight"] = ours["llm/embedder/input_embedding"]
    out[f"{text}norm.weight"] = ours["llm/final_norm/scale"]
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
    layers = "llm/layers/"
    for i in range(ours[f"{layers}mlp/linear"].shape[0]):
        at = f"{text}layers.{i}."
        for name, theirs in norms.items():
            out[f"{at}{theirs}.weight"] = ours[f"{layers}{name}/scale"][i]
        if f"{layers}attn/qkv_einsum/w" in ours:
            heads = list(ours[f"{layers}attn/qkv_einsum/w"][i])
        else:
            heads = [ours[f"{layers}attn/q_einsum/w"][i], *ours[f"{layers}attn/kv_einsum/w"][i]]
        for theirs, part in zip(("q_proj", "k_proj", "v_proj"), heads, strict=True):
            # (heads, width, head_dim) → (heads · head_dim, width)
            rows = part.transpose(0, 2, 1).reshape(-1, part.shape[1])
            out[f"{at}self_attn.{theirs}.weight"] = rows
        vec = ours[f"{layers}attn/attn_vec_einsum/w"][i]
        out[f"{at}self_attn.o_proj.weight"] = vec.reshape(-1, vec.shape[-1]).T
        gate, up = ours[f"{layers}mlp/gating_einsum"][i]
        out[f"{at}mlp.gate_proj.weight"], out[f"{at}mlp.up_proj.weight"] = gate.T, up.T
        out[f"{at}mlp.down_proj.weight"] = ours[f"{layers}mlp/linear"][i].T
    return out


def inputs(model: PaliGemmaForConditionalGeneration, batch: Mapping[str, np.ndarray]) -> dict:
    """Our batch as the library takes it: patches as ids in front, suffix marked by type 1.

    The library is fed the last token too, which has nothing to predict.
    """
    rows, config = batch["text"].shape[0], model.config
    image_tokens, image_token = config.text_config.num_image_tokens, config.image_token_index

    def with_image(array, fill):
        front = np.full((rows, image_tokens), fill, np.int64)
        return torch.from_numpy(np.concatenate([front, array.astype(np.int64)], axis=1))

    pixels = torch.from_numpy(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    given = {
        "input_ids": with_image(batch["text"], image_token),
        "attention_mask": with_image(batch["mask_input"], 1),
        "token_type_ids": with_image(batch["mask_ar"], 0),
        "pixel_values": pixels.to(model.dtype),
    }
    return {name: value.to(device()) for name, value in given.items()}


class Trainer:
    """The training step of the published run: loss, accumulation, clipping, Adafactor."""

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        kind: str,
        batch: Mapping[str, np.ndarray],
        *,
        accumulation: int,
        freeze_encoder: bool,
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        clip_norm: float = 1.0,
    ):
        how = KINDS[kind]
        self.model, self.clip_norm = model, clip_norm
        model.train()
        if freeze_encoder:
            for parameter in model.model.vision_tower.parameters():
                parameter.requires_grad_(False)
        if how.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.forward = torch.compile(model) if how.compile else model
        self.optimizer = Adafactor(
            [p for p in model.parameters() if p.requires_grad],
            lr=lr,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
        whole = inputs(model, batch)
        # The library shifts labels itself; patches have none.
        text = torch.from_numpy(np.asarray(batch["text"], np.int64))
        has_loss = torch.from_numpy(np.asarray(batch["mask_loss"], bool))
        labels = torch.where(has_loss, text, IGNORED).to(device())
        front = labels.new_full((len(labels), whole["input_ids"].shape[1] - text.shape[1]), IGNORED)
        whole["labels"] = torch.cat([front, labels], dim=1)
        self.tokens = int(has_loss[:, 1:].sum())
        rows = len(text) // accumulation
        self.parts = [
            {name: value[i * rows : (i + 1) * rows] for name, value in whole.items()}
            for i in range(accumulation)
        ]

    def loss_and_gradients(self) -> torch.Tensor:
        """Adds up gradients of the mean loss per target token of the whole batch."""
        total = torch.zeros((), device=device())
        for part in self.parts:
            # The library then divides by this number instead of the part's own.
            loss = self.forward(**part, use_cache=False, num_items_in_batch=self.tokens).loss
            loss.backward()
            total += loss.detach()
        return total

    def step(self) -> float:
        """One whole step; returns the loss, when it is done."""
        self.optimizer.zero_grad(set_to_none=True)
        total = self.loss_and_gradients()
        torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], self.clip_norm
        )
        self.optimizer.step()
        wait()
        return float(total)


def generate(
    model: PaliGemmaForConditionalGeneration,
    given: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    cache: str | None = None,
) -> np.ndarray:
    """Greedy decoding of exactly `max_new_tokens` tokens per row: (B, max_new_tokens) ids."""
    model.eval()
    with torch.inference_mode():
        tokens = model.generate(
            **given,
            min_new_tokens=max_new_tokens,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            cache_implementation=cache,
        )
    wait()
    return tokens[:, given["input_ids"].shape[1] :].cpu().numpy()
