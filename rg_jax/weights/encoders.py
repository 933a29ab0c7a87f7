"""SigLIP encoders alone: the adapted one of RadGrounder (`.ckpt`), Hugging Face's folders.

They give `img/…` without the projector. What else such files hold (text tower, attention pool,
temperature) is left out and told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rg_jax.errors import UserError
from rg_jax.model.config import VisionConfig
from rg_jax.weights import hf_config, names, torch_files
from rg_jax.weights.huggingface import leaves_of
from rg_jax.weights.source import Leaf, Source

# Heads of the encoders known by their width: a file of tensors alone does not say them.
HEADS = {768: 12, 1024: 16, 1152: 16}

_TRUNK = "model.visual.trunk."
_TIMM = (
    (re.compile(r"patch_embed\.proj\.(.+)"), r"vision.embeddings.patch_embedding.\1"),
    (re.compile(r"blocks\.(\d+)\.norm([12])\.(.+)"), r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (
        re.compile(r"blocks\.(\d+)\.attn\.proj\.(.+)"),
        r"vision.encoder.layers.\1.self_attn.out_proj.\2",
    ),
    (re.compile(r"blocks\.(\d+)\.(mlp\.fc[12]\..+)"), r"vision.encoder.layers.\1.\2"),
    (re.compile(r"norm\.(.+)"), r"vision.post_layernorm.\1"),
)
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def open_checkpoint(path: Path, num_heads: int | None = None) -> Source:
    """The encoder in a `.ckpt` of the published SigLIP adaptation (timm's names, fused q, k, v).

    `num_heads`: where the width is not one of a known encoder. Raises UserError for a file that is
    damaged or wants to run code, and one without `model.visual.trunk.*`. Any other key of the
    visual tower is unknown, and then refused by whoever loads it.
    """
    return _of_timm(str(path), torch_files.read_pickled(path), num_heads)


def _of_timm(path: str, tensors: Mapping[str, Leaf], num_heads: int | None) -> Source:
    found: dict[str, Leaf] = {}
    unknown, left_out = [], []
    for key, leaf in tensors.items():
        trunk = key.removeprefix(_TRUNK)
        fused = _QKV.fullmatch(trunk)
        if "visual" not in key or trunk.startswith("attn_pool."):
            left_out.append(key)
        elif trunk == key:
            unknown.append(key)
        elif trunk == "pos_embed":
            name = "vision.embeddings.position_embedding.weight"
            if len(leaf.shape) != 3 or leaf.shape[0] != 1:
                raise UserError(f"{path}: {key} is {leaf.shape}, not (1, positions, width)")
            found[name] = _part(leaf, 0, leaf.shape[1:])
        elif fused:
            third = (leaf.shape[0] // 3, *leaf.shape[1:])
            if 3 * third[0] != leaf.shape[0]:
                raise UserError(f"{path}: {key} is {leaf.shape}: not three of a kind")
            for i, kind in enumerate("qkv"):
                name = f"vision.encoder.layers.{fused[1]}.self_attn.{kind}_proj.{fused[2]}"
                found[name] = _part(leaf, i, third)
        else:
            for pattern, ours in _TIMM:
                if pattern.fullmatch(trunk):
                    found[pattern.sub(ours, trunk)] = leaf
                    break
            else:
                unknown.append(key)
    if not found and not unknown:
        raise UserError(f"{path}: holds no encoder: no key begins with {_TRUNK}")
    config = vision_of_tensors(path, found, num_heads)
    return _encoder(path, "SigLIP .ckpt", config, found, unknown, left_out)


def _part(leaf: Leaf, index: int, shape: tuple[int, ...]) -> Leaf:
    """One of several equal parts along the first axis, dropped where it has length one."""

    def read(dtype: np.dtype) -> np.ndarray:
        return leaf.stored().reshape(-1, *shape)[index].astype(dtype, copy=False)

    return Leaf(shape, leaf.dtype, read)


def open_siglip(folder: Path) -> Source:
    """The encoder of a SigLIP or SigLIP 2 folder in Hugging Face form (whole, or vision alone).

    Raises UserError for another architecture (the NaFlex kind of SigLIP 2 cuts images otherwise).
    """
    path = folder / hf_config.CONFIG
    given = hf_config.read_json(path)
    kind = given.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"{path}: model_type is {kind!r}; known are paligemma, siglip and siglip_vision_model "
            "(SigLIP 2 with a fixed size is one of these)"
        )
    whole = kind == "siglip"
    fields = given.get("vision_config", {}) if whole else given
    found: dict[str, Leaf] = {}
    unknown, left_out = [], []
    for key, leaf in torch_files.read_folder(folder).items():
        name = key.removeprefix("vision_model.")
        text = key.startswith(("text_model.", "logit_"))
        if text or name.startswith("head.") or name.endswith(names.COMPUTED):
            left_out.append(key)
        elif name.startswith(("embeddings.", "encoder.", "post_layernorm.")):
            found[f"vision.{name}"] = leaf
        else:
            unknown.append(key)
    config = hf_config.vision_config(path, fields)
    return _encoder(str(folder), "SigLIP folder", config, found, unknown, left_out)


def vision_of_tensors(
    path: str, found: Mapping[str, Leaf], num_heads: int | None = None
) -> VisionConfig:
    """The dimensions of an encoder by its tensors. Raises UserError where they do not show."""
    try:
        width, _, patch, _ = found["vision.embeddings.patch_embedding.weight"].shape
        tokens = found["vision.embeddings.position_embedding.weight"].shape[0]
        mlp = found["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
        layers = {int(k.split(".")[3]) for k in found if k.startswith("vision.encoder.layers.")}
        heads = num_heads or HEADS.get(width)
        if heads is None:
            raise UserError(
                f"{path}: an encoder of width {width} is not known, and its file does not say how "
                "many heads it has: name the model's size, or load it into a run"
            )
        side = round(tokens**0.5)
        return VisionConfig(side * patch, patch, width, max(layers) + 1, mlp, heads)
    except KeyError as error:
        raise UserError(f"{path}: this encoder lacks {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: no encoder that is known: {error}") from error


def _encoder(
    path: str,
    kind: str,
    config: VisionConfig,
    found: Mapping[str, Leaf],
    unknown: list[str],
    left_out: list[str],
) -> Source:
    rules = names.encoder_rules(config)
    leaves, missing = leaves_of(path, rules, found, {})
    used = {key for rule in rules.values() for key in rule.all_keys}
    unknown = unknown + [key for key in found if key not in used]
    notes = []
    if left_out:
        towers = sorted({".".join(key.split(".")[:2]) for key in left_out})
        notes.append(f"{len(left_out)} tensors of other parts are left out ({', '.join(towers)})")
    return Source(
        path,
        kind,
        leaves,
        missing=missing,
        unknown=unknown,
        left_out=left_out,
        parts=("img",),
        notes=notes,
    )
