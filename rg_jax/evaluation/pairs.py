"""What becomes of a contrastive run: its retrieval figures, and the encoder that others start with.

The counterpart of `driver` for `config.objective = "contrastive"`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.evaluation.answering import EvalSet, batch_size_of, open_sets
from rg_jax.evaluation.retrieval import retrieval_metrics
from rg_jax.evaluation.score import write_metrics
from rg_jax.evaluation.validator import target_batches
from rg_jax.model.paligemma import apply
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.contrastive import captions_of
from rg_jax.training.state import TrainState, unflatten
from rg_jax.weights.npz import save_npz

ENCODER_FILE = "encoder.npz"
SHOWN = "image_to_text_recall@1"


def make_embed(run: run_lib.Run) -> Callable:
    """Jitted (flat params, batch with targets) → image and caption vectors (B, W) of all hosts."""

    def embed(params, batch):
        call = partial(apply, run.model, unflatten(params))
        tokens, valid = captions_of(batch)
        images = call(batch["image"], method="embed_images")
        return images, call(jax.numpy.maximum(tokens, 0), valid, method="embed_texts")

    places = {**run.shardings.trainable, **run.shardings.frozen}
    return jax.jit(
        embed,
        in_shardings=(places, mesh_lib.batch_sharding(run.mesh)),
        out_shardings=mesh_lib.replicated(run.mesh),
    )


def retrieval(
    run: run_lib.Run, embed: Callable, params, evaluated: EvalSet, resamples: int
) -> dict[str, Any]:
    """The figures of `retrieval_metrics` on one set; every sample is an image and its caption."""
    vectors = []
    for batch in target_batches(run, evaluated, batch_size_of(run)):
        arrays = mesh_lib.to_devices(batch, run.mesh)
        vectors.append([np.asarray(part) for part in embed(params, arrays)])
    samples = evaluated.samples
    # Rows that only fill up the last batch come last.
    images, texts = (np.concatenate(part)[: len(samples)] for part in zip(*vectors, strict=True))
    captions, languages = [s.text for s in samples], [s.language for s in samples]
    return retrieval_metrics(images, texts, captions, languages, resamples)


class PairValidator:
    """Retrieval on a fixed part of the validation sets, while training."""

    def __init__(self, run: run_lib.Run):
        self.run, self.embed = run, make_embed(run)
        wanted = run.config.data.val
        self.sets = open_sets(run, "val", run.config.eval.samples) if wanted else []

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`val/image_to_text_recall@1` and so on, the mean of all validation sets."""
        params = {**state.trainable, **state.frozen}
        found: dict[str, list[float]] = {}
        for evaluated in self.sets:
            figures = retrieval(self.run, self.embed, params, evaluated, resamples=1)
            for name in (SHOWN, "text_to_image_recall@1", "chance"):
                found.setdefault(f"val/{name}", []).append(figures[name]["mean"])
        return {name: float(np.mean(values)) for name, values in found.items()}


def evaluate_pairs(run: run_lib.Run, params, workdir: Path, limit: int, step: int) -> dict:
    """Retrieval on every set of `config.data.test`; returns the figures of the last one.

    Writes `eval/<data>-<split>/metrics.json` and, as the last evaluation's, `metrics.json`.
    """
    embed, metrics = make_embed(run), {}
    for evaluated in open_sets(run, "test", limit):
        metrics = retrieval(run, embed, params, evaluated, run.config.eval.bootstrap)
        metrics["set"] = {
            "data": evaluated.data,
            "split": evaluated.split,
            "samples": len(evaluated.samples),
            "step": step,
        }
        if jax.process_index() == 0:
            out = workdir / "eval" / f"{evaluated.data}-{evaluated.split}".replace("/", "-")
            out.mkdir(parents=True, exist_ok=True)
            write_metrics(out / "metrics.json", metrics)
            write_metrics(workdir / "metrics.json", metrics)
            print(summary(metrics), flush=True)
    return metrics


def summary(metrics: dict[str, Any]) -> str:
    """The figures as lines of text."""
    found = metrics["set"]
    lines = [f"{found['data']} {found['split']}, {found['samples']} images with captions:"]
    for name, figure in metrics.items():
        if "mean" in figure and figure["n"]:
            low, high = figure["low"], figure["high"]
            lines.append(f"  {name:<26}{figure['mean']:6.1%}  ({low:.1%} to {high:.1%})")
    return "\n".join(lines)


def write_encoder(run: run_lib.Run, params, workdir: Path) -> Path:
    """`encoder.npz`: `params/img/…` without the projector, for `config.encoder_weights`."""
    path = workdir / ENCODER_FILE
    names = start_lib.encoder_names(params)
    whole = jax.jit(lambda x: x, out_shardings=mesh_lib.replicated(run.mesh))
    encoder = {name: whole(params[name]) for name in names}
    if jax.process_index() == 0:
        save_npz(path, unflatten(encoder))
    return path
