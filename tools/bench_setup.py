"""What the speed benchmarks share: a recipe at some size with random weights, and fair timing.

Nothing here reads a file or imports a data package: a bare machine with JAX, Flax and Optax does.
"""

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rg_jax import recipes
from rg_jax.cli import stop
from rg_jax.config import write_aside
from rg_jax.errors import UserError
from rg_jax.model.config import (
    REMAT,
    VARIANTS,
    LoraConfig,
    MaskDecoderConfig,
    ModelConfig,
    from_variant,
)
from rg_jax.model.paligemma import PaliGemma, param_shapes
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import TrainState, flatten, split_names, state_shapes
from rg_jax.training.step import MaskLoss, batch_shapes, jit_update, make_update

TASKS = 8  # whatever their number: the loss is also summed by task
PREFIX = 0.3  # share of the text that is prompt, without loss
RECIPES = ("det", "seg")


# ---------------------------------------------------------------- what is measured


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe at some size. `batch` is that of a whole step, of `accumulation` micro-batches."""

    config: ModelConfig
    recipe: str
    batch: int
    accumulation: int
    text_len: int
    block_size: int
    slots: int
    freeze_encoder: bool
    spec: Any  # the ml_collections config: batch, lengths, masks, optimizer, schedule
    optimizer: Optimizer
    mesh: Mesh
    shapes: TrainState
    shardings: TrainState

    @property
    def model(self) -> PaliGemma:
        return PaliGemma(self.config)

    @property
    def image_token(self) -> int:
        """An id that no text of `numpy_batch` holds."""
        return self.config.llm.vocab_size - 1

    @property
    def targets(self) -> int:
        """Text tokens of a sample with loss: what follows the prompt."""
        return self.text_len + 1 - max(int(PREFIX * (self.text_len + 1)), 1)

    def facts(self) -> dict[str, Any]:
        """For the JSON: what was run."""
        return {
            "recipe": self.recipe,
            "image_size": self.config.img.image_size,
            "text_tokens": self.text_len,
            "targets": self.targets,
            "batch": self.batch,
            "accumulation": self.accumulation,
            "encoder": "frozen" if self.freeze_encoder else "trained",
            "lora": self.config.lora.rank if self.config.lora else 0,
            "remat": self.config.remat,
            "compute_dtype": self.config.compute_dtype,
            "parameters": sum(int(np.prod(s.shape)) for s in self.params_shapes().values()),
        }

    def params_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {**self.shapes.trainable, **self.shapes.frozen}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is run, the same for ours and for the peers."""
    parser.add_argument("--model", choices=VARIANTS, default="3b")
    parser.add_argument("--recipe", choices=RECIPES, default="det", help="boxes, or masks too")
    parser.add_argument("--batch", type=int, default=0, help="samples of a step (24; tiny: 16)")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--text_len", type=int, default=0, help="text tokens (200; tiny: 96)")
    parser.add_argument("--image_size", type=int, default=0, help="pixels (224; tiny: 112)")
    parser.add_argument("--train_encoder", action="store_true", help="default: frozen")
    parser.add_argument("--lora", type=int, default=0, help="rank: only low-rank factors learn")
    parser.add_argument("--remat", choices=REMAT, default="", help="default: full; tiny: none")
    parser.add_argument("--compute_dtype", default="", help="bfloat16; tiny: float32")
    parser.add_argument("--vision_attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument(
        "--unroll", type=int, default=0, help="layers per turn of the loop (1; tiny: 64)"
    )
    parser.add_argument("--block_size", type=int, default=32768, help="rows of a loss block")
    parser.add_argument("--slots", type=int, default=0, help="masks per sample (8; tiny: 4)")


def make_case(options: argparse.Namespace, mesh: Mesh | None = None) -> Case:
    """Shapes and places of everything; nothing is allocated. UserError for what cannot be.

    `mesh`: where it would be; None: all devices of this machine.
    """
    tiny = options.model == "tiny"
    spec = recipes.base()
    recipes.paper(spec, options.model, options.image_size or (112 if tiny else 224))
    spec.batch_size = options.batch or (16 if tiny else 24)
    spec.accumulation = options.accumulation
    # One more than the tokens that are fed: the last one is only predicted.
    spec.data.text_len = (options.text_len or (96 if tiny else 200)) + 1
    spec.loss.block_size = options.block_size
    masks = None
    if options.recipe == "seg":
        recipes.tiny_masks(spec, 4) if tiny else None
        spec.masks.kind, spec.masks.slots = "sam", options.slots or spec.masks.slots
        fields = {f.name for f in dataclasses.fields(MaskDecoderConfig)}
        masks = MaskDecoderConfig(**{k: v for k, v in spec.masks.items() if k in fields})
    rules = [rule for rule in spec.schedule if not (options.train_encoder and rule[1] is None)]
    if options.train_encoder:
        rules = [(".*", {"decay": "cosine", "warmup_percent": 10})]
    elif masks:
        rules.append(("masks/.*", rules[0][1]))
    lora = None
    if options.lora:
        recipes.adapted(spec, argparse.Namespace(start="", lora=True))
        rules = list(spec.schedule)
        given = {"include": tuple(spec.lora.include), "alpha": spec.lora.alpha}
        lora = LoraConfig(rank=options.lora, new_rows=len(spec.grounding.extra_tokens), **given)
    try:
        config = from_variant(
            options.model,
            image_size=spec.model.image_size,
            compute_dtype=options.compute_dtype or ("float32" if tiny else "bfloat16"),
            remat=options.remat or ("none" if tiny else "full"),
            vision_attention=options.vision_attention,
            unroll=options.unroll or (64 if tiny else 1),
            masks=masks,
            lora=lora,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    mesh = mesh or mesh_lib.make_mesh()
    mesh_lib.check_batch(spec.batch_size, spec.accumulation, mesh, "batch (--batch)")
    shapes = flatten(param_shapes(config))
    schedules, _ = split_names(list(shapes), rules)
    optimizer = Optimizer(spec.optimizer.to_dict(), schedules, total_steps=10_000)
    frozen_dtype = "float32" if config.compute_dtype == "float32" else "bfloat16"
    state = state_shapes(shapes, schedules, optimizer, frozen_dtype)
    return Case(
        config=config,
        recipe=options.recipe,
        batch=spec.batch_size,
        accumulation=spec.accumulation,
        text_len=spec.data.text_len - 1,
        block_size=spec.loss.block_size,
        slots=spec.masks.slots if masks else 0,
        freeze_encoder=bool(options.lora) or not options.train_encoder,
        spec=spec,
        optimizer=optimizer,
        mesh=mesh,
        shapes=state,
        shardings=mesh_lib.shard_tree(state, mesh),
    )


def random_params(case: Case, seed: int = 0) -> dict[str, jax.Array]:
    """Flat parameters of ordinary size, each in its dtype and where it belongs.

    The same million draws again and again: three billion of their own would take minutes.
    """
    places = {**case.shardings.trainable, **case.shardings.frozen}
    shapes = case.params_shapes()

    def make(draws):
        params = {}
        for name, leaf in shapes.items():
            scale, shift = 0.02, 0.0
            if name.endswith("scale"):
                # Gemma's norms multiply by 1 + scale, the encoder's by scale.
                shift = float(name.startswith("img/"))
            elif name.endswith("input_embedding"):
                scale = leaf.shape[-1] ** -0.5
            elif not name.endswith("bias"):
                scale = leaf.shape[-2] ** -0.5
            # On the device: to make and send 10 GB from the host takes longer than a benchmark.
            values = (scale * draws + shift).astype(leaf.dtype)
            size = math.prod(leaf.shape)
            again = jnp.broadcast_to(values, (-(-size // len(values)), len(values)))
            params[name] = again.reshape(-1)[:size].reshape(leaf.shape)
        return params

    draws = np.random.default_rng(seed).standard_normal(2**20 - 3, np.float32)
    return jax.jit(make, out_shardings={name: places[name] for name in shapes})(draws)


def make_state(case: Case, params: Mapping[str, jax.Array]) -> TrainState:
    """A state at step 0 around these parameters (which it takes over: they are donated later)."""
    init = jax.jit(case.optimizer.init, out_shardings=case.shardings.opt_state)
    train = {name: params[name] for name in case.shapes.trainable}
    frozen = {name: params[name] for name in case.shapes.frozen}
    step = jax.device_put(np.zeros((), np.int32), case.shardings.step)
    return TrainState(step, train, frozen, init(train))


def numpy_batch(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels and texts of full length, `PREFIX` of it prompt; with masks random squares."""
    rng = np.random.default_rng(seed)
    rows, length, side = case.batch, case.text_len + 1, case.config.img.image_size
    target = np.arange(length) >= length - case.targets
    mask_ar = np.broadcast_to(target, (rows, length)).astype(np.int32)
    high = min(case.config.llm.vocab_size - 1, 250_000)
    batch = {
        "image": rng.uniform(-1, 1, (rows, side, side, 3)).astype(np.float32),
        "text": rng.integers(3, high, (rows, length)).astype(np.int32),
        "mask_ar": mask_ar,
        "mask_loss": mask_ar.copy(),
        "mask_input": np.ones((rows, length), bool),
        "task": rng.integers(0, TASKS, rows).astype(np.int32),
    }
    if case.slots:
        shapes = batch_shapes(case.config, case.spec)
        batch["masks"] = rng.integers(0, 2, shapes["masks"].shape).astype(np.uint8)
        batch["mask_at"] = rng.integers(length // 2, length - 1, (rows, case.slots), np.int32)
        batch["mask_valid"] = np.ones((rows, case.slots), bool)
    return batch


def make_step(case: Case) -> Callable:
    """The training step of `rg_jax.train`, jitted but not compiled: (state, batch) → both."""
    update = make_update(
        case.model,
        case.optimizer,
        case.mesh,
        tasks=TASKS,
        accumulation=case.accumulation,
        block_size=case.block_size,
        mask_loss=MaskLoss(case.spec.masks.loss, case.spec.masks.weight),
    )
    return jit_update(update, case.shardings, case.mesh)


def step_shapes(case: Case) -> tuple[TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """What `make_step(case).lower` takes."""
    return case.shapes, batch_shapes(case.config, case.spec)


# ---------------------------------------------------------------- how it is measured


def interleave(
    sides: Mapping[str, Callable[[], Any]], rounds: int, warm: int = 1
) -> dict[str, list[tuple[float, float]]]:
    """(seconds, processor seconds) of every side in every round, one after the other.

    Pair by pair, so that whatever slows the machine down for a while slows all of them down. A
    side returns when its work is done. The first `warm` rounds do not count.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(warm + rounds):
        for name, run in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            taken = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warm:
                spent[name].append(taken)
    return spent


def summary(spent: list[tuple[float, float]]) -> dict[str, float]:
    """Median and quartiles of a side's seconds, and the median of its processor seconds."""
    wall = np.array([s for s, _ in spent])
    low, middle, high = (float(v) for v in np.percentile(wall, (25, 50, 75)))
    cpu = float(np.median([c for _, c in spent]))
    return {"seconds": middle, "quartiles": [low, high], "processor_seconds": cpu, "n": len(wall)}


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> dict[str, Any]:
    """How many times as fast ours is: the median over pairs, its quartiles, and by processor."""
    pairs = np.array([t[0] / max(o[0], 1e-9) for o, t in zip(ours, theirs, strict=True)])
    cpu = np.array([t[1] / max(o[1], 1e-9) for o, t in zip(ours, theirs, strict=True)])
    low, middle, high = (float(v) for v in np.percentile(pairs, (25, 50, 75)))
    return {"ratio": middle, "quartiles": [low, high], "by_processor_time": float(np.median(cpu))}


def versions(*packages: str) -> dict[str, str]:
    """Of Python, the named packages and the device."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return found | {"device": f"{device.device_kind} × {jax.device_count()}"}


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """To a file, "-" for the terminal, "" for nowhere."""
    text = json.dumps(figures, indent=1) + "\n"
    if path == "-":
        print(text, end="")
    elif path:
        write_aside(Path(path), text)


def peak_memory() -> int | None:
    """The most that JAX has held on its first device, or None where nobody counts (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return int(stats["peak_bytes_in_use"]) if stats and "peak_bytes_in_use" in stats else None


class Parser(argparse.ArgumentParser):
    """The command line of a benchmark; what is wrong with it is one line."""

    def __init__(self, name: str, doc: str | None, json_flag: bool = True):
        super().__init__(
            prog=f"python -m tools.{name}",
            description=(doc or "").strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if json_flag:
            self.add_argument("--json", default="", help="write the figures here (-: print)")

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def numbers(flag: str, text: str) -> list[int]:
    """A flag's list of positive numbers, by commas; UserError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"--{flag}={text}: positive numbers by commas are needed")
    return found


def run_bench(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    bench: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Flags → figures → a table, and JSON where --json says; `-`: nothing but JSON."""

    def work():
        options = parser.parse_args(argv)
        figures = bench(options)
        if options.json != "-":
            print(table(figures))
        write_json(options.json, figures)

    run_command(work)


def run_command(work: Callable[[], None]) -> None:
    """A user's mistake and Ctrl-C end with one line, as everywhere in the project."""
    try:
        mesh_lib.prepare_backend()
        work()
    except UserError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted", 130)
