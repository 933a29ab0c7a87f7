"""Checkpoints: parameters, optimizer, step and data iterator, saved together or not at all.

Orbax writes a step into a temporary folder and renames it when it is complete, so a killed save
leaves the previous step as the last good one. What is on disk decides where a run goes on.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rg_jax.errors import UserError
from rg_jax.training.state import TrainState, flatten, merge


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
        """Opens (and, unless `read_only`, creates and tidies) the folder.

        Raises UserError if the folder cannot be written or does not exist.
        """
        self.folder = Path(folder).absolute()
        if read_only and not self.folder.is_dir():
            raise UserError(f"{self.folder} does not exist: is this the folder of a training run?")
        try:
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None if read_only else keep,
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                ),
            )
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error}") from error

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: Any, wait: bool = False) -> None:
        """Starts saving in the background; an earlier save that failed is reported here.

        Raises UserError (disk full, folder gone) naming the last good step; nothing that was
        complete before is touched.
        """
        if self.manager.latest_step() == step:
            return
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(merge(state)),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
            # One small file for all hosts: the state is the same on each, and so a run can go on
            # with another number of them.
            data=ocp.args.JsonSave(iterator.get_state()),
        )
        try:
            self.manager.wait_until_finished()
            self.manager.save(step, args=args, force=True)
            if wait:
                self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Blocks until the background save is on disk; raises as `save` does."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed(None, error) from error

    def _failed(self, step: int | None, error: Exception) -> UserError:
        self.manager.reload()
        good = self.manager.latest_step()
        last = (
            f"step {good} is the last good one" if good is not None else "there is none before it"
        )
        what = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        return UserError(
            f"could not save {what} in {self.folder} ({_reason(error)}); {last}. Free some space "
            "or choose another --workdir, then run the same command again to go on"
        )

    def restore(
        self, shapes: TrainState, shardings: TrainState, iterator: Any, step: int | None = None
    ) -> TrainState:
        """The state of `step` (default: the newest), each array born on its devices.

        `iterator` is set to go on behind the last sample of that step. Raises UserError if the
        checkpoint does not fit the config.
        """
        wanted = _targets(shapes, shardings)
        items = self._read(
            step,
            params=ocp.args.StandardRestore(merge(wanted)),
            optimizer=ocp.args.StandardRestore({"step": wanted.step, "state": wanted.opt_state}),
            data=ocp.args.JsonRestore(),
        )
        iterator.set_state(items["data"])
        flat = flatten(items["params"])
        return TrainState(
            items["optimizer"]["step"],
            {n: flat[n] for n in shapes.trainable},
            {n: flat[n] for n in shapes.frozen},
            items["optimizer"]["state"],
        )

    def restore_params(
        self, shapes: TrainState, shardings: TrainState, step: int | None = None
    ) -> dict[str, jax.Array]:
        """Only the flat parameters of a step, for evaluation: no optimizer state is read."""
        wanted = merge(_targets(shapes, shardings))
        return flatten(self._read(step, params=ocp.args.StandardRestore(wanted))["params"])

    def _read(self, step: int | None, **items: ocp.args.CheckpointArgs) -> Any:
        step = self.latest() if step is None else step
        if step is None:
            raise UserError(f"{self.folder} holds no complete checkpoint")
        if step not in (there := sorted(self.manager.all_steps())):
            listed = ", ".join(map(str, there)) or "none"
            raise UserError(f"checkpoint {self.folder}/{step} is not there; there are: {listed}")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged arrays come as nothing more special
            raise UserError(
                f"checkpoint {self.folder}/{step} cannot be read with this config: {_reason(error)}"
            ) from error

    def close(self) -> None:
        """Finishes the background save and releases the folder."""
        self.wait()
        self.manager.close()


def _reason(error: BaseException) -> str:
    """What went wrong, on one line of bearable length."""
    # TensorStore wraps the system's error in the whole story of where it was on the way.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if re.search(
        r"while reading array|DATA_LOSS|OUT_OF_RANGE|corrupt|truncated", text, re.IGNORECASE
    ):
        return "a file of it is damaged or cut off; take another step, or remove this one"
    return text if len(text) <= 300 else f"{text[:300]} …"


def _targets(shapes: TrainState, shardings: TrainState) -> TrainState:
    """Shapes that carry the sharding each array is to be born with."""

    def one(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, shardings)
