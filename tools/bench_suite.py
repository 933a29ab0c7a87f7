"""All speed figures of one accelerator in one go, for `BENCHMARKS.md`.

    python -m tools.bench_suite --out=DIR                     everything, 3B; some 25 minutes
    python -m tools.bench_suite --out=DIR --only=train,generate --limit_s=500

Each benchmark is a process of its own, with its own memory, and ends before the next one starts.
Its table is printed; its JSON, its log and the compiled training step lie in DIR. One that fails
does not stop the rest; what no time is left for is named. Compiled programs are kept in DIR/cache:
what is run again does not compile again. With `--model=tiny` the list runs on a CPU, to see that
it works.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from rg_jax.errors import UserError
from tools import bench_setup as setup

# Name → module and flags, the most telling first: time may run out.
FAST = "--remat=dots_no_batch --unroll=64"
LOOP = "--remat=dots_no_batch"
SUITE = {
    "train": f"bench_train {FAST} --profile=25 --no_parts --peer=published,tuned --apart",
    "generate": "bench_generate --batches=64 --rounds=3 --profile=12 --peer=default",
    "train_loop": f"bench_train {LOOP} --no_parts",
    "train_alone": f"bench_train {FAST} --profile=25 --no_parts",
    "train_whole": f"bench_train {FAST} --batch=288 --accumulation=12 --steps=2 --no_parts"
    " --peer=published --apart",
    "train_seg": f"bench_train {FAST} --recipe=seg --no_parts",
    "train_full": "bench_train --remat=full --no_parts",
    "train_parts": f"bench_train {LOOP}",
    "train_cudnn": f"bench_train {LOOP} --vision_attention=cudnn --no_parts",
    "train_block": f"bench_train {LOOP} --block_size=262144 --no_parts",
    "train_encoder": f"bench_train {LOOP} --train_encoder --no_parts",
    "compiled": "bench_peer --kind=compiled",
    "generate_all": "bench_generate --rounds=3 --peer=default",
    "generate_seg": "bench_generate --recipe=seg --batches=64 --rounds=3",
    "memory": "measure_memory --batches=24,8,1 --run",
}


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("bench_suite", __doc__, json_flag=False)
    parser.add_argument("--out", default="", help="folder for tables and JSON (needed)")
    parser.add_argument("--only", default="", help=f"some of {', '.join(SUITE)}, by commas")
    parser.add_argument("--limit_s", type=float, default=3600.0, help="seconds for all together")
    parser.add_argument("--model", default="3b", help="3b; tiny: to try the list out")

    def work():
        options = parser.parse_args(argv)
        if not options.out:
            raise UserError("--out=DIR is needed: where tables and JSON go")
        names = [name for name in options.only.split(",") if name] or list(SUITE)
        if unknown := set(names) - set(SUITE):
            raise UserError(f"--only={min(unknown)}: known are {', '.join(SUITE)}")
        failed = run_all(Path(options.out), names, options.limit_s, options.model)
        if failed:
            raise UserError(f"failed or out of time: {', '.join(failed)}; see {options.out}/*.log")

    setup.run_command(work)


def run_all(out: Path, names: list[str], limit_s: float, model: str) -> list[str]:
    """Runs the named benchmarks one after the other; returns those that gave no figures."""
    out.mkdir(parents=True, exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "5",
    }
    started, failed = time.monotonic(), []
    for number, name in enumerate(names, 1):
        left = limit_s - (time.monotonic() - started)
        print(f"\n[{number}/{len(names)}] {name}: {SUITE[name]} ({left:.0f} s left)", flush=True)
        module, *flags = SUITE[name].split()
        command = [sys.executable, "-m", f"tools.{module}", f"--model={model}", *flags]
        command.append(f"--json={out / name}.json")
        if module == "bench_train":
            command.append(f"--hlo={out / name}.hlo")
        took = time.monotonic()
        try:
            done = subprocess.run(
                command,
                env=os.environ | cache,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(left, 1),
                check=False,
            )
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            text, code = text.decode() if isinstance(text, bytes) else text, None
        (out / f"{name}.log").write_text(text)
        print("\n".join(text.splitlines()[-60:]))
        print(f"  {time.monotonic() - took:.0f} s", flush=True)
        if code:
            failed.append(name)
        elif code is None:
            failed += names[number - 1 :]
            break
    return failed


if __name__ == "__main__":
    main()
