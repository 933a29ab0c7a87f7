"""Are LoRA's factors as good as training everything? From CT phantoms to MR phantoms, both ways.

    python -m tools.lora_study --out=DIR [--steps=1500] [--adapt_steps=300] [--seed=0]

Trains configs/det.py:demo on CT phantoms, then twice from its last checkpoint on MR phantoms: all
parameters, and factors alone. The three are ordinary runs below DIR, so an interrupted study goes
on where it was. Ends with DIR/lora.json and a table: G-IoU on held-out MR phantoms with its 95 %
interval, share of the parameters that learnt, and the paired difference of the two.
"""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from rg_jax import recipes
from rg_jax.config import write_aside
from rg_jax.errors import UserError
from rg_jax.evaluation.bootstrap import Interval, bootstrap_mean
from rg_jax.evaluation.results import read_results
from rg_jax.run import TRAINABLE_FILE
from tfds_builders.__main__ import build
from tfds_builders.phantom.phantom_dataset_builder import Builder, PhantomConfig
from tools.training_runs import run_study, study_parser, train_apart

DET_CONFIG = Path(__file__).parents[1] / "configs" / "det.py"
MARGIN = 0.05  # G-IoU: two ways that differ by less are as good as each other
SET = "phantom-mr64-test"


def run_config(argument: str, options: argparse.Namespace) -> ml_collections.ConfigDict:
    """The demo of configs/det.py, tested on MR phantoms whatever it is trained on."""
    get_config = runpy.run_path(str(DET_CONFIG))["get_config"]
    config = get_config(f"demo,seed={options.seed},{argument}")
    config.data.dir = options.data_dir
    config.data.test = [recipes.source("phantom", "test", {"detect": 1.0}, config="mr64")]
    config.eval.every_steps = 0
    return config


def scores_of(name: str, argument: str, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """G-IoU of each held-out MR sample with reference entities; trains first what is missing."""
    workdir = options.out / name
    predictions = workdir / "eval" / SET / "predictions.jsonl"
    if not predictions.exists():
        print(f"--- {name}", flush=True)
        train_apart(run_config(argument, options), workdir)
    scored = [r for r in read_results(predictions) if r.grounded]
    return {r.sample.id: r.score.g_iou for r in scored}


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Trains what is missing; figures of the three runs and the paired difference."""
    for modality in ("ct", "mr"):
        build(Builder, PhantomConfig(modality=modality), options.data_dir)
    start = options.out / "ct"
    adapt = f"modality=mr,steps={options.adapt_steps},start={start}"
    runs = {
        "ct": f"modality=ct,steps={options.steps}",
        "all": adapt,
        "lora": f"{adapt},lora",
    }
    scores = {name: scores_of(name, argument, options) for name, argument in runs.items()}
    names = sorted(scores["all"])
    assert names == sorted(scores["lora"]), "both were asked the same"
    difference = [scores["lora"][n] - scores["all"][n] for n in names]
    return {
        "steps": options.steps,
        "adapt_steps": options.adapt_steps,
        "seed": options.seed,
        "g_iou": {
            name: bootstrap_mean(np.array(list(found.values()))) for name, found in scores.items()
        },
        "trained": {name: _trained(options.out / name) for name in runs},
        "lora_minus_all": bootstrap_mean(np.array(difference)),
    }


def _trained(workdir: Path) -> str:
    """The share of parameters that learn, as the run's own list says it."""
    first = (workdir / TRAINABLE_FILE).read_text().splitlines()[0]
    return first.removeprefix("# trainable: ")


def table(told: dict[str, Any]) -> str:
    """The figures of a study as text."""

    def cell(figure: Interval, sign: str = "") -> str:
        values = (figure[key] for key in ("mean", "low", "high"))
        mean, low, high = (f"{value:{sign}.3f}" for value in values)
        return f"{mean} [{low}, {high}]"

    titles = {
        "ct": f"CT, {told['steps']} steps",
        "all": f"then MR, {told['adapt_steps']} steps, all parameters",
        "lora": f"then MR, {told['adapt_steps']} steps, factors alone",
    }
    lines = [f"{'':<44}{'G-IoU on MR':<24}trained"]
    for name, title in titles.items():
        lines.append(f"{title:<44}{cell(told['g_iou'][name]):<24}{told['trained'][name]}")
    difference = told["lora_minus_all"]
    lines.append(f"{'factors minus all, paired':<44}{cell(difference, '+')}")
    lines.append(f"{verdict(difference)}, n {difference['n']} (95 % bootstrap over samples)")
    return "\n".join(lines)


def verdict(difference: dict[str, float]) -> str:
    """What a paired difference {"mean", "low", "high"} says of MARGIN: its interval counts too."""
    if abs(difference["mean"]) > MARGIN:
        return f"NOT within {MARGIN}"
    if max(-difference["low"], difference["high"]) > MARGIN:
        return f"within {MARGIN} by the mean, but the interval goes beyond: not shown"
    return f"within {MARGIN}, the whole interval"


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("lora_study", __doc__, 1500, "on CT")
    parser.add_argument("--adapt_steps", type=int, default=300, help="on MR (300)")
    parser.add_argument("--seed", type=int, default=0)

    def work(options: argparse.Namespace) -> None:
        if options.adapt_steps < 1:
            raise UserError(f"--adapt_steps={options.adapt_steps}: must be at least 1")
        told = study(options)
        write_aside(options.out / "lora.json", json.dumps(told, indent=1) + "\n")
        print(table(told))

    run_study(parser, argv, work)


if __name__ == "__main__":
    main()
