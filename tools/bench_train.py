"""How fast a training step is, what its parts cost, and how that compares with PyTorch.

    python -m tools.bench_train                                  3B, 224 px, 200 tokens, 24 rows
    python -m tools.bench_train --batch=288 --accumulation=12    the paper's whole step
    python -m tools.bench_train --model=tiny --peer=published,tuned --same_weights
    python -m tools.bench_train --peer=published --apart --json=FILE

The step is the one of `rg_jax.train`, with random weights: no file is read and no data package
imported. With `--peer` the same shapes are trained with transformers (extra "bench"), step by step
in turns in this process, or with `--apart` each in a process of its own (two 3B models do not fit
one 80 GB device together). MFU is model FLOPs (`rg_jax/model/flops.py`; nothing that is computed
twice counts) over time and the maker's dense bf16 peak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rg_jax.config import write_aside
from rg_jax.errors import UserError
from rg_jax.model.flops import parts_of, train_step_flops
from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.peaks import peak_flops
from tools import bench_setup as setup
from tools.bench_parts import parts
from tools.bench_profile import profile
from tools.bench_profile import table as profile_table

GIB = 2**30


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("bench_train", __doc__)
    setup.add_flags(parser)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--peer", default="", help="published, tuned, compiled, by commas")
    parser.add_argument("--apart", action="store_true", help="every peer in its own process")
    parser.add_argument(
        "--same_weights", action="store_true", help="the peers get ours, and losses are compared"
    )
    parser.add_argument("--profile", type=int, default=0, help="show so many costliest kernels")
    parser.add_argument("--hlo", default="", help="write the compiled program here, as text")
    parser.add_argument("--no_parts", action="store_true", help="do not time parts of the step")
    setup.run_bench(parser, argv, bench, table)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """All figures as one object."""
    peers = [name for name in options.peer.split(",") if name]
    if options.same_weights and options.recipe != "det":
        raise UserError("--same_weights needs --recipe=det: the peers have no mask decoder")
    if options.same_weights and options.apart:
        raise UserError("--same_weights needs the peers in this process: leave --apart out")
    # First of all: once JAX has a device, it keeps most of its memory for itself.
    apart = {name: _peer_apart(options, name) for name in peers} if options.apart else {}
    case = setup.make_case(options)
    params = setup.random_params(case)
    kept = {k: np.asarray(v) for k, v in params.items()} if options.same_weights else None
    state = setup.make_state(case, params)
    del params
    batch = setup.numpy_batch(case)
    arrays = mesh_lib.to_devices(batch, case.mesh)

    started = time.perf_counter()
    compiled = setup.make_step(case).lower(*setup.step_shapes(case)).compile()
    figures: dict[str, Any] = {
        "case": case.facts(),
        "command": " ".join(["python -m tools.bench_train", *_given(options)]),
        "compile_seconds": time.perf_counter() - started,
    }
    if options.hlo:
        write_aside(Path(options.hlo), compiled.as_text())
    losses: list[float] = []

    def ours():
        nonlocal state
        state, metrics = compiled(state, arrays)
        losses.append(float(metrics["loss"]))  # waits for the step

    sides: dict[str, Callable[[], Any]] = {"ours": ours}
    if peers and not options.apart:
        sides |= {name: _Peer(case, name, batch, kept) for name in peers}
    spent = setup.interleave(sides, options.steps)
    figures["versions"] = setup.versions(*(("torch", "transformers") if peers else ()))
    figures["ours"] = rates(case, setup.summary(spent["ours"])) | {
        "loss": losses[0],
        "compiled_bytes": memory.compiled_bytes(compiled),
        "peak_bytes": setup.peak_memory(),
    }
    if options.profile:
        figures["profile"] = profile(ours) | {"shown": options.profile}
    if not options.no_parts:
        figures["parts"] = parts(case, state, arrays, options.steps)
    figures["peers"] = {}
    for name in peers:
        if options.apart:
            found = apart[name]
            seconds = found["seconds"] / figures["ours"]["seconds"]
            found["ratio"] = {"ratio": seconds, "quartiles": None, "by_processor_time": None}
        else:
            found = rates(case, setup.summary(spent[name]))
            found["loss"] = sides[name].losses[0]
            found["ratio"] = setup.ratio(spent["ours"], spent[name])
        figures["peers"][name] = found
        if kept is not None and abs(found["loss"] - losses[0]) > 1e-3 * abs(losses[0]):
            raise UserError(
                f"the first loss is {losses[0]:.5f} here and {found['loss']:.5f} with the peer "
                f"'{name}': the two do not compute the same"
            )
    return figures


def rates(case: setup.Case, times: dict[str, Any]) -> dict[str, Any]:
    """Samples, tokens and arithmetic per second, from the median step."""
    seconds = times["seconds"]
    fed = case.text_len
    flops = train_step_flops(
        case.config, fed, case.targets, parts_of(case.shapes.trainable), masks=case.slots
    )
    peak = peak_flops(jax.devices()[0])
    found = {
        **times,
        "samples_per_s": case.batch / seconds,
        "text_tokens_per_s": case.batch * fed / seconds,
        "model_tflops_per_s": case.batch * flops.model / seconds / 1e12,
        "hardware_tflops_per_s": case.batch * flops.hardware / seconds / 1e12,
    }
    if peak:
        found["mfu"] = case.batch * flops.model / seconds / (peak * jax.device_count())
    return found


# ---------------------------------------------------------------- the peers


class _Peer:
    """A peer's step, to be called; `losses` holds what it found."""

    def __init__(self, case: setup.Case, name: str, batch, params):
        from tools import bench_peer

        self.losses: list[float] = []
        self.trainer = bench_peer.make_trainer(case, name, batch, params)

    def __call__(self) -> None:
        self.losses.append(self.trainer.step())


def _peer_apart(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The figures of `tools.bench_peer` in a process of its own."""
    command = [sys.executable, "-m", "tools.bench_peer", f"--kind={name}", "--json=-"]
    command += _given(
        options, without=("peer", "apart", "json", "no_parts", "profile", "hlo", "same_weights")
    )
    # The child asks JAX about the device only; its memory is torch's.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"the peer '{name}' failed: {last}")
    return json.loads(done.stdout)["peer"]


def _given(options: argparse.Namespace, without: tuple[str, ...] = ("json", "hlo")) -> list[str]:
    """The flags that say what is run, to be run again."""
    given = []
    for name, value in vars(options).items():
        if name in without or value in ("", 0, False):
            continue
        given.append(f"--{name}" if value is True else f"--{name}={value}")
    return given


def table(figures: dict[str, Any]) -> str:
    """For people: rates, then parts, then what it was run on."""
    case = figures["case"]
    lines = [
        f"{case['recipe']}, {case['parameters'] / 1e6:,.1f} M parameters, {case['image_size']} px,"
        f" {case['text_tokens']} text tokens ({case['targets']} with loss),"
        f" batch {case['batch']} in {case['accumulation']},"
        f" encoder {case['encoder']}, remat {case['remat']}, {case['compute_dtype']}",
        f"{'':<28}{'s/step':>10}{'samples/s':>11}{'tokens/s':>11}{'MFU':>8}{'peak GiB':>10}"
        f"{'ours is':>10}",
    ]
    for name, row in {"ours": figures["ours"], **figures["peers"]}.items():
        peak = row.get("peak_bytes") or row.get("compiled_bytes")
        lines.append(
            f"{name:<28}{row['seconds']:>10.4f}{row['samples_per_s']:>11.1f}"
            f"{row['text_tokens_per_s']:>11.0f}"
            + (f"{row['mfu']:>8.1%}" if "mfu" in row else f"{'–':>8}")
            + (f"{peak / GIB:>10.2f}" if peak else f"{'–':>10}")
            + (f"{row['ratio']['ratio']:>9.2f}x" if "ratio" in row else "")
        )
    for name, row in figures.get("parts", {}).items():
        lines.append(f"  {name:<26}{row['seconds']:>10.4f}")
    if "profile" in figures:
        lines += profile_table(figures["profile"], figures["profile"]["shown"])
    lines.append(f"compiled in {figures['compile_seconds']:.1f} s; {figures['versions']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
