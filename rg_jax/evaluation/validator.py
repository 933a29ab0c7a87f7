"""What is looked at while a model is trained: loss and scores of the validation sets."""

import time
from collections.abc import Iterator

import jax
import numpy as np

from rg_jax import run as run_lib
from rg_jax.data.pipeline import eval_batches
from rg_jax.data.tasks import TASK_NAMES
from rg_jax.evaluation.answering import (
    EvalSet,
    answer_all,
    batch_size_of,
    make_predictor,
    open_sets,
    results_of,
)
from rg_jax.evaluation.results import Result
from rg_jax.evaluation.score import score_results
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.state import TrainState
from rg_jax.training.step import BATCH_KEYS, make_eval_loss


class Validator:
    """Loss and G-IoU on a fixed part of the validation sets, while training.

    Selection and curves use this, never the test set.
    """

    def __init__(self, run: run_lib.Run):
        config = run.config
        self.run, self.size = run, batch_size_of(run)
        self.sets = open_sets(run, "val", config.eval.samples) if config.data.val else []
        self.predictor = make_predictor(run)
        places = {**run.shardings.trainable, **run.shardings.frozen}
        self.loss = make_eval_loss(
            run.model, run.mesh, places, tasks=len(TASK_NAMES), block_size=config.loss.block_size
        )

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`val/loss`, `val/g_iou` and `val/matched_iou` over all validation sets."""
        params = {**state.trainable, **state.frozen}
        started = time.monotonic()
        loss = tokens = 0.0
        results: list[Result] = []
        prepared = self.predictor.prepare(params) if self.sets else {}
        for evaluated in self.sets:
            for batch in target_batches(self.run, evaluated, self.size):
                sums = jax.device_get(self.loss(params, mesh_lib.to_devices(batch, self.run.mesh)))
                loss += float(sums["task_loss"].sum())
                tokens += float(sums["task_tokens"].sum())
            found = answer_all(self.run, self.predictor, prepared, evaluated, show_progress=False)
            results += results_of(self.run, evaluated, found)
        if not results:
            return {}
        # One resample: no interval is shown while training.
        metrics = score_results(results, data="validation", split="val", resamples=1)
        values = {"val/loss": loss / max(tokens, 1.0), "val/seconds": time.monotonic() - started}
        for name in ("g_iou", "matched_iou", "mask_g_iou", "mask_dice", "malformed_rate"):
            if metrics.get(name, {}).get("n"):
                values[f"val/{name}"] = metrics[name]["mean"]
        return values


def target_batches(
    run: run_lib.Run, evaluated: EvalSet, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """A set's samples with their targets, in order, in whole batches; fillers have no loss."""
    batches = eval_batches(
        evaluated.samples,
        evaluated.source,
        run.tokenizer,
        run_lib.data_config(run.config),
        batch_size,
        fmt=run.fmt,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        targets=True,
    )
    for batch in batches:
        # Fillers repeat a sample: they must not count twice.
        batch["mask_loss"] = batch["mask_loss"] * (batch["index"] >= 0)[:, None]
        yield {k: batch[k] for k in BATCH_KEYS}
