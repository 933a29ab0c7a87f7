"""The smallest device for each recipe, from the compiler's own count beside our estimate.

    python -m tools.measure_memory                          3B, per micro-batch of 24, 8, 1
    python -m tools.measure_memory --batches=24 --recipes=det --train_encoder
    python -m tools.measure_memory --target=h100            compiled for a GPU that is not there

The real step of `rg_jax.train` is compiled from shapes alone: no weights, no arrays, so a device
too small to run it can still be asked. On a CPU the compiler widens bfloat16 products to float32
and fuses little: its figure is then an upper bound, and the table says so. With `--target` it is
compiled for that GPU instead, which needs JAX's CUDA plug-in and no GPU. With `--run` the step is
run once too (on an accelerator) and its peak stands beside.
"""

import argparse
import copy
import time
from typing import Any

import jax

from rg_jax.errors import UserError
from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from tools import bench_setup as setup
from tools.gpu_target import OPTIONS, TARGETS, mesh_of

# GiB that a program can have of common devices; some is kept by the driver.
DEVICES = {
    "16 GB (T4, V100)": 14.5,
    "24 GB (RTX 4090, L4, A10)": 22.0,
    "40 GB (A100)": 38.5,
    "48 GB (L40S, A6000)": 44.0,
    "80 GB (A100, H100)": 78.0,
    "141 GB (H200)": 138.0,
}


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("measure_memory", __doc__)
    setup.add_flags(parser)
    parser.add_argument("--batches", default="24,8,1", help="rows of a micro-batch, by commas")
    parser.add_argument("--recipes", default="det,seg", help="det, seg, by commas")
    parser.add_argument("--run", action="store_true", help="run the step once and read the peak")
    parser.add_argument("--target", default="", help=f"compile for: {', '.join(TARGETS)}")
    setup.run_bench(parser, argv, bench, table)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """A row for each recipe, encoder and micro-batch."""
    if options.target and options.run:
        raise UserError("--run needs the GPU itself: leave --target out")
    mesh = mesh_of(options.target) if options.target else None
    rows = []
    for recipe in options.recipes.split(","):
        if recipe not in setup.RECIPES:
            raise UserError(f"--recipes={recipe}: known are {', '.join(setup.RECIPES)}")
        for batch in setup.numbers("batches", options.batches):
            given = copy.copy(options)
            given.recipe, given.batch = recipe, batch * options.accumulation
            rows.append(measure(setup.make_case(given, mesh), options.run, bool(options.target)))
    return {
        "rows": rows,
        "backend": options.target or jax.default_backend(),
        "versions": setup.versions(),
    }


def measure(case: setup.Case, run: bool = False, absent: bool = False) -> dict[str, Any]:
    """Estimate, compiled bytes and the smallest device, by the estimate and by the compiler.

    `absent`: the case's device is one of `gpu_target`.
    """
    parts = estimate(case)
    started = time.perf_counter()
    lowered = setup.make_step(case).lower(*setup.step_shapes(case))
    compiled = lowered.compile(compiler_options=OPTIONS if absent else None)
    found = {
        **case.facts(),
        "estimate_bytes": sum(parts.values()),
        "estimate_parts": parts,
        "compiled_bytes": memory.compiled_bytes(compiled),
        "compile_seconds": time.perf_counter() - started,
    }
    if run:
        state = setup.make_state(case, setup.random_params(case))
        batch = mesh_lib.to_devices(setup.numpy_batch(case), case.mesh)
        jax.block_until_ready(compiled(state, batch))
        found["peak_bytes"] = setup.peak_memory()
    found["smallest_device"] = smallest_device(found["estimate_bytes"])
    found["smallest_device_compiled"] = smallest_device(found["compiled_bytes"])
    return found


def estimate(case: setup.Case) -> dict[str, int]:
    """What `--estimate` of the training command says of this case."""
    return memory.estimate(
        case.shapes,
        case.config,
        rows=case.batch // case.accumulation // case.mesh.size,
        text_len=case.text_len,
        block_size=case.block_size,
        accumulation=case.accumulation,
        devices=case.mesh.size,
        mask_slots=case.slots,
        mask_size=case.config.img.image_size if case.slots else 0,
    )


def smallest_device(size: int | None) -> str | None:
    """The first of DEVICES that holds so many bytes, or that none does; None for unknown."""
    if size is None:
        return None
    for name, room in DEVICES.items():
        if size <= room * memory.GIB:
            return name
    return "none alone"


def table(figures: dict[str, Any]) -> str:
    """A line for each row."""
    lines = [
        f"{'recipe':<8}{'trained':<14}{'remat':<15}{'micro-batch':>12}{'estimate':>10}"
        f"{'compiled':>10}{'run':>8}   smallest device by the compiler"
    ]

    def gib(size):
        return f"{size / memory.GIB:.1f}" if size else "–"

    for row in figures["rows"]:
        trained = f"LoRA {row['lora']}" if row["lora"] else "all but image"
        trained = "everything" if row["encoder"] == "trained" else trained
        lines.append(
            f"{row['recipe']:<8}{trained:<14}{row['remat']:<15}"
            f"{row['batch'] // row['accumulation']:>12}{gib(row['estimate_bytes']):>10}"
            f"{gib(row['compiled_bytes']):>10}{gib(row.get('peak_bytes')):>8}"
            f"   {row['smallest_device_compiled']}"
        )
    lines.append(f"GiB per device; compiled for {figures['backend']}; {figures['versions']}")
    if figures["backend"] == "cpu":
        lines.append("a CPU's compiler widens bfloat16: read its figures as upper bounds")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
