"""Where a run starts: what must be there, and from what its parameters are made.

Random numbers, original weights in any form that `rg_jax.weights` knows, an earlier run with or
without LoRA, an encoder of its own over any of them; what these lack begins at random, and is told.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from rg_jax import run as run_lib
from rg_jax.data.sources import open_source
from rg_jax.errors import UserError
from rg_jax.model.config import MaskDecoderConfig
from rg_jax.model.lora import merge
from rg_jax.training.state import TrainState, flatten, new_state, unflatten
from rg_jax.weights.formats import open_weights, split_part
from rg_jax.weights.start import check_writes_alike, read_start


def first_state(run: run_lib.Run) -> TrainState:
    """A new state: from an earlier run or the weights that the config names, with the encoder of
    `config.encoder_weights`; what they lack from random numbers."""
    wanted = {**run.shapes.trainable, **run.shapes.frozen}
    places = {**run.shardings.trainable, **run.shardings.frozen}
    params = _of_earlier_run(run, wanted) if is_run(run.config.weights) else {}
    params |= _read_weights(run, wanted, places)
    if fresh := [name for name in wanted if name not in params]:
        if params:
            parts = sorted({"/".join(name.split("/")[:2]) for name in fresh})
            print(f"start from random numbers: {', '.join(parts)}", flush=True)
        params |= _random(run, {name: places[name] for name in fresh})
    return new_state(run.shapes, run.shardings, params, run.optimizer)


# What a start may lack: it begins at random, in every run that adds it.
ADDED = ("masks/", "lora/", "pair/")


def is_run(path: str) -> bool:
    """Whether this is the folder of a training run with a checkpoint."""
    return (
        bool(path)
        and (Path(path) / run_lib.CONFIG_FILE).is_file()
        and any((Path(path) / "checkpoints").glob("[0-9]*"))
    )


def _holds_weights(spec: str) -> bool:
    """Whether there is a file, a run with a checkpoint, or a folder with files of weights."""
    path = split_part(spec)[0]
    held = path.is_dir() and any(p.suffix in (".safetensors", ".bin") for p in path.iterdir())
    return path.is_file() or is_run(spec) or held


def _of_earlier_run(run: run_lib.Run, wanted) -> dict[str, jax.Array]:
    """Parameters of the run in `config.weights`, its LoRA factors merged, without what it lacks.

    Raises UserError where the two do not write the same tokens or differ in a shape.
    """
    start = run.config.weights
    earlier, params, step = run_lib.open_run(Path(start))
    what = f"config.weights={start}, step {step}"
    if earlier.fmt != run.fmt:
        raise UserError(f"{what}: its grounding format differs from config.grounding")
    if earlier.tokenizer.sha256 != run.tokenizer.sha256:
        raise UserError(
            f"{what}: its tokenizer is not this run's; set --config.tokenizer.vocab_size=0 "
            f"--config.tokenizer.path={Path(start) / run_lib.TOKENIZER_FILE}"
        )
    params = flatten(merge(unflatten(params), earlier.model.config))
    fresh = {name for name in wanted if name.startswith(ADDED) and name not in params}
    problems = [
        f"{name} is {getattr(params.get(name), 'shape', 'missing')}, not {shape.shape}"
        for name, shape in wanted.items()
        if name not in fresh and (name not in params or params[name].shape != shape.shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{what}: another model: {'; '.join(problems[:5])}{more}")
    return {name: params[name] for name in wanted if name not in fresh}


def encoder_names(params) -> list[str]:
    """Those of the encoder's parameters; the projector belongs to the decoder it leads to."""
    return [n for n in params if n.startswith("img/") and not n.startswith("img/head/")]


def _read_weights(run: run_lib.Run, wanted, places) -> dict[str, jax.Array]:
    """Leaf by leaf onto the devices; the table grows by the rows that the tokenizer adds."""
    config, model = run.config, run.model.config
    heads = model.img.num_heads
    specs = ("" if is_run(config.weights) else config.weights, config.encoder_weights)
    base, encoder = (open_weights(spec, num_heads=heads) if spec else None for spec in specs)
    shorter = {}
    if config.objective == "contrastive":
        shorter = {name: _first_layers for name in wanted if name.startswith("llm/layers/")}
    if base is not None and config.weights_format != "config":
        check_writes_alike(base, run.fmt, model.masks)
    total = sum(math.prod(shape.shape) for shape in wanted.values())
    # Small models are read before anybody could look.
    quiet = total < 10**8 or jax.process_index() > 0
    with tqdm(total=total, desc="weights", unit="param", unit_scale=True, disable=quiet) as bar:

        def put(name, array):
            bar.update(array.size)
            return jax.device_put(array, places[name])

        return read_start(
            base,
            encoder,
            wanted,
            model=model,
            tokenizer=run.tokenizer,
            put=put,
            adapt=shorter,
            seed=config.seed,
            tell=lambda change: print(change, flush=True),
        )


def adopt_format(config, workdir: Path | None = None) -> None:
    """With `config.weights_format="weights"`: sets `config.grounding` and `config.masks` to what
    the weights were trained with, or, in a `workdir` with a config, to what its run began with.

    Raises UserError where the weights do not say how they write places.
    """
    if config.weights_format != "weights":
        return
    if not config.weights:
        raise UserError("config.weights_format=weights needs config.weights")
    if workdir is not None and (workdir / run_lib.CONFIG_FILE).exists():
        begun = run_lib.load_config(workdir)
        grounding, masks = begun.grounding.to_dict(), begun.masks.to_dict()
    else:
        source = open_weights(config.weights)
        if source.fmt is None:
            raise UserError(
                f"config.weights_format=weights, but {config.weights} does not say how it writes "
                "places: set config.grounding and leave config.weights_format empty"
            )
        grounding = source.fmt.to_json()
        masks = dataclasses.asdict(source.masks) if source.masks else {"kind": ""}
    own = {field.name for field in dataclasses.fields(MaskDecoderConfig)}
    with config.unlocked():
        config.grounding = ml_collections.ConfigDict(grounding)
        config.masks.update({name: value for name, value in masks.items() if name in own})


def _first_layers(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Captions are read by the first layers of a deeper decoder."""
    if array.shape[1:] != shape[1:] or len(array) < shape[0]:
        raise UserError(f"config.model.llm: {shape} cannot be the first of {array.shape}")
    return array[: shape[0]]


def _random(run: run_lib.Run, places: dict[str, Any]) -> dict[str, jax.Array]:
    """Random numbers for the parameters named, each born where it belongs."""

    def init(rng):
        params = flatten(run_lib.init_params(run.model, rng))
        return {name: params[name] for name in places}

    return jax.jit(init, out_shardings=places)(jax.random.key(run.config.seed))


def check_present(config, started: bool = False) -> None:
    """Raises UserError with one line for each of weights, tokenizer, data set that is missing.

    A run that has `started` holds its own tokenizer and parameters and needs only its data.
    """
    lines = []
    for field, what in (("weights", "weights"), ("encoder_weights", "encoder")):
        if started or not config[field] or _holds_weights(config[field]):
            continue
        lines.append(
            f"{what}: {config[field]} is not there; download the Flax file of PaliGemma 2 from "
            "Kaggle (google/paligemma-2, framework Jax, accept the licence), or its folder from "
            f"Hugging Face (google/paligemma2-3b-pt-224), and give its path with --config.{field}=…"
        )
    path = config.tokenizer.path
    if not started and not config.tokenizer.vocab_size and not Path(path).is_file():
        lines.append(
            f"tokenizer: {path} is not there; it comes with the weights on Kaggle and is public as "
            "gs://big_vision/paligemma_tokenizer.model; give its path with "
            "--config.tokenizer.path=FILE"
        )
    names = {
        (run_lib.full_name(p), p["split"]) for w in ("train", "val", "test") for p in config.data[w]
    }
    for name, split in sorted(names):
        if name in PHANTOMS and not (Path(config.data.dir) / name).exists():
            build_phantom(config.data.dir, PHANTOMS[name])
        try:
            open_source(name, split, config.data.dir)
        except UserError as error:
            # One line per data set is enough where all its splits are missing.
            if f"data: {error}" not in lines:
                lines.append(f"data: {error}")
    if lines and config.runs_without:
        lines.append(f"--config={config.runs_without} needs none of these")
    if lines:
        raise UserError("\n".join(lines))


# The one data set that needs no source, of both modalities or one: a config that names it runs on
# a bare machine.
PHANTOMS = {"phantom/64": "both", "phantom/ct64": "ct", "phantom/mr64": "mr"}


def build_phantom(data_dir: str, modality: str = "both") -> None:
    """Draws the embedded data set of a modality, else with default parameters, into `data_dir`."""
    from tfds_builders import __main__ as command
    from tfds_builders.phantom.phantom_dataset_builder import Builder

    config = Builder.CONFIG(modality=modality)
    print(f"building the embedded data set phantom/{config.name} in {data_dir}", flush=True)
    command.build(Builder, config, data_dir)
