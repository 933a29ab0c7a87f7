"""Tiny models of `transformers`, saved as the real ones are; and the released mask decoder."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

SIDE, PATCH = 12, 4
TOKENS = (SIDE // PATCH) ** 2
WIDTH, ENCODER_WIDTH = 24, 16


def paligemma_config(rows: int, image_id: int, **changes) -> PaliGemmaConfig:
    """Grouped heads, a head that is not width / heads, two layers of everything."""
    text = {
        "model_type": "gemma2",
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "vocab_size": rows,
        "final_logit_softcapping": None,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": ENCODER_WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    return PaliGemmaConfig(
        text_config={**text, **changes},
        vision_config=vision,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
        image_token_index=image_id,
    )


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Also what starts at 0 or 1, so that nothing goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(0, scale, generator=generator)


class Attention(nn.Module):
    """Queries look at keys; four linear maps of one width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, queries, keys, values):
        def split(x):
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(queries)), split(self.k_proj(keys)), split(self.v_proj(values))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """One layer of the two-way transformer, token and image looking at each other in turn."""

    def __init__(self, width: int, heads: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, heads)
        self.cross_attn_token_to_image = Attention(width, heads)
        self.cross_attn_image_to_token = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        for i in range(1, 5):
            setattr(self, f"norm{i}", nn.LayerNorm(width))

    def forward(self, token, image, code):
        query = token if self.first else token + code
        token = self.norm1(token + self.self_attn(query, query, token))
        token = self.norm2(token + self.cross_attn_token_to_image(token + code, image, image))
        token = self.norm3(token + self.mlp(token))
        image = self.norm4(image + self.cross_attn_image_to_token(image, token + code, token))
        return token, image


class TwoWay(nn.Module):
    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(width, heads)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, token, image):
        code = token
        for layer in self.layers:
            token, image = layer(token, image, code)
        found = self.final_attn_token_to_image(token, image, image)
        return self.norm_final_attn(token + found), image


class MaskHead(nn.Module):
    """The released mask decoder: features (B, N, W), prompt (B, D) → logits (B, C, h, w)."""

    def __init__(self, features: int, width: int, heads: int, depth: int = 2, classes: int = 1):
        super().__init__()
        self.img_projection = nn.Linear(features, width)
        self.transformer = TwoWay(width, heads, depth)
        self.output_proj = nn.Linear(width, classes)

    def forward(self, features, prompt):
        token, image = self.transformer(prompt[:, None], self.img_projection(features))
        logits = self.output_proj(image + token)
        side = int(logits.shape[1] ** 0.5)
        return logits.transpose(1, 2).unflatten(-1, (side, side))


class ReleasedSegmentation(PaliGemmaForConditionalGeneration):
    """PaliGemma 2 with the mask decoder inside, as the released segmentation model is saved."""

    def __init__(self, config):
        super().__init__(config)
        self.segmentation_head = MaskHead(ENCODER_WIDTH, WIDTH, heads=8)


def save_released(folder: Path, model, tokenizer, image_id: int, **save) -> None:
    """A released folder: weights, config, the tokenizer's files, the training's own config."""
    model.save_pretrained(folder, **save)
    vocab = {tokenizer.piece(i): i for i in range(tokenizer.base_size)}
    added = [{"id": image_id, "content": "<image>", "special": True}]
    added += [
        {"id": i, "content": text, "special": False}
        for i, text in zip(tokenizer.extra_ids, tokenizer.extra_tokens, strict=True)
    ]
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": added})
    )
    (folder / "training_config.json").write_text(json.dumps({"learning_rate": 5e-5}))
    tokenizer.save(folder / "tokenizer.model")


class Released:
    """A tiny model of a kind, its folder, and the torch model in memory."""

    def __init__(self, folder, tokenizer, kind, **save):
        self.folder, self.tokenizer, self.kind = folder, tokenizer, kind
        # As published: no padding row behind the extra tokens; stock folders have 64 of them.
        rows = tokenizer.vocab_size if tokenizer.extra_ids else tokenizer.base_size + 64
        cls = ReleasedSegmentation if kind == "segmentation" else PaliGemmaForConditionalGeneration
        self.model = cls(paligemma_config(rows, tokenizer.image_id))
        randomise(self.model, seed=len(kind))
        save_released(folder, self.model, tokenizer, tokenizer.image_id, **save)


def forward(model, images: np.ndarray, text: np.ndarray, mask_ar: np.ndarray, image_id: int):
    """Logits over text positions and hidden states of the torch model. images: (B, S, S, 3)."""
    rows, tokens = len(text), images.shape[1] // PATCH * (images.shape[2] // PATCH)
    ids = np.concatenate([np.full((rows, tokens), image_id), text], axis=1)
    kinds = np.concatenate([np.zeros((rows, tokens)), mask_ar], axis=1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.eval()(
            input_ids=torch.tensor(ids, dtype=torch.long),
            pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
            token_type_ids=torch.tensor(kinds, dtype=torch.long),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            output_hidden_states=True,
        )
    return out.logits[:, tokens:].numpy(), out.hidden_states[-1].numpy()
