"""The folder of a training run as a source of weights, and a run made of other weights."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from rg_jax import config as config_lib
from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.training.checkpoints import Checkpoints
from rg_jax.training.state import describe, flatten, unflatten
from rg_jax.weights.hf_tokenizer import check_known, tokens_of
from rg_jax.weights.model_card import facts_of_run
from rg_jax.weights.source import Leaf, Source

LORA = "lora/"


def open_run_folder(folder: Path, step: int | None = None) -> Source:
    """A run's newest checkpoint, or that of `step`. Low-rank factors are merged into the weights
    that they adapt; the table's padding rows are left out.

    Raises UserError if this is no run's folder or it holds no whole checkpoint.
    """
    config = run_lib.load_config(folder)
    fmt = run_lib.grounding_format(config)
    tokenizer = Tokenizer.load(folder / run_lib.TOKENIZER_FILE, fmt.extra_tokens)
    model = run_lib.model_config(config, tokenizer.vocab_size)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.latest() if step is None else step
    checkpoints.close()
    if step is None:
        raise UserError(f"{folder}/checkpoints holds no complete checkpoint")
    place = folder.absolute() / "checkpoints" / str(step) / "params"
    held = _read(place, None)
    flat = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in held.items()}
    rows = tokenizer.vocab_size
    leaves = {}
    for name, (shape, dtype) in flat.items():
        if name.startswith(LORA):
            continue
        own = {n: flat[n] for n in flat if n == name or n.startswith(f"{LORA}{name}/")}
        cut = rows if name == "llm/embedder/input_embedding" else None
        shape = shape if cut is None else (cut, *shape[1:])
        leaves[name] = Leaf(shape, dtype, _reader(place, name, own, model, cut))
    plain = model.replace(llm={"vocab_size": rows}, valid_vocab=None)
    merged = [name for name in flat if name.startswith(LORA)]
    return Source(
        str(folder),
        "run",
        leaves,
        model=dataclasses.replace(plain, masks=None),
        extra_tokens=fmt.extra_tokens,
        fmt=fmt,
        masks=model.masks,
        tokens=tokens_of(tokenizer),
        tokenizer_model=folder / run_lib.TOKENIZER_FILE,
        facts=facts_of_run(folder, config, step),
        notes=[f"{len(merged)} low-rank factors are merged into its weights"] if merged else [],
    )


def _reader(place: Path, name: str, own: dict[str, Any], model, rows: int | None):
    def read(dtype: np.dtype) -> np.ndarray:
        arrays = _read(place, own)
        if len(own) > 1:
            from rg_jax.model.lora import merge

            # In the wanted dtype before the factors go in: what they add is small, and would be
            # rounded away in a frozen weight's bfloat16.
            arrays[name] = np.asarray(arrays[name]).astype(dtype)
            arrays = flatten(merge(unflatten(arrays), model))
        array = np.asarray(arrays[name])
        return (array if rows is None else array[:rows]).astype(dtype, copy=False)

    return read


def _read(place: Path, wanted: dict[str, Any] | None) -> dict[str, Any]:
    """The flat leaves named in `wanted`, as NumPy arrays; None: the metadata of all leaves."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            if wanted is None:
                return flatten(reader.metadata(place).item_metadata.tree)
            item = unflatten({n: jax.ShapeDtypeStruct(*own) for n, own in wanted.items()})
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=numpy, partial_restore=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return flatten(reader.restore(place, args=args))
    except (OSError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint {place} cannot be read: {detail}") from error


def write_run(source: Source, folder: Path, config: Any, tokenizer: str | None = None) -> None:
    """Makes `folder` a run that begins and ends with the source's weights, for evaluation.

    `config` gives data and evaluation; dimensions, grounding format and mask decoder are those of
    the source, the tokenizer is `tokenizer`, or lies beside it. Nothing was trained: to train,
    name the source as `config.weights` of a run. Raises UserError for a folder that exists, a part
    of a model, and weights that do not say how they write places.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another name, or remove it")
    if source.model is None:
        raise UserError(f"{source.path} is a part of a model; a run needs a whole one")
    path = tokenizer or source.tokenizer_model
    with config.unlocked():
        if source.fmt is not None:
            config.weights_format = "weights"
        config.weights, config.encoder_weights = source.path, ""
        start_lib.adopt_format(config)
        img, llm = dataclasses.asdict(source.model.img), dataclasses.asdict(source.model.llm)
        del llm["vocab_size"]
        config.model.image_size = img.pop("image_size")
        config.model.img, config.model.llm = img, llm
        if path is not None:
            config.tokenizer = {"path": str(path), "sha256": "", "vocab_size": 0}
        # A run has to train something; one norm's few numbers need no room.
        config.schedule = [("llm/final_norm/scale", {"decay": "cosine"}), (".*", None)]
        config.frozen_dtype = source.leaves["llm/final_norm/scale"].dtype.name
        config.total_steps, config.total_epochs, config.total_examples = 1, None, None
    config_lib.check(config)
    if config.tokenizer.vocab_size or not config.tokenizer.path:
        raise UserError(f"{source.path} has no tokenizer beside it: give --tokenizer=FILE")
    fmt = run_lib.grounding_format(config)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        words = run_lib.make_tokenizer(config, fmt, aside / run_lib.TOKENIZER_FILE, list)
        check_known(words)
        run = run_lib.assemble(config, fmt, words, total_steps=1)
        state = start_lib.first_state(run)
        checkpoints = Checkpoints(aside / "checkpoints")
        checkpoints.save(0, state, _NoData(), wait=True)
        checkpoints.close()
        run_lib.save_description(run, aside, describe(run.shapes))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _NoData:
    """In the place of a training run's place in its data."""

    def get_state(self) -> dict[str, Any]:
        return {}
