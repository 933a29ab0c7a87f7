"""A run put together from its config: tokenizer, model, optimizer, shapes and places of arrays.

`train` makes the folder that `evaluate` opens; both get the same pieces from here, so that what
is evaluated is what was trained.
"""

import dataclasses
import fcntl
import json
from functools import partial
from pathlib import Path
from typing import IO, Any

import jax
import ml_collections
from jax.sharding import Mesh

from rg_jax import config as config_lib
from rg_jax import recipes
from rg_jax.data import pipeline
from rg_jax.data.sources import open_source
from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat
from rg_jax.model import contrastive, paligemma
from rg_jax.model.config import LoraConfig, MaskDecoderConfig, ModelConfig, from_variant
from rg_jax.model.contrastive import Contrastive
from rg_jax.model.paligemma import PaliGemma
from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.checkpoints import Checkpoints
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import (
    TrainState,
    describe,
    flatten,
    split_names,
    state_shapes,
)
from rg_jax.weights.vocabulary import padded_rows

CONFIG_FILE = "config.json"
FORMAT_FILE = "grounding_format.json"
TOKENIZER_FILE = "tokenizer.model"
TRAINABLE_FILE = "trainable.txt"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is, short of its numbers. `shapes` and `shardings` are of a TrainState."""

    config: ml_collections.ConfigDict
    fmt: GroundingFormat
    tokenizer: Tokenizer | None  # None: only sizes are asked for
    model: PaliGemma | Contrastive
    mesh: Mesh
    optimizer: Optimizer
    shapes: TrainState
    shardings: TrainState
    total_steps: int


def grounding_format(config: ml_collections.ConfigDict) -> GroundingFormat:
    """The format of `config.grounding`; UserError for a value it does not know."""
    try:
        return GroundingFormat.from_json(config.grounding.to_dict())
    except ValueError as error:
        raise UserError(f"config.grounding: {error}") from error


def make_tokenizer(config, fmt: GroundingFormat, path: Path, texts) -> Tokenizer:
    """The run's tokenizer: its own copy at `path` if there is one, else copied or trained there.

    `texts()` gives the texts to train a small one from, where the config asks for that.
    """
    spec = config.tokenizer

    def check(tokenizer: Tokenizer, name) -> None:
        if len(tokenizer.loc_ids) < fmt.bins:
            raise UserError(
                f"tokenizer {name} has {len(tokenizer.loc_ids)} <loc> pieces, but "
                f"config.grounding.bins={fmt.bins}"
            )

    # A copy without a config beside it was left by a start that failed: it may be another one.
    if not path.exists() or not path.with_name(CONFIG_FILE).exists():
        if spec.vocab_size:
            train_tokenizer(
                texts(), path, spec.vocab_size, num_loc=fmt.bins, num_seg=128, seed=config.seed
            )
        else:
            loaded = Tokenizer.load(spec.path, fmt.extra_tokens, spec.sha256 or None)
            check(loaded, spec.path)
            config_lib.write_aside(path, loaded.model_bytes)
    tokenizer = Tokenizer.load(path, fmt.extra_tokens)
    check(tokenizer, path)
    return tokenizer


def model_config(config, vocab_size: int) -> ModelConfig:
    """Dimensions by `config.model` for a vocabulary of this many ids."""
    spec = config.model.to_dict()
    img = {**spec["img"], "image_size": spec["image_size"]}
    try:
        return from_variant(
            spec["variant"],
            vocab_size=padded_rows(vocab_size),
            valid_vocab=vocab_size,
            img=img,
            llm=spec["llm"],
            compute_dtype=spec["compute_dtype"],
            remat=spec["remat"],
            vision_attention=spec["vision_attention"],
            unroll=spec.get("unroll", 1),  # runs of before have none
            masks=mask_config(config),
            lora=lora_config(config),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"config.model: {error}") from error


def make_model(config, vocab_size: int) -> PaliGemma | Contrastive:
    """What `config.objective` trains."""
    network = Contrastive if config.objective == "contrastive" else PaliGemma
    return network(model_config(config, vocab_size))


def init_params(model: PaliGemma | Contrastive, rng: jax.Array) -> dict[str, Any]:
    """The model's tree of parameters at random."""
    of = contrastive if isinstance(model, Contrastive) else paligemma
    return of.init_params(model.config, rng)


def param_shapes(model: PaliGemma | Contrastive) -> dict[str, jax.ShapeDtypeStruct]:
    """Flat name → shape of every parameter. Raises UserError for LoRA regexes that do not fit."""
    try:
        return flatten(jax.eval_shape(partial(init_params, model), jax.random.key(0)))
    except ValueError as error:
        raise UserError(f"config.{error}") from error


def mask_config(config) -> MaskDecoderConfig | None:
    """The mask decoder of `config.masks`; None where `kind` is empty. Raises ValueError."""
    spec = config.masks.to_dict()
    for name in ("slots", "size", "loss", "weight"):  # of the data and the loss, not of the model
        del spec[name]
    return MaskDecoderConfig(**spec) if spec["kind"] else None


def lora_config(config) -> LoraConfig | None:
    """The factors of `config.lora`; None where `rank` is 0. Raises ValueError."""
    spec = config.lora.to_dict()
    # The rows of the format's own tokens are the last of the vocabulary.
    rows = len(config.grounding.extra_tokens)
    return LoraConfig(**spec, new_rows=rows) if spec["rank"] else None


def assemble(config, fmt, tokenizer: Tokenizer, total_steps: int, mesh: Mesh | None = None) -> Run:
    """Model, optimizer and the shape and place of every array; nothing is allocated yet."""
    mesh = mesh or mesh_lib.make_mesh()
    return _shapes(config, fmt, tokenizer, tokenizer.vocab_size, total_steps, mesh)


def _shapes(config, fmt, tokenizer, vocab_size: int, total_steps: int, mesh: Mesh) -> Run:
    model = make_model(config, vocab_size)
    shapes = param_shapes(model)
    schedules, _ = split_names(list(shapes), config.schedule)
    optimizer = Optimizer(config.optimizer.to_dict(), schedules, total_steps)
    state = state_shapes(shapes, schedules, optimizer, config.frozen_dtype)
    shardings = mesh_lib.shard_tree(state, mesh)
    return Run(config, fmt, tokenizer, model, mesh, optimizer, state, shardings, total_steps)


def open_run(workdir: Path, step: int | None = None) -> tuple[Run, dict, int]:
    """A finished or running training run: its pieces, its flat parameters and their step.

    `step` None: the newest checkpoint. Raises UserError if this is not a run's folder.
    """
    config = load_config(workdir)
    fmt = grounding_format(config)
    tokenizer = Tokenizer.load(workdir / TOKENIZER_FILE, fmt.extra_tokens)
    run = assemble(config, fmt, tokenizer, total_steps=config.total_steps or 1)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.latest() if step is None else step
    return run, checkpoints.restore_params(run.shapes, run.shardings, step), step


# Fields that may differ between two starts of one run: they do not change what it computes.
FREE_FIELDS = (
    "name",
    "log_steps",
    "checkpoint_steps",
    "keep_checkpoints",
    "eval.",
    "data.dir",
    "data.workers",
    "data.threads",
    "data.cache",
    "data.val",
    "data.test",
)


def full_name(part: dict) -> str:
    """A data set's name with that of its variant, as it lies on disk."""
    return f"{part['name']}/{part['config']}" if part["config"] else part["name"]


def claim(workdir: Path, config) -> IO:
    """Makes the run's folder, locks it against a second process, compares configs.

    Returns the open lock file. Raises UserError if the folder cannot be written, is in use, or
    holds a run of another config (naming the fields that differ).
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written ({error.strerror}): choose another"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--workdir={workdir} is in use by another process") from None
    stored = workdir / CONFIG_FILE
    if stored.exists():
        try:
            old = json.loads(stored.read_text())
        except ValueError as error:
            raise UserError(
                f"{stored} is damaged ({error}): choose another --workdir, or put the run's "
                "config back"
            ) from error
        old = {**_plain_defaults(), **old}
        new = json.loads(config_lib.to_json(config))
        changed = [
            line for line in config_lib.differences(old, new) if not line.startswith(FREE_FIELDS)
        ]
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed)}): choose another "
                "--workdir, or go back to that config to go on"
            )
    return lock


def save_description(run: Run, run_dir: Path, describe: str) -> None:
    """`config.json`, `grounding_format.json`, `trainable.txt`: what evaluation needs to know."""
    config_lib.write_aside(run_dir / CONFIG_FILE, config_lib.to_json(run.config))
    text = json.dumps(run.fmt.to_json(), indent=1) + "\n"
    config_lib.write_aside(run_dir / FORMAT_FILE, text)
    config_lib.write_aside(run_dir / TRAINABLE_FILE, describe)


def load_config(run_dir: Path) -> ml_collections.ConfigDict:
    """The config a run was trained with. Raises UserError if this is not a run's folder."""
    path = run_dir / CONFIG_FILE
    try:
        stored = config_lib.from_json(path.read_text()).to_dict()
        return ml_collections.ConfigDict({**_plain_defaults(), **stored})
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: --workdir must be the folder of a training run"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not readable: {error}") from error


def _plain_defaults() -> dict[str, Any]:
    """What a run made before a part of the config existed is taken to have said about it."""
    return json.loads(config_lib.to_json(recipes.base()))


# Ids of Gemma's tokenizer with loc and seg pieces, and `<image>` behind them.
GEMMA_IDS = 257_152 + 1


def describe_size(config, mesh: Mesh) -> str:
    """What a config needs in memory, from shapes alone: no weights, tokenizer or data are read."""
    config_lib.check(config)
    mesh_lib.check_batch(config.batch_size, config.accumulation, mesh)
    fmt = grounding_format(config)
    ids = config.tokenizer.vocab_size + 1 if config.tokenizer.vocab_size else GEMMA_IDS
    run = _shapes(config, fmt, None, ids + len(fmt.extra_tokens), 1000, mesh)
    counts = [line for line in describe(run.shapes).splitlines() if line.startswith("#")]
    return "\n".join([*counts, memory.table(estimate_memory(run), mesh.size)])


def estimate_memory(run: Run) -> dict[str, int]:
    """Bytes per device by part, see `training.memory`."""
    config = run.config
    return memory.estimate(
        run.shapes,
        run.model.config,
        rows=config.batch_size // config.accumulation // run.mesh.size,
        text_len=config.data.text_len,
        block_size=config.loss.block_size,
        accumulation=config.accumulation,
        devices=run.mesh.size,
        mask_slots=config.masks.slots,
        mask_size=config.masks.size or config.model.image_size,
        pairs=config.objective == "contrastive",
    )


def data_config(config) -> pipeline.DataConfig:
    """How records become arrays, from `config.data` and the model's image size."""
    data = config.data
    return pipeline.DataConfig(
        image_size=config.model.image_size,
        text_len=data.text_len,
        style=data.image_style,
        augment=data.augment,
        languages=tuple(data.languages),
        separator=data.separator,
        grounded_first=data.grounded_first,
        threads=data.threads,
        mask_slots=config.masks.slots if config.masks.kind else 0,
        mask_size=config.masks.size or config.model.image_size,
    )


def open_parts(config, which: str) -> list[dict]:
    """Opens the data sets of `config.data.<which>`; UserError if one is not there.

    Each is {"source", "tasks", "weight", "count"} as the pipeline takes it.
    """
    parts = config.data[which]
    if not parts:
        raise UserError(f"config.data.{which} names no data set")
    opened = []
    for part in parts:
        source = open_source(
            full_name(part), part["split"], config.data.dir, cache=config.data.cache
        )
        opened.append(
            {
                "source": source,
                "tasks": dict(part["tasks"]),
                "weight": part["weight"] or None,
                "count": part.get("count", "records"),
            }
        )
    return opened


# Enough to know every word of a small data set.
TOKENIZER_SAMPLES = 20_000


def texts_of(config, fmt: GroundingFormat, parts: list[dict]) -> list[str]:
    """What a small tokenizer is trained on: prefixes and unmarked targets, as they will occur."""
    texts = []
    for part in parts:
        samples = pipeline.eval_samples(
            part["source"],
            [task for task, weight in part["tasks"].items() if weight > 0],
            config.data.languages,
            fmt,
            data_config(config),
            limit=TOKENIZER_SAMPLES // len(parts),
        )
        texts += [text for s in samples for text in (s.prefix, s.text) if text]
    return texts
