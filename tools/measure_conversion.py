"""How much host memory a conversion takes, measured on made-up weights of a few GB.

    python -m tools.measure_conversion --folder=/tmp/measure [--gigabytes=3]

Writes PaliGemma 2 in bfloat16 with the real widths and as many layers as fit, converts it from
`.npz` to a folder and back, each in a process of its own, and prints the peak of that process's
memory (from Linux's /proc) beside the size of the largest parameter. All files are removed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from rg_jax import cli
from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.errors import UserError
from rg_jax.model.config import ModelConfig, count_params, from_variant, shape_table
from rg_jax.weights.npz import save_leaves
from rg_jax.weights.source import BF16, Leaf

# In the child: what Python and the imports alone take, then the conversion, then the peak.
_CHILD = """
import sys
from pathlib import Path
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.weights import export
from rg_jax.weights.formats import open_weights
def peak():  # of this process alone: what getrusage tells begins with the parent's peak
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) * 1024
source, target, words = sys.argv[1:]
before = peak()
held = open_weights(source)
if target.endswith(".npz"):
    export.to_npz(held, Path(target), show_progress=False)
else:
    export.to_folder(held, Path(target), Tokenizer.load(words, ()), show_progress=False)
print(before, peak())
"""


def sized(gigabytes: float, rows: int) -> ModelConfig:
    """The 3B model in its own widths, with as many decoder layers as bring it to this size, and
    `rows` for tokens."""
    whole = from_variant("3b", vocab_size=rows)
    for depth in range(1, whole.llm.depth + 1):
        model = whole.replace(llm={"depth": depth})
        if 2 * count_params(model) >= gigabytes * 1e9:
            break
    return model


def write_made_up(path: Path, model: ModelConfig) -> None:
    """Random bfloat16 weights of these dimensions; no more than one parameter is held."""

    def leaf(shape: tuple[int, ...], seed: int) -> Leaf:
        def read(dtype: np.dtype) -> np.ndarray:
            block = np.random.default_rng(seed).standard_normal(2**20, np.float32).astype(dtype)
            return np.resize(block, shape)

        return Leaf(shape, BF16, read)

    table = shape_table(model)
    save_leaves(path, {name: leaf(shape, i) for i, (name, shape) in enumerate(table.items())})


def measure(source: Path, target: Path, words: Path) -> tuple[int, int, float]:
    """(bytes before, peak bytes, seconds) of one conversion in a process of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(source), str(target), str(words)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"the conversion failed: {done.stderr.strip().splitlines()[-1]}")
    before, peak = map(int, done.stdout.split())
    return before, peak, time.monotonic() - started


def report(folder: Path, gigabytes: float) -> list[str]:
    """Makes, converts, measures and removes; the lines to print. Raises UserError."""
    if folder.exists():
        raise UserError(f"--folder={folder} exists already: choose another")
    folder.mkdir(parents=True)
    try:
        words, npz = folder / "tokenizer.model", folder / "one.npz"
        train_tokenizer(["some words"] * 9, words, vocab_size=580, num_loc=16)
        model = sized(gigabytes, Tokenizer.load(words, ()).base_size)
        whole = 2 * count_params(model)
        largest = 2 * max(int(np.prod(shape)) for shape in shape_table(model).values())
        lines = [
            f"{count_params(model):,} parameters, {whole / 1e9:.2f} GB in bfloat16, "
            f"{model.llm.depth} decoder layers; largest parameter {largest / 1e9:.2f} GB"
        ]
        write_made_up(npz, model)
        for source, target in ((npz, folder / "hf"), (folder / "hf", folder / "two.npz")):
            before, peak, seconds = measure(source, target, words)
            lines.append(
                f"{source.name} -> {target.name}: peak {peak / 1e9:.2f} GB, of that "
                f"{(peak - before) / 1e9:.2f} GB for the conversion "
                f"({(peak - before) / largest:.2f} x the largest parameter), {seconds:.0f} s"
            )
            if source is npz:
                npz.unlink()
        return lines
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:] or not FLAGS.folder:
        raise UserError("usage: python -m tools.measure_conversion --folder=DIR")
    print("\n".join(report(Path(FLAGS.folder), FLAGS.gigabytes)))


if __name__ == "__main__":
    flags.DEFINE_string("folder", None, "a new folder for the files, removed at the end")
    flags.DEFINE_float("gigabytes", 3.0, "size of the weights that are made up")
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
