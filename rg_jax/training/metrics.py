"""Numbers of a run: `metrics.jsonl`, TensorBoard events and one line per log step."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TextIO

import numpy as np
from jax.sharding import Mesh
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from rg_jax.config import write_aside
from rg_jax.data.tasks import COUNTER_NAMES, TASK_NAMES
from rg_jax.errors import UserError
from rg_jax.model.config import ModelConfig
from rg_jax.model.flops import pair_step_flops, parts_of, train_step_flops
from rg_jax.training.peaks import peak_flops
from rg_jax.training.state import TrainState


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard; host 0 only, silent on the others."""

    def __init__(self, workdir: Path, resume_step: int, active: bool = True):
        """Drops lines behind `resume_step`: a resumed run writes those steps again."""
        self.active = active
        if not active:
            return
        self.path = workdir / "metrics.jsonl"
        with _writing(self.path):
            _trim(self.path, resume_step)
            self.file = self.path.open("a", encoding="utf-8")
            # The plain writer: tensorboardX's usual one has a thread, and when that meets a full
            # disk it dies, and the run then waits for it for ever.
            self.board = EventsWriter(str(workdir / "events"), f".{os.getpid()}")
            # TensorBoard hides what an earlier start logged from this step on.
            again = SessionLog(status=SessionLog.START)
            self._event(resume_step + 1, session_log=again)

    def _event(self, step: int, **content) -> None:
        self.board.write_event(Event(wall_time=time.time(), step=step, **content))
        self.board.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of flat numbers. Infinities and NaN become null, which JSON can hold."""
        if not self.active:
            return
        numbers = {k: float(v) for k, v in values.items()}
        line = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        summary = Summary(value=[v for k, x in numbers.items() for v in scalar(k, x).value])
        with _writing(self.path):
            self.file.write(json.dumps({"step": step, "time": time.time(), **line}) + "\n")
            self.file.flush()
            self._event(step, summary=summary)

    def close(self) -> None:
        """Closes the files; every line was flushed when it was written."""
        if self.active:
            for file in (self.file, self.board):
                # A line that did not fit was reported then; closing would only say so again.
                with contextlib.suppress(OSError):
                    file.close()


@contextlib.contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space, then run the same command "
            "again to go on from the last checkpoint"
        ) from error


def _trim(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the half-written last line of a killed run
    write_aside(path, "".join(line + "\n" for line in kept))


class Totals:
    """What accumulates between two log steps: counters of the data, and what a step amounts to."""

    def __init__(self, model: ModelConfig, config, shapes: TrainState, mesh: Mesh):
        self.batch_size, self.devices = config.batch_size, mesh.size
        self.text_len = config.data.text_len
        length = config.data.text_len - 1  # the last token is predicted, never fed
        parts = parts_of(shapes.trainable)
        slots = config.masks.slots if model.masks is not None else 0
        if config.objective == "contrastive":
            per_sample = pair_step_flops(model, self.text_len, trained=parts).model
            self.flops_per_target = 0
        else:
            # Logits are made only where there is loss, and how many those are each step tells.
            per_sample, one_more = (
                train_step_flops(model, length, targets, trained=parts, masks=slots).model
                for targets in (0, 1)
            )
            self.flops_per_target = one_more - per_sample
        self.flops = config.batch_size * per_sample
        self.peak = peak_flops(mesh.devices.flat[0])
        self.counts = np.zeros(len(COUNTER_NAMES), np.int64)

    def add(self, batch: dict[str, np.ndarray]) -> None:
        """Counts what this host's rows lost on their way into the batch."""
        self.counts += batch["counts"].sum(0)

    def flush(self, metrics: dict[str, np.ndarray], steps_per_second: float) -> dict[str, float]:
        """Flat numbers for the log; counters are per log interval and start again at 0."""
        values = {"train/loss": metrics["loss"]}
        if "task_loss" in metrics:
            for name, loss, tokens in zip(
                TASK_NAMES, metrics["task_loss"], metrics["task_tokens"], strict=True
            ):
                if tokens:
                    values[f"train/loss/{name}"] = loss / tokens
        masks = metrics.get("mask_masks", 0)
        if masks:
            values["train/mask_pixels"] = metrics["mask_pixels"] / masks
            values["train/mask_dice"] = metrics["mask_dice"] / masks
        for name in ("lr", "grad_norm", "update_norm", "param_norm"):
            values[f"train/{name}"] = metrics[name]
        for name in ("batch_recall", "scale", "bias"):  # of a contrastive run
            if name in metrics:
                values[f"train/{name}"] = metrics[name]
        samples = steps_per_second * self.batch_size
        values["train/samples_per_s"] = samples
        values["train/tokens_per_s"] = samples * self.text_len
        flops = self.flops + self.flops_per_target * float(np.sum(metrics.get("task_tokens", 0)))
        values["train/tflops_per_s"] = steps_per_second * flops / 1e12
        if self.peak:
            values["train/mfu"] = steps_per_second * flops / (self.peak * self.devices)
        for name, count in zip(COUNTER_NAMES, self.counts, strict=True):
            if count:
                values[f"data/{name}"] = count
        self.counts[:] = 0
        return {k: float(v) for k, v in values.items()}

    def shown(self, values: dict[str, float]) -> dict[str, str]:
        """The few of them that fit on a line of the terminal."""
        line = {"loss": f"{values['train/loss']:.4f}", "lr": f"{values['train/lr']:.1e}"}
        line["samples/s"] = f"{values['train/samples_per_s']:.1f}"
        if "train/mask_dice" in values:
            line["dice loss"] = f"{values['train/mask_dice']:.3f}"
        if "train/batch_recall" in values:
            line["batch recall"] = f"{values['train/batch_recall']:.3f}"
        if "train/mfu" in values:
            line["MFU"] = f"{values['train/mfu']:.1%}"
        cut = {k[5:]: int(v) for k, v in values.items() if k.startswith("data/")}
        return line | {name: str(count) for name, count in cut.items()}


def check_finite(values: dict[str, float], step: int) -> None:
    """Raises UserError if the loss is no number: going on would only spoil checkpoints.

    The parameters' norm tells the same of what this very step has made of them.
    """
    for name, what in (("train/loss", "loss"), ("train/param_norm", "norm of the parameters")):
        if not math.isfinite(values[name]):
            raise UserError(
                f"the {what} is {values[name]} at step {step}: lower config.optimizer.lr or set "
                "config.optimizer.clip_norm; the last checkpoint is from before"
            )


class Progress:
    """Rate and time left, from the wall clock since the last log step."""

    def __init__(self, first_step: int, total_steps: int, stream: TextIO = sys.stdout):
        self.total, self.stream = total_steps, stream
        self.last_step, self.last_time = first_step, time.monotonic()
        self.paused = 0.0
        self.rate = 0.0

    def pause(self, seconds: float) -> None:
        """Time spent on evaluation or the first compilation does not count as training."""
        self.paused += seconds

    def tick(self, step: int) -> float:
        """Steps per second since the last tick."""
        now = time.monotonic()
        spent = max(now - self.last_time - self.paused, 1e-9)
        self.rate = (step - self.last_step) / spent
        self.last_step, self.last_time, self.paused = step, now, 0.0
        return self.rate

    def line(self, step: int, values: dict[str, str]) -> None:
        """`step 300/3000 · loss 1.23 · … · 5:12 left`"""
        left = (self.total - step) / self.rate if self.rate else 0.0
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        parts += [f"{name} {value}" for name, value in values.items()]
        parts.append(f"{clock(left)} left")
        print("  ".join(parts), file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """95 → `1:35`, 7300 → `2:01:40`."""
    minutes, s = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
