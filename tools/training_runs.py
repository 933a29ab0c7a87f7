"""Training runs that a study makes, each in a process of its own."""

import multiprocessing
from pathlib import Path

import ml_collections

from rg_jax.cli import stop
from rg_jax.errors import UserError


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
