"""Evaluation: generate, read the places, score, draw, write the page.

    python -m rg_jax.evaluate --workdir=RUN [--data=NAME --split=SPLIT --limit=N --step=STEP]
                              [--batch_size=N]
    python -m rg_jax.evaluate --workdir=RUN --benchmark=NAME
    python -m rg_jax.evaluate --config=FILE --weights=FILE --out=DIR
    python -m rg_jax.evaluate compare RUN_A RUN_B [--out=DIR]

The first needs only the folder of a training run and writes `RUN/eval/<data>-<split>/` (or --out)
with predictions.jsonl, metrics.json, index.html and overlays; the run's own metrics.json and
index.html are those of the last evaluation. Answers are stored as they come: the same command goes
on where it was stopped, and generates nothing twice. The second evaluates by a named protocol
(slake, slake_published, vqa_rad, vqa_rad_published; see rg_jax/evaluation/benchmarks.py). The
third takes weights that no run of ours has made, with a config that says what model they are. The
last compares two runs, or two folders of evaluations, on the samples that they share.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from rg_jax import cli
from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.evaluation import benchmarks, compare, driver, published_figures
from rg_jax.evaluation.embedder import load_embedder
from rg_jax.evaluation.giou import DEFINITIONS
from rg_jax.evaluation.pairs import evaluate_pairs
from rg_jax.evaluation.seen import contents_of, mixtures_of
from rg_jax.grounding.format import GroundingFormat
from rg_jax.run import open_run
from rg_jax.training import mesh as mesh_lib


def open_weights(config, weights: str | None = None) -> tuple[run_lib.Run, driver.Weights]:
    """Weights that are not of a run, put into the model that a config describes.

    `weights` replaces `config.weights`; anything that a training could start from. Raises
    UserError if they or the tokenizer are not there or do not fit.
    """
    with config.unlocked():
        config.weights = weights or config.weights
        # Nothing is trained here: no optimizer state is made, and nothing is rounded as frozen.
        config.optimizer = {"name": "sgd", "lr": 0.0}
        config.schedule = [(".*", {"decay": "constant"})]
    if not config.weights:
        raise UserError("--weights is needed beside --config: the file to be evaluated")
    if config.tokenizer.vocab_size:
        raise UserError(
            "this config trains a tokenizer of its own, which weights from elsewhere do not know: "
            "give theirs with --config.tokenizer.path=FILE --config.tokenizer.vocab_size=0"
        )
    bare = config.copy_and_resolve_references()
    with bare.unlocked():
        bare.data.train, bare.data.val, bare.data.test, bare.runs_without = [], [], [], ""
    start_lib.check_present(bare)
    fmt = run_lib.grounding_format(config)
    tokenizer = Tokenizer.load(
        config.tokenizer.path, fmt.extra_tokens, config.tokenizer.sha256 or None
    )
    run = run_lib.assemble(config, fmt, tokenizer, total_steps=1)
    state = start_lib.first_state(run)
    name = Path(config.weights).name
    params = {**state.trainable, **state.frozen}
    return run, driver.Weights(params, {"Weights": name}, {"weights": name})


def named_parts(config, name: str) -> list[dict]:
    """The entry of a data set in a run's config: that of its test sets, else val, else train.

    `name` is `data set` or `data set/config`. Raises UserError if the run has none of that name.
    """
    known: dict[str, dict] = {}
    for part in [*config.data.test, *config.data.val, *config.data.train]:
        known.setdefault(part["name"], part)
        known.setdefault(f"{part['name']}/{part['config']}", part)
    if name not in known:
        names = ", ".join(sorted({part["name"] for part in known.values()}))
        raise UserError(f"--data={name} is none of this run's data sets: {names}")
    return [known[name]]


def remover_of(benchmark: benchmarks.Benchmark, fmt: GroundingFormat) -> str:
    """How marks are removed under a protocol from the texts of a model with this format."""
    if not benchmark.published or not (fmt.has_boxes or fmt.has_masks):
        return "ours"
    if fmt.has_boxes and fmt.has_masks:
        return "published_both"
    return "published_boxes" if fmt.has_boxes else "published_masks"


def evaluate_command(values: flags.FlagValues) -> None:
    """What `python -m rg_jax.evaluate` does without a command's name."""
    if (values.workdir is None) == (values.config is None):
        raise UserError(
            "one of --workdir (the folder of a training run) and --config (with --weights) is "
            "needed"
        )
    if values.benchmark and (values.data or values.split):
        raise UserError("--benchmark says which data and split: leave out --data and --split")
    if values.config is not None and not values.out:
        raise UserError("--out is needed with --config: the folder to write")
    if values.workdir is not None and values.weights:
        raise UserError("--weights goes with --config; a run's folder has weights of its own")
    if values.limit < 0:
        raise UserError(f"--limit={values.limit}: 0 for all samples, or a number above it")
    if values.batch_size is not None and values.batch_size < 1:
        raise UserError(f"--batch_size={values.batch_size}: must be at least 1")
    # What is missing or wrong is better known before anything is read.
    embedder = load_embedder(values.embedder) if values.embedder else None
    if values.definition not in (None, *DEFINITIONS):
        raise UserError(f"--definition={values.definition} is not one of {', '.join(DEFINITIONS)}")
    benchmark = benchmarks.get(values.benchmark) if values.benchmark else None
    mesh_lib.join_hosts(values)
    workdir = None
    if values.workdir is not None:
        workdir = Path(values.workdir).expanduser().absolute()
        run, params, step = open_run(workdir, values.step)
        weights = driver.of_step(run, params, step)
    else:
        run, weights = open_weights(values.config, values.weights)
    config = run.config
    # Of weights from elsewhere nobody knows on what they were trained.
    mixtures = mixtures_of(config) if workdir else None
    settings: dict[str, Any] = {}
    folders = [values.data_dir or config.data.dir, config.data.dir]
    with config.unlocked():
        config.data.dir = folders[0]
        for name in ("embedder", "definition", "batch_size"):
            if values[name].value is not None:
                config.eval[name] = values[name].value
        parts = config.data.test
        if benchmark:
            seen = benchmarks.check_honest(benchmark, mixtures or {}, contents_of(folders))
            parts = [benchmark.part()]
            config.data.languages = list(benchmark.languages)
            settings = {
                "name": benchmark.name,
                "remover": remover_of(benchmark, run.fmt),
                "about": {"benchmark": benchmark.describe()},
            }
            if seen:
                which, reason = next(iter(seen.items()))
                print(f"{benchmark.name}: seen in config.data.{which} of this run ({reason})")
        if values.data:
            parts = named_parts(config, values.data)
        if values.split:
            parts = [{**part, "split": values.split} for part in parts]
        config.data.test = parts
    if config.objective == "contrastive":
        if workdir is None or values.out or benchmark:
            raise UserError("a contrastive run is evaluated with --workdir alone, by retrieval")
        evaluate_pairs(run, params, workdir, values.limit, step)
        return
    out = Path(values.out).expanduser().absolute() if values.out else None
    metrics = driver.evaluate_sets(
        run,
        weights,
        "test",
        values.limit,
        workdir=workdir,
        out=out,
        mixtures=mixtures,
        data_dirs=folders,
        embedder=embedder,
        **settings,
    )
    if metrics.get("published"):
        print(published_figures.summary(metrics))


def compare_command(values: flags.FlagValues, paths: list[str]) -> None:
    """`compare RUN_A RUN_B`."""
    if len(paths) != 2:
        raise UserError("compare takes two folders: compare RUN_A RUN_B [--out=DIR]")
    alien = ("workdir", "config", "weights", "benchmark", "limit", "step", "batch_size")
    if given := [name for name in alien if values[name].value not in (None, 0)]:
        raise UserError(f"compare reads what two evaluations have left: it takes no --{given[0]}")
    first, second = (Path(path).expanduser() for path in paths)
    compare.compare(
        first,
        second,
        Path(values.out).expanduser() if values.out else None,
        name=values.data,
        split=values.split,
        embedder=values.embedder,
        definition=values.definition,
        data_dir=values.data_dir,
    )


COMMANDS: dict[str, Callable[[flags.FlagValues, list[str]], None]] = {"compare": compare_command}


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""

    def text(name: str, what: str) -> None:
        flags.DEFINE_string(name, None, what, flag_values=values)

    text("workdir", "folder of a training run")
    config_flags.DEFINE_config_file(
        "config", None, "instead: the config of the weights", flag_values=values
    )
    text("weights", "with --config: weights (default: those of the config)")
    text("data", "data set (default: the run's test sets)")
    text("split", "split (default: that of the run's config)")
    text("benchmark", f"a protocol: {', '.join(benchmarks.BENCHMARKS)}")
    text("data_dir", "where data sets lie (default: that of the run)")
    text("out", "folder to write (default: in the run's folder)")
    text("embedder", "how mentions are compared: exact, or a sentence-transformers model")
    text("definition", f"which G-IoU comes first: {', '.join(DEFINITIONS)}")
    flags.DEFINE_integer(
        "limit", 0, "evaluate this many samples of each set (0: all)", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size",
        None,
        "samples at once (default: config.eval.batch_size of the run)",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "step", None, "checkpoint to evaluate (default: the newest)", flag_values=values
    )
    mesh_lib.define_host_flags(values)


def main(argv: list[str]) -> None:
    """The command."""
    name, *rest = argv[1:] or [""]
    if name in COMMANDS:
        COMMANDS[name](flags.FLAGS, rest)
    elif name:
        known = ", ".join(COMMANDS)
        raise UserError(f"unexpected argument {name!r}; commands are: {known}; flags begin with --")
    else:
        evaluate_command(flags.FLAGS)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    sys.exit(cli.main(main))
