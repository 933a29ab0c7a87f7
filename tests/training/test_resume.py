"""A run that is killed and resumed ends exactly as one that was never killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 16

# Starts the command in a process that kills itself at a moment which no clock would hit.
KILLED_AT = """
import os, runpy, signal, sys
from orbax.checkpoint.path import atomicity
from rg_jax.training.metrics import MetricsWriter
from rg_jax.evaluation.validator import Validator

moment, number = os.environ["KILLED_AT"].split("-")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def line(self, step, values, write=MetricsWriter.write):
    if moment == "line" and step == int(number):
        self.file.write('{"step": ' + number + ', "train/lo')
        self.file.flush()
        die()
    write(self, step, values)

def validation(self, state, call=Validator.__call__):
    found = call(self, state)
    if moment == "validation" and int(state.step) == int(number):
        die()
    return found

temporary = atomicity.AtomicRenameTemporaryPath

async def finalize(self, *args, whole=temporary.finalize, **more):
    # An item of a step is renamed first (params, optimizer, …), then the step itself.
    place = self.get_final()
    step = place.parent.name.partition(".")[0]
    if (moment, number) in (("save", place.name), (place.name, step)):
        die()
    return await whole(self, *args, **more)

MetricsWriter.write, Validator.__call__, temporary.finalize = line, validation, finalize
sys.argv[0] = "train"
runpy.run_module("rg_jax.train", run_name="__main__")
"""


class Runner:
    """Starts the real command on the tiny config; validates twice, logs and saves out of step."""

    def __init__(self, data_dir: Path, folder: Path):
        self.data_dir, self.folder = data_dir, folder

    def start(self, name: str, killed_at: str = "") -> subprocess.Popen:
        command = [sys.executable, *(["-c", KILLED_AT] if killed_at else ["-m", "rg_jax.train"])]
        command += [
            f"--config=tests/training/tiny_run.py:untested,steps={STEPS}",
            f"--config.data.dir={self.data_dir}",
            f"--workdir={self.folder / name}",
            "--config.log_steps=3",
            "--config.eval.every_steps=8",
            "--config.eval.samples=3",
            "--config.eval.max_new_tokens=2",
        ]
        environment = {
            **os.environ,
            "KILLED_AT": killed_at,
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes)

    def finish(self, name: str) -> str:
        process = self.start(name)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output

    def kill_at(self, name: str, moment: str) -> str:
        process = self.start(name, killed_at=moment)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, output
        return output

    def kill_when_logged(self, name: str, step: int) -> None:
        """Killed from outside, some time after the line of this step."""
        process, path = self.start(name), self.folder / name / "metrics.jsonl"
        end = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            if path.exists() and f'"step": {step},' in path.read_text():
                break
            time.sleep(0.001)
        process.kill()
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output


def saved_state(run: Path) -> dict[str, np.ndarray]:
    """Parameters, optimizer and place in the data at the last step."""
    step = run / "checkpoints" / str(STEPS)
    found = json.loads((step / "data" / "metadata").read_text())
    for item in ("params", "optimizer"):
        tree = ocp.StandardCheckpointer().restore(step / item)
        found |= {f"{item}{path}": np.asarray(leaf) for path, leaf in _leaves(tree)}
    return found


def _leaves(tree, path=""):
    if isinstance(tree, dict):
        return [x for key, value in tree.items() for x in _leaves(value, f"{path}/{key}")]
    if isinstance(tree, list | tuple):
        return [x for i, value in enumerate(tree) for x in _leaves(value, f"{path}/{i}")]
    return [] if tree is None else [(path, tree)]


def log_of(run: Path) -> list[dict]:
    """The log without what depends on the clock. Losses betray the order of samples."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time" and not k.endswith(("_per_s", "seconds"))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def runner(phantom_dir, tmp_path_factory):
    return Runner(phantom_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(runner):
    """The folder of the run that nothing happened to."""
    runner.finish("whole")
    run = runner.folder / "whole"
    steps = [(line["step"], "val/loss" in line) for line in log_of(run)]
    trained = [3, 4, 6, 8, 9, 12, 15, 16]  # every third, and those that are saved
    assert steps == sorted([(step, False) for step in trained] + [(8, True)])
    assert any("data/" in key for line in log_of(run) for key in line), "no counter is compared"
    return run


def assert_equal(run: Path, whole: Path) -> None:
    assert log_of(run) == log_of(whole)
    ours, theirs = saved_state(run), saved_state(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 60
    assert ours["next_batch"] == STEPS
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_killed_at_many_moments(runner, whole):
    name = "killed"
    run = runner.folder / name

    def steps_on_disk():
        return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())

    runner.kill_at(name, "line-3")  # before the first checkpoint, in the middle of a line
    assert steps_on_disk() == []
    output = runner.kill_at(name, "params-4")  # in the first save, before any of it is whole
    assert "starts from random" in output and steps_on_disk() == []
    assert list((run / "checkpoints").glob("4.*tmp*"))
    runner.kill_at(name, "validation-8")
    assert 8 not in steps_on_disk()
    runner.kill_when_logged(name, 9)  # between two, from outside
    output = runner.kill_at(name, f"save-{STEPS}")  # all is written, and not yet renamed
    assert "goes on from step" in output and STEPS not in steps_on_disk()
    output = runner.finish(name)
    assert "goes on from step" in output
    assert_equal(run, whole)
    assert not list((run / "checkpoints").glob("*tmp*")), "what the kills left lies about"


def test_a_finished_run_is_not_trained_again(runner, whole):
    before, log = saved_state(whole), (whole / "metrics.jsonl").read_bytes()
    output = runner.finish("whole")
    assert f"goes on from step {STEPS}" in output and f"/{STEPS}  loss" not in output
    assert (whole / "metrics.jsonl").read_bytes() == log
    after = saved_state(whole)
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
