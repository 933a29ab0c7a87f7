"""Training: records in, a model that says where out. The whole run, top to bottom.

    python -m rg_jax.train --config=configs/det.py:demo [--workdir=RUN] [--config.batch_size=8]

The same command goes on where a run stopped, bit for bit as if it had not. Several hosts: start
it on each with --distributed (or --coordinator, --num_hosts, --host).
"""

import sys
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from rg_jax import cli
from rg_jax import config as config_lib
from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data import pipeline
from rg_jax.data.tasks import TASK_NAMES
from rg_jax.errors import UserError
from rg_jax.evaluation import answering, driver
from rg_jax.evaluation.pairs import PairValidator, evaluate_pairs, write_encoder
from rg_jax.evaluation.validator import Validator
from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.checkpoints import Checkpoints
from rg_jax.training.contrastive import make_pair_update
from rg_jax.training.metrics import MetricsWriter, Progress, Totals, check_finite
from rg_jax.training.state import describe
from rg_jax.training.step import MaskLoss, batch_shapes, jit_update, make_update, on_device


def train(config, workdir: Path) -> dict:
    """Runs (or goes on with) the training that `config` describes; returns the final metrics."""
    with ExitStack() as stack:
        return _train(config, workdir, stack)


def _train(config, workdir: Path, stack: ExitStack) -> dict:
    # `stack` closes what is opened here, however this ends: a notebook may go on in this process.
    chief = jax.process_index() == 0
    mesh = mesh_lib.make_mesh()

    # ---------------------------------------------------------------- what is needed is there
    config_lib.check(config)
    mesh_lib.check_batch(config.batch_size, config.accumulation, mesh)
    start_lib.adopt_format(config, workdir)
    fmt = run_lib.grounding_format(config)

    def prepare():
        # The step folders are looked at only later: whatever lies there was made by a start.
        start_lib.check_present(config, started=any((workdir / "checkpoints").glob("[0-9]*")))
        if chief:
            stack.enter_context(run_lib.claim(workdir, config))

    mesh_lib.host0_first(prepare)

    # ---------------------------------------------------------------- data
    parts = run_lib.open_parts(config, "train")
    say = partial(print, flush=True) if chief else lambda *_, **__: None
    for part in parts:
        say(f"data: {part['source']!r} for {', '.join(part['tasks'])}")
    data_config = run_lib.data_config(config)
    examples = pipeline.count_usable(parts, data_config, fmt)
    total_steps = config_lib.duration(
        config, "total", batch_size=config.batch_size, examples=examples
    )
    if not total_steps:
        raise UserError("config sets none of total_steps, total_epochs, total_examples")
    tokenizer = mesh_lib.host0_first(
        lambda: run_lib.make_tokenizer(
            config,
            fmt,
            workdir / run_lib.TOKENIZER_FILE,
            lambda: run_lib.texts_of(config, fmt, parts),
        )
    )
    iterator = pipeline.train_iterator(
        parts,
        tokenizer,
        fmt,
        data_config,
        config.batch_size,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
    )
    stack.enter_context(closing(iterator))

    # ---------------------------------------------------------------- shapes, before any array
    run = run_lib.assemble(config, fmt, tokenizer, total_steps, mesh)
    listing = describe(run.shapes)
    say("\n".join(line for line in listing.splitlines() if line.startswith("#")))
    say(memory.table(run_lib.estimate_memory(run), mesh.size))
    if chief:
        run_lib.save_description(run, workdir, listing)
    pairs = config.objective == "contrastive"
    validator = PairValidator(run) if pairs else Validator(run)
    if config.data.test:
        answering.open_sets(run, "test", limit=1)  # what cannot be evaluated is better known now
        driver.check_scoring(config)

    # ---------------------------------------------------------------- state: on, or from the start
    # 1. a checkpoint of this run  2. the original weights  3. random numbers
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints)
    stack.enter_context(closing(checkpoints))
    first_step = checkpoints.latest()
    if first_step is not None:
        state = checkpoints.restore(run.shapes, run.shardings, iterator, first_step)
        say(f"goes on from step {first_step}")
    else:
        first_step, state = 0, start_lib.first_state(run)
        over = f", its encoder from {config.encoder_weights}" if config.encoder_weights else ""
        say(f"starts from {config.weights or 'random weights'}{over}")

    # ---------------------------------------------------------------- compile once
    if pairs:
        update = make_pair_update(run.model, run.optimizer, mesh)
    else:
        update = make_update(
            run.model,
            run.optimizer,
            mesh,
            tasks=len(TASK_NAMES),
            accumulation=config.accumulation,
            block_size=config.loss.block_size,
            normalise=config.loss.normalise,
            mask_loss=MaskLoss(config.masks.loss, config.masks.weight),
        )
    update = jit_update(update, run.shardings, mesh)
    started = time.monotonic()
    update = update.lower(run.shapes, batch_shapes(run.model.config, config)).compile()
    peak = memory.compiled_bytes(update)
    note = f", compiler's peak memory {peak / 2**30:.2f} GiB" if peak else ""
    say(f"compiled in {time.monotonic() - started:.1f} s{note}")

    # ---------------------------------------------------------------- the loop
    writer = MetricsWriter(workdir, first_step, active=chief)
    stack.enter_context(closing(writer))
    progress = Progress(first_step, total_steps)
    totals = Totals(run.model.config, config, run.shapes, mesh)
    for step in range(first_step + 1, total_steps + 1):
        batch = next(iterator)
        totals.add(batch)
        arrays = mesh_lib.to_devices(on_device(batch), mesh)
        state, metrics = update(state, arrays)

        # A checkpoint is made of a step that was looked at, and counters start anew behind it.
        saving = step % config.checkpoint_steps == 0 or step == total_steps
        if step % config.log_steps == 0 or saving:
            values = totals.flush(jax.device_get(metrics), progress.tick(step))
            check_finite(values, step)
            writer.write(step, values)
            if chief:
                progress.line(step, totals.shown(values))
        every = config.eval.every_steps
        if every and step % every == 0 and step < total_steps:
            started = time.monotonic()
            values = validator(state)
            progress.pause(time.monotonic() - started)
            writer.write(step, values)
            say("  ".join(["validation", *(f"{k[4:]} {v:.3f}" for k, v in values.items())]))
        # Last, so that what is on disk has all its numbers in the log.
        if saving:
            started = time.monotonic()
            checkpoints.save(step, state, iterator)
            progress.pause(time.monotonic() - started)
    checkpoints.wait()
    iterator.close()

    # ---------------------------------------------------------------- how good it is
    params = {**state.trainable, **state.frozen}
    metrics = {}
    if pairs:
        say(f"encoder: {write_encoder(run, params, workdir)}")
        if config.data.test:
            metrics = evaluate_pairs(run, params, workdir, config.eval.final_samples, total_steps)
    elif config.data.test:
        metrics = driver.evaluate_all(
            run, params, workdir, "test", config.eval.final_samples, total_steps
        )
        say(f"figures: {workdir / 'metrics.json'}   page: {workdir / 'index.html'}")
    return metrics


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:]:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
    if FLAGS.config is None:
        raise UserError("--config is needed, e.g. --config=configs/det.py:demo")
    mesh_lib.join_hosts(FLAGS)
    if FLAGS.estimate:
        print(run_lib.describe_size(FLAGS.config, mesh_lib.make_mesh()))
        return
    # Kept with the run, so that it can be evaluated from another folder.
    FLAGS.config.data.dir = str(Path(FLAGS.config.data.dir).expanduser().absolute())
    name = (FLAGS.config.name or "run").replace(":", "-")
    train(FLAGS.config, Path(FLAGS.workdir or f"runs/{name}").expanduser().absolute())


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "the run, e.g. configs/det.py:demo")
    flags.DEFINE_string("workdir", None, "folder of the run (default: runs/NAME)")
    flags.DEFINE_bool("estimate", False, "only print parameters and memory, from shapes alone")
    mesh_lib.define_host_flags()
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
