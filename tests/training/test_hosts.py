"""Two hosts do together what one does alone, and only one of them writes."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rg_jax.run import open_run
from rg_jax.train import train

REPOSITORY = Path(__file__).parents[2]
STEPS = 12  # those of `finished_run`, which is the same run on one host


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(host, port, workdir, data_dir, cache, *flags):
    # Four devices each: eight in all, as the tests have in one process.
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_COMPILATION_CACHE_DIR": cache,
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "rg_jax.train",
            f"--config=tests/training/tiny_run.py:steps={STEPS}",
            f"--config.data.dir={data_dir}",
            f"--workdir={workdir}",
            f"--coordinator=127.0.0.1:{port}",
            "--num_hosts=2",
            f"--host={host}",
            *flags,
        ],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both(workdir, data_dir, cache, *flags):
    """Output and exit code of both hosts; neither is left behind."""
    port = free_port()
    hosts = [start(i, port, workdir, data_dir, cache, *flags) for i in range(2)]
    try:
        outputs = [host.communicate(timeout=200)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return outputs, [host.returncode for host in hosts]


@pytest.fixture(scope="module")
def two_hosts(phantom_dir, tmp_path_factory):
    """(workdir, outputs, folder of compiled programs) of a run on two hosts."""
    workdir = tmp_path_factory.mktemp("hosts") / "run"
    cache = str(tmp_path_factory.mktemp("hosts_compiled"))
    outputs, codes = both(workdir, phantom_dir, cache)
    assert codes == [0, 0], "\n=== the other host\n".join(outputs)
    return workdir, outputs, cache


def parameters(workdir):
    """Read on one host, whoever wrote them."""
    _, params, step = open_run(workdir, None)
    assert step == STEPS
    return {name: np.asarray(value) for name, value in params.items()}


def test_the_parameters_are_those_of_one_host(two_hosts, finished_run):
    found, wanted = parameters(two_hosts[0]), parameters(finished_run)
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)


def losses(workdir):
    pattern = re.compile(r'"step": (\d+).*"train/loss": ([\d.e-]+)')
    log = (workdir / "metrics.jsonl").read_text()
    return [(int(step), float(loss)) for step, loss in pattern.findall(log)]


def test_the_log_is_that_of_one_host_with_each_step_once(two_hosts, finished_run):
    found, wanted = losses(two_hosts[0]), losses(finished_run)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([x for _, x in found], [x for _, x in wanted], rtol=1e-5)


def test_only_the_first_host_writes_and_speaks(two_hosts, finished_run):
    workdir, outputs, _ = two_hosts
    assert f"step {STEPS}/{STEPS}" in outputs[0]
    assert "step " not in outputs[1] and "G-IoU" not in outputs[1]

    def files(folder):
        # What both hosts had a hand in would lie there twice; logs carry a time and a process.
        names = [
            str(p.relative_to(folder)) for p in folder.rglob("*") if "checkpoints" not in str(p)
        ]
        return sorted(re.sub(r"tfevents\..*", "tfevents", n) for n in names)

    assert files(workdir) == files(finished_run)
    steps = {p.name for p in (workdir / "checkpoints").iterdir()}
    assert steps == {p.name for p in (finished_run / "checkpoints").iterdir()}


def test_predictions_are_those_of_one_host(two_hosts, finished_run):
    name = Path("eval") / "phantom-test" / "predictions.jsonl"
    assert (two_hosts[0] / name).read_text() == (finished_run / name).read_text()


def without_the_last_checkpoint(workdir, place):
    """The folder as a run leaves it that was killed between its last two checkpoints."""
    shutil.copytree(workdir, place, ignore=shutil.ignore_patterns("eval", str(STEPS)))
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["8"]
    return place


def test_two_hosts_go_on_where_two_hosts_stopped(two_hosts, phantom_dir, tmp_path):
    """Bit for bit: parameters, and the log behind the checkpoint written anew."""
    workdir = without_the_last_checkpoint(two_hosts[0], tmp_path / "run")
    outputs, codes = both(workdir, phantom_dir, two_hosts[2])
    assert codes == [0, 0], "\n=== the other host\n".join(outputs)
    assert "goes on from step 8" in outputs[0]
    found, wanted = parameters(workdir), parameters(two_hosts[0])
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert losses(workdir) == losses(two_hosts[0])


def test_one_host_goes_on_where_two_hosts_stopped(
    two_hosts, finished_run, phantom_dir, tiny_config, tmp_path, capsys
):
    workdir = without_the_last_checkpoint(two_hosts[0], tmp_path / "run")
    train(tiny_config(phantom_dir, total_steps=STEPS), workdir)
    assert "goes on from step 8" in capsys.readouterr().out
    found, wanted = parameters(workdir), parameters(finished_run)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_a_mistake_ends_both_hosts(tmp_path, phantom_dir):
    """Only the first host sees that the folder cannot be made; the second must not wait."""
    (tmp_path / "file").write_text("")
    outputs, codes = both(tmp_path / "file" / "run", phantom_dir, str(tmp_path / "cache"))
    assert codes == [2, 2], outputs
    assert "error: --workdir=" in outputs[0]
    assert "error: host 0 has stopped" in outputs[1]
