"""Hugging Face folders of PaliGemma 2 as a source of weights, the released RadGrounder among them.

A released model is a stock folder whose tokenizer knows more tokens: these say what it writes. A
segmentation model also holds `segmentation_head.*`, the mask decoder. Folders that we have written
carry `grounding_format.json` and `mask_decoder.*` beside, which say it outright.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.errors import UserError
from rg_jax.grounding.format import (
    PUBLISHED_DETECTION,
    PUBLISHED_SEGMENTATION,
    GroundingFormat,
)
from rg_jax.model.config import MaskDecoderConfig, ModelConfig
from rg_jax.weights import hf_config, names, torch_files
from rg_jax.weights.hf_tokenizer import TOKENIZER_MODEL, extra_tokens_of, read_tokens
from rg_jax.weights.source import Leaf, Source

FORMAT_FILE = "grounding_format.json"
MASKS_FILE, MASKS_CONFIG = "mask_decoder.safetensors", "mask_decoder.json"
TRAINING_CONFIG = "training_config.json"
# The released mask decoder; the number of heads does not show in its shapes.
PUBLISHED_HEADS = 8
_TIED = "lm_head.weight"
_CHUNK = 8192


def open_folder(folder: Path) -> Source:
    """A PaliGemma 2 folder: safetensors or `.bin`, one file or shards, old and new names.

    Raises UserError for a folder that is not whole, another architecture, and keys that are there
    twice. Keys of layers that are missing or too many are kept for `source.problems`.
    """
    path = folder / hf_config.CONFIG
    given = hf_config.read_json(path)
    if given.get("model_type") != "paligemma":
        raise UserError(f"{path}: model_type is {given.get('model_type')!r}, not 'paligemma'")
    tensors = torch_files.read_folder(folder)
    found: dict[str, Leaf] = {}
    spelled: dict[str, str] = {}
    unknown, left_out = [], []
    for key, leaf in tensors.items():
        name = names.canonical(key)
        if key.endswith(names.COMPUTED):
            left_out.append(key)
        elif name is None:
            unknown.append(key)
        elif name in found:
            raise UserError(f"{folder}: {spelled[name]} and {key} are the same parameter")
        else:
            found[name], spelled[name] = leaf, key
    table = "language.embed_tokens.weight"
    if _TIED in found and table not in found:  # some versions keep the tied pair under this name
        found[table], spelled[table] = found.pop(_TIED), spelled[_TIED]

    llm = hf_config.text_config(path, given.get("text_config", {}))
    if table in found:  # in some folders the config was not told of rows that were added
        llm = dataclasses.replace(llm, vocab_size=found[table].shape[0])
    img = hf_config.vision_config(path, given.get("vision_config", {}))
    model = ModelConfig(img=img, llm=llm)
    heads = {k.removeprefix("masks."): v for k, v in found.items() if k.startswith("masks.")}
    rules = names.model_rules(model)
    leaves, missing = leaves_of(str(folder), rules, found, spelled)
    used = {key for rule in rules.values() for key in rule.all_keys} | {_TIED}
    unknown += [spelled[k] for k in found if k not in used and not k.startswith("masks.")]
    source = Source(
        str(folder),
        "Hugging Face",
        leaves,
        missing=missing,
        unknown=unknown,
        left_out=left_out,
        label=lambda name: _label(rules, spelled, name),
        model=model,
    )
    if _TIED in found:
        _check_tied(source, found[_TIED], found[table])
    _add_what_it_writes(source, folder, given)
    _add_masks(source, folder, heads)
    if (cap := hf_config.final_cap(given)) is not None:
        source.notes.append(
            f"config.json caps the logits at {cap:g}; they are not capped here, as in training "
            "(config.model.llm.final_softcap sets it)"
        )
    return source


def leaves_of(
    path: str,
    rules: Mapping[str, names.Rule],
    found: Mapping[str, Leaf],
    spelled: Mapping[str, str],
) -> tuple[dict[str, Leaf], dict[str, list[str]]]:
    """Our leaves from tensors by their canonical names; and what is missing, by leaf."""
    leaves, missing = {}, {}
    for name, rule in rules.items():
        if lacking := [names.written(key) for key in rule.all_keys if key not in found]:
            missing[name] = lacking
        else:
            names.check_shapes(path, rule, found, spelled)
            leaves[name] = names.leaf_of(rule, found)
    return leaves, missing


def _label(rules: Mapping[str, names.Rule], spelled: Mapping[str, str], name: str) -> str:
    """Our name of a leaf with the key (the first of them) that the file has for it."""
    if name.startswith("masks/"):
        return f"segmentation_head.{names.mask_key(name.removeprefix('masks/'))[0]}"
    if name not in rules:
        return name
    key = rules[name].keys[0]
    shown = spelled.get(key.format(0), names.written(key.format(0)))
    return f"{name} ({shown.replace('.0.', '.*.') if '{}' in key else shown})"


def _check_tied(source: Source, output: Leaf, table: Leaf) -> None:
    """The output is the table here; a folder in which they differ is another model."""
    if getattr(output.read, "args", 0) == getattr(table.read, "args", 1):
        return  # one tensor under two names
    same = output.shape == table.shape
    if same:
        ours, theirs = table.stored(), output.stored()
        same = all(
            np.array_equal(ours[i : i + _CHUNK], theirs[i : i + _CHUNK])
            for i in range(0, len(ours), _CHUNK)
        )
    if not same:
        raise UserError(
            f"{source.path}: lm_head.weight differs from embed_tokens.weight; in PaliGemma 2 they "
            "are one table"
        )


def _add_what_it_writes(source: Source, folder: Path, given: Mapping[str, Any]) -> None:
    """Extra tokens, and the grounding format they stand for, by the folder's own files."""
    source.tokens = read_tokens(folder)
    if (folder / TOKENIZER_MODEL).is_file():
        source.tokenizer_model = folder / TOKENIZER_MODEL
    if source.tokens is None:
        source.notes.append("holds no tokenizer: whether it has extra tokens is not known")
    else:
        image = hf_config.image_token(given)
        source.extra_tokens = extra_tokens_of(source.path, source.tokens, image)
    source.fmt = read_format(folder / FORMAT_FILE)
    for known in (PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION):
        if source.fmt is None and source.extra_tokens == known.extra_tokens:
            source.fmt = known
    if source.fmt is None and source.extra_tokens:
        source.notes.append(
            "its extra tokens are not those of a released model, and it holds no "
            f"{FORMAT_FILE}: the order of its boxes is not known"
        )
    elif source.fmt and source.extra_tokens not in (None, source.fmt.extra_tokens):
        raise UserError(
            f"{folder / FORMAT_FILE} names the extra tokens {list(source.fmt.extra_tokens)}, the "
            f"tokenizer has {list(source.extra_tokens)}"
        )
    elif source.fmt:
        source.extra_tokens = source.fmt.extra_tokens


def read_format(path: Path) -> GroundingFormat | None:
    """The grounding format in a file, None where there is no such file. Raises UserError."""
    if not path.is_file():
        return None
    try:
        return GroundingFormat.from_json(hf_config.read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _add_masks(source: Source, folder: Path, heads: dict[str, Leaf]) -> None:
    """The mask decoder: inside the weights (released) or in files of its own (ours)."""
    own = folder / MASKS_FILE
    if own.is_file():
        read_masks(source, own, folder / MASKS_CONFIG)
    elif heads:
        leaves = names.mask_leaves(heads)
        number = PUBLISHED_HEADS
        stated = folder / TRAINING_CONFIG
        if stated.is_file():
            found = hf_config.read_json(stated).get("num_heads")
            number = found if isinstance(found, int) else number
        try:
            shapes = {name: leaf.shape for name, leaf in leaves.items()}
            source.masks = hf_config.masks_of_shapes(shapes, number)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{source.path}: its segmentation_head.* is no mask decoder that is known ({error})"
            ) from error
        source.leaves |= leaves


def read_masks(source: Source, weights: Path, config: Path) -> None:
    """Adds a mask decoder that lies in files of its own. Raises UserError."""
    fields = hf_config.read_json(config)
    fields.pop("note", None)
    try:
        source.masks = MaskDecoderConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{config}: {error}") from error
    source.leaves |= names.mask_leaves(torch_files.read_safetensors(weights))
