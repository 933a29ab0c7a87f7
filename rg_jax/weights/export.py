"""Weights out: a Hugging Face folder that stock `transformers` loads, or the original `.npz`.

Leaves are read when their turn comes, become tensors and are written at once: the host holds one
of our leaves beside one tensor. What is written lies under a name of its own until it is whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rg_jax.config import write_aside
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.model.config import ModelConfig
from rg_jax.weights import formats, hf_config, huggingface, names
from rg_jax.weights.hf_tokenizer import check_known, check_same, write_tokenizer
from rg_jax.weights.model_card import model_card
from rg_jax.weights.npz import save_leaves
from rg_jax.weights.source import BF16, Leaf, Source
from rg_jax.weights.torch_files import write_safetensors
from rg_jax.weights.vocabulary import TABLE

DTYPES = {"bfloat16": BF16, "float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
NOTE = "Not a medical device. For research only."
_UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3}


def parse_size(text: str) -> int:
    """`5GB` → bytes. Raises UserError."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdigit() or int(number) < 1:
        raise UserError(f"--max_shard={text}: a size such as 5GB or 500MB is needed")
    return int(number) * _UNITS[unit]


def common_dtype(leaves: Iterable[Leaf], asked: str = "") -> np.dtype:
    """The dtype to write in: that asked for, else that of all leaves, else float32.

    Raises UserError for a dtype that is not known.
    """
    if asked:
        if asked not in DTYPES:
            raise UserError(f"--dtype={asked}: must be one of {', '.join(DTYPES)}")
        return DTYPES[asked]
    found = {leaf.dtype for leaf in leaves}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def check_whole(source: Source, model: ModelConfig) -> None:
    """Raises UserError unless the source holds every parameter of `model`, and none beside."""
    rules = names.model_rules(model)
    missing = [
        key
        for name in rules
        if name not in source.leaves
        for key in source.missing.get(name, [source.label(name)])
    ]
    more = [n for n in source.leaves if n not in rules and not n.startswith("masks/")]
    unknown = [source.label(name) for name in more] + source.unknown
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"unknown: {', '.join(unknown)}"] if unknown else []
    if problems:
        raise UserError(f"{source.path} is no whole PaliGemma 2; {'; '.join(problems)}")


def check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer that does not belong to the source's table: another hash,
    other pieces than the source's own files have, or another number of tokens."""
    if TABLE not in source.leaves:
        raise UserError(f"{source.path} is a part of a model (no {TABLE}); a whole one is needed")
    check_known(tokenizer)
    check_same(source.path, source.tokens, tokenizer)
    rows = source.leaves[TABLE].shape[0]
    extra = len(tokenizer.extra_tokens)
    need = tokenizer.vocab_size if extra else tokenizer.base_size
    # Files come with up to 64 rows of padding behind the last token.
    if not need <= rows <= need + 64:
        raise UserError(
            f"{source.path} has {rows} rows for tokens, but this tokenizer has {need} "
            f"({tokenizer.base_size} pieces, {extra} extra tokens): they do not belong together; "
            "name the right file with --tokenizer=FILE"
        )


def to_folder(
    source: Source,
    folder: Path,
    tokenizer: Tokenizer,
    *,
    dtype: str = "",
    max_shard: int = 5 * 1000**3,
    show_progress: bool = True,
) -> None:
    """Writes `folder`: PaliGemma 2 as stock `transformers` loads it, the mask decoder apart.

    The table has as many rows as the source's, bit for bit; so has every other parameter, unless
    `dtype` asks for another one. Shards hold at most `max_shard` bytes (one tensor at least).
    Raises UserError for a folder that exists, and for weights that are not whole.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another name, or remove it")
    model = source.model
    if model is None:
        raise UserError(f"{source.path} is a part of a model; a folder holds a whole one")
    check_whole(source, model)
    check_tokenizer(source, tokenizer)
    kind = common_dtype((source.leaves[n] for n in names.model_rules(model)), dtype)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        tensors = {
            names.written(key): leaf
            for name, rule in names.model_rules(model).items()
            for key, leaf in names.tensors_of(rule, source.leaves[name], kind).items()
        }
        _write_shards(aside, tensors, max_shard, show_progress)
        config = hf_config.write_config(model, tokenizer.image_id, kind.name)
        _write_json(aside / hf_config.CONFIG, config)
        _write_json(aside / "generation_config.json", _GENERATION)
        _write_json(aside / "preprocessor_config.json", _preprocessor(model))
        _write_json(aside / "processor_config.json", {"processor_class": "PaliGemmaProcessor"})
        write_tokenizer(aside, tokenizer)
        if source.fmt is not None:
            _write_json(aside / huggingface.FORMAT_FILE, source.fmt.to_json())
        masks = (aside / huggingface.MASKS_FILE, aside / huggingface.MASKS_CONFIG)
        _write_masks(source, *masks, dtype)
        write_aside(aside / "README.md", model_card(source, model, kind.name))
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def to_npz(source: Source, path: Path, *, dtype: str = "", show_progress: bool = True) -> None:
    """Writes `path`, an original `.npz`; beside it what it cannot hold: grounding format,
    tokenizer, mask decoder (`NAME.grounding_format.json`, …).

    Raises UserError for a file that exists, and for weights that are not whole.
    """
    if path.exists():
        raise UserError(f"{path} exists already: choose another name, or remove it")
    if source.missing or source.unknown:
        listed = [*(key for keys in source.missing.values() for key in keys), *source.unknown]
        raise UserError(f"{source.path} is not whole: missing or unknown: {', '.join(listed)}")
    if source.model is not None:
        check_whole(source, source.model)
    leaves = {n: leaf for n, leaf in source.leaves.items() if not n.startswith("masks/")}
    path.parent.mkdir(parents=True, exist_ok=True)
    # What belongs to it first: the `.npz` itself says that all is there.
    if source.fmt is not None:
        _write_json(path.with_suffix(formats.NPZ_FORMAT), source.fmt.to_json())
    if source.tokenizer_model is not None:
        write_aside(path.with_suffix(formats.NPZ_TOKENIZER), source.tokenizer_model.read_bytes())
    masks = (path.with_suffix(formats.NPZ_MASKS), path.with_suffix(formats.NPZ_MASKS_CONFIG))
    _write_masks(source, *masks, dtype)
    with _bar(leaves.values(), show_progress) as bar:
        kind = common_dtype(leaves.values(), dtype)
        save_leaves(path, {name: _told(leaf, bar) for name, leaf in leaves.items()}, kind)


def _write_masks(source: Source, weights: Path, config: Path, dtype: str) -> None:
    if source.masks is None:
        return
    tensors = names.mask_tensors(source.leaves)
    kind = common_dtype(tensors.values(), dtype)
    write_safetensors(weights, {key: _cast(leaf, kind) for key, leaf in tensors.items()})
    _write_json(config, {**dataclasses.asdict(source.masks), "note": NOTE})


def _write_shards(
    folder: Path, tensors: Mapping[str, Leaf], max_shard: int, show_progress: bool
) -> None:
    """One file, or shards with their index, in the order of `tensors`."""
    shards: list[dict[str, Leaf]] = [{}]
    size = total = 0
    with _bar(tensors.values(), show_progress) as bar:
        for key, leaf in tensors.items():
            own = leaf.size * leaf.dtype.itemsize
            if shards[-1] and size + own > max_shard:
                shards.append({})
                size = 0
            shards[-1][key] = _told(leaf, bar)
            size, total = size + own, total + own
        if len(shards) == 1:
            write_safetensors(folder / "model.safetensors", shards[0])
            return
        places = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / name, shard)
            places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _bar(leaves: Iterable[Leaf], shown: bool) -> tqdm:
    total = sum(leaf.size for leaf in leaves)
    return tqdm(total=total, unit="param", unit_scale=True, disable=not shown, desc="writing")


def _told(leaf: Leaf, bar: tqdm) -> Leaf:
    """The leaf, which moves the bar when it is read."""

    def read(dtype: np.dtype) -> np.ndarray:
        array = leaf.read(dtype)
        bar.update(leaf.size)
        return array

    return dataclasses.replace(leaf, read=read)


def _cast(leaf: Leaf, dtype: np.dtype) -> Leaf:
    return dataclasses.replace(leaf, dtype=dtype)


_GENERATION = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "do_sample": False,
    "max_new_tokens": 200,
}


def _preprocessor(model: ModelConfig) -> dict[str, Any]:
    side = model.img.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
        "image_seq_length": model.img.num_tokens,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_aside(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
