"""Two questions about masks, answered by training the demo a few times; hours of two CPU cores.

    python -m tools.mask_studies decoders --out=DIR [--steps=500] [--seeds=0,1,2] [--data_dir=data]
    python -m tools.mask_studies order    --out=DIR [--steps=500] [--seeds=0]     [--data_dir=data]

decoders   kind "sam" against kind "published", same data, same steps: what is the better decoder?
order      captions that name organs by rising length of their names against falling length: the
           published code paired masks by falling length, so that only the second set was right.

Every run is an ordinary one of configs/seg.py:demo in a folder of its own below DIR, so an
interrupted study goes on where it was. Ends with DIR/STUDY.json and a table on the terminal.
"""

import argparse
import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from rg_jax.config import write_aside
from rg_jax.errors import UserError
from rg_jax.evaluation.bootstrap import Interval, bootstrap_mean, intervals, mean, ratio
from rg_jax.evaluation.masks import dice
from rg_jax.evaluation.results import Result, read_results
from tfds_builders.__main__ import build
from tfds_builders.phantom.phantom_dataset_builder import Builder, PhantomConfig
from tools.training_runs import run_study, study_parser, train_apart

SEG_CONFIG = Path(__file__).parents[1] / "configs" / "seg.py"
MARGIN = 0.05  # Dice: two orders that differ by less train to the same


class Arm(NamedTuple):
    """One side of a comparison: an argument of configs/seg.py and the phantom it is trained on."""

    name: str
    argument: str
    phantom: PhantomConfig


# The first arm is the one that the second is subtracted from.
STUDIES: dict[str, tuple[Arm, Arm]] = {
    "decoders": (
        Arm("sam", "decoder=sam", PhantomConfig()),
        Arm("published", "decoder=published", PhantomConfig()),
    ),
    "order": (
        Arm("text_against_length", "decoder=sam", PhantomConfig(order="shortest_first")),
        Arm("text_as_length", "decoder=sam", PhantomConfig(order="longest_first")),
    ),
}


def run_config(arm: Arm, steps: int, seed: int, data_dir: str) -> ml_collections.ConfigDict:
    """The demo of configs/seg.py on an arm's phantom, with its decoder, steps and seed."""
    get_config = runpy.run_path(str(SEG_CONFIG))["get_config"]
    config = get_config(f"demo,steps={steps},seed={seed},{arm.argument}")
    config.name = f"{config.name} {arm.name}, seed {seed}"
    config.data.dir = data_dir
    for part in (*config.data.train, *config.data.val, *config.data.test):
        part["config"] = arm.phantom.name
    config.eval.every_steps = 0
    return config


def results_of(arm: Arm, steps: int, seed: int, data_dir: str, out: Path) -> list[Result]:
    """The predictions of a run on its test set; trained first unless it has ended."""
    workdir = out / f"{arm.name}-seed{seed}-steps{steps}"
    folder = workdir / "eval" / f"phantom-{arm.phantom.name}-test"
    if not (folder / "predictions.jsonl").exists():
        print(f"--- {workdir.name}", flush=True)
        train_apart(run_config(arm, steps, seed, data_dir), workdir)
    return read_results(folder / "predictions.jsonl")


def mask_columns(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """Per sample with reference masks: `g_iou`, the summed Dice of its matches, their number."""
    scores = [r.mask_score for r in results if r.mask_score and r.mask_score.n_reference]
    if not scores:
        raise UserError("no sample of the test set has a reference mask: nothing to compare")
    return {
        "g_iou": np.array([s.g_iou for s in scores]),
        "dice": np.array([sum(dice(m.iou) for m in s.matches) for s in scores]),
        "pairs": np.array([s.n_matched for s in scores], np.float64),
    }


def figures(columns: dict[str, np.ndarray]) -> dict[str, Interval]:
    """Mask G-IoU and Dice of matched entities, with their intervals."""
    return intervals(
        {
            "mask_g_iou": mean(columns["g_iou"]),
            "mask_dice": ratio(columns["dice"], columns["pairs"]),
        }
    )


def compare(
    first: Sequence[dict[str, np.ndarray]], second: Sequence[dict[str, np.ndarray]]
) -> dict[str, Interval]:
    """First minus second, paired by sample: each sample's values are means over the seeds."""

    def per_sample(runs: Sequence[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.mean([run[name] for run in runs], axis=0)

    def mean_dice(runs: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        summed, pairs = per_sample(runs, "dice"), per_sample(runs, "pairs")
        return np.divide(summed, pairs, out=np.full_like(summed, np.nan), where=pairs > 0)

    return {
        "mask_g_iou": bootstrap_mean(per_sample(first, "g_iou") - per_sample(second, "g_iou")),
        "mask_dice": bootstrap_mean(mean_dice(first) - mean_dice(second)),
    }


def study(name: str, steps: int, seeds: Sequence[int], data_dir: str, out: Path) -> dict[str, Any]:
    """Trains what is missing and returns figures per run, per arm, and their paired difference."""
    runs: dict[str, list[dict[str, np.ndarray]]] = {}
    told: dict[str, Any] = {"study": name, "steps": steps, "seeds": list(seeds), "runs": {}}
    for arm in STUDIES[name]:
        build(Builder, arm.phantom, data_dir)
        runs[arm.name] = []
        for seed in seeds:
            columns = mask_columns(results_of(arm, steps, seed, data_dir, out))
            runs[arm.name].append(columns)
            told["runs"][f"{arm.name}, seed {seed}"] = figures(columns)
    first, second = (runs[arm.name] for arm in STUDIES[name])
    told["difference"] = compare(first, second)
    return told


def table(told: dict[str, Any]) -> str:
    """The figures of a study as text."""

    def line(name: str, row: dict[str, Interval], sign: str = "") -> str:
        cells = [
            f"{row[k]['mean']:{sign}.3f} [{row[k]['low']:{sign}.3f}, {row[k]['high']:{sign}.3f}]"
            for k in ("mask_g_iou", "mask_dice")
        ]
        return f"{name:<32}{cells[0]:>26}{cells[1]:>26}"

    names = [arm.name for arm in STUDIES[told["study"]]]
    lines = [
        f"{'run, ' + str(told['steps']) + ' steps':<32}{'mask G-IoU':>26}{'Dice, matched':>26}"
    ]
    lines += [line(name, row) for name, row in told["runs"].items()]
    lines.append(line("paired difference", told["difference"], "+"))
    lines.append(f"({names[0]} minus {names[1]}; 95 % bootstrap over samples)")
    if told["study"] == "order":
        gap = abs(told["difference"]["mask_dice"]["mean"])
        word = "the same" if gap <= MARGIN else "NOT the same"
        lines.append(f"Dice differs by {gap:.3f}: {word} within {MARGIN}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = study_parser("mask_studies", __doc__, 500, "steps of each run")
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--seeds", default="", help="comma-separated (decoders: 0,1,2)")

    def work(options: argparse.Namespace) -> None:
        given = options.seeds or ("0,1,2" if options.study == "decoders" else "0")
        try:
            seeds = [int(seed) for seed in given.split(",")]
        except ValueError:
            raise UserError(f"--seeds={given}: whole numbers, separated by commas") from None
        told = study(options.study, options.steps, seeds, options.data_dir, options.out)
        write_aside(options.out / f"{options.study}.json", json.dumps(told, indent=1) + "\n")
        print(table(told))

    run_study(parser, argv, work)


if __name__ == "__main__":
    main()
