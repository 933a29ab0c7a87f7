"""What studies share: their command line, and training runs in processes of their own."""

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections

from rg_jax.cli import stop
from rg_jax.errors import UserError
from tfds_builders.__main__ import Parser


def study_parser(
    name: str, doc: str | None, steps: int, steps_help: str
) -> argparse.ArgumentParser:
    """The flags of every study: --out, --steps, --data_dir."""
    parser = Parser(
        prog=f"python -m tools.{name}",
        description=(doc or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=steps, help=f"{steps_help} ({steps})")
    parser.add_argument("--data_dir", default="data", help="where phantoms lie (data)")
    return parser


def run_study(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    work: Callable[[argparse.Namespace], None],
) -> None:
    """`work` with the flags, paths made absolute; mistakes and Ctrl-C end with one line."""
    try:
        options = parser.parse_args(argv)
        if options.steps < 1:
            raise UserError(f"--steps={options.steps}: must be at least 1")
        options.out = options.out.expanduser().absolute()
        options.data_dir = str(Path(options.data_dir).expanduser().absolute())
        work(options)
    except UserError as error:
        stop(str(error))
    except KeyboardInterrupt:
        stop("interrupted; the same command goes on where it was", 130)


def train_apart(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Trains, or goes on with, the run in `workdir`; its memory goes back to the system.

    Raises UserError if the run fails; what is wrong stands on the terminal by then.
    """
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config, workdir))
    process.start()
    process.join()
    if process.exitcode:
        raise UserError(f"the run in {workdir} failed; the same command goes on from there")


def _train(config: ml_collections.ConfigDict, workdir: Path) -> None:
    from rg_jax.train import train
    from rg_jax.training.mesh import prepare_backend

    try:
        prepare_backend()
        train(config, workdir)
    except UserError as error:
        stop(str(error))
