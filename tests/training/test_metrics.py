"""What a run says of itself: every line kept once, no rate or counter made up."""

import errno
import io
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rg_jax.data.tasks import COUNTER_NAMES, TASK_NAMES
from rg_jax.errors import UserError
from rg_jax.model.config import from_variant
from rg_jax.training import metrics as metrics_lib
from rg_jax.training.metrics import (
    MetricsWriter,
    Progress,
    Totals,
    check_finite,
    clock,
)
from rg_jax.training.peaks import peak_flops
from rg_jax.training.state import TrainState


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(workdir, resume_step, *steps):
    writer = MetricsWriter(workdir, resume_step)
    for step in steps:
        writer.write(step, {"train/loss": 10.0 - step})
    writer.close()


def events(workdir):
    """Events as their format says: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(workdir.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


# ---------------------------------------------------------------- metrics.jsonl and TensorBoard


def test_a_resumed_log_loses_what_lies_behind_the_checkpoint(tmp_path):
    write(tmp_path, 0, 1, 2, 3, 4)
    write(tmp_path, 2, 3)
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    assert [line["train/loss"] for line in found] == [9.0, 8.0, 7.0]


@pytest.mark.parametrize("tail", ['{"step": 2, "train/lo', '{"train/loss": 1.0}', "{}", "\x00\x00"])
def test_a_half_written_last_line_is_dropped(tmp_path, tail):
    write(tmp_path, 0, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + tail)
    write(tmp_path, 2, 3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]


def test_a_character_cut_in_half_is_dropped_too(tmp_path):
    write(tmp_path, 0, 1)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 2, "ä'.encode()[:-1])
    write(tmp_path, 1, 2)
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_infinities_become_null_which_json_can_hold(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"a": float("nan"), "b": np.float32(-np.inf), "c": np.int64(3)})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (found["a"], found["b"], found["c"]) == (None, None, 3.0)


def test_the_event_file_holds_the_same_numbers(tmp_path):
    write(tmp_path, 0, 1, 2)
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert scalars == {(1, "train/loss"): 9.0, (2, "train/loss"): 8.0}


def test_a_resumed_run_tells_tensorboard_what_is_out_of_date(tmp_path):
    write(tmp_path, 7, 8)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [8]


def test_other_hosts_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, 0, active=False)
    writer.write(1, {"a": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_log_is_one_line_and_closing_adds_none(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.file.close()
    writer.file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device") as error:
        writer.write(1, {"a": 1.0})
    assert "\n" not in str(error.value) and "metrics.jsonl" in str(error.value)
    writer.close()


def test_a_full_disk_under_the_events_does_not_hang(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path, 0)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.board, "write_event", full)
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(1, {"a": 1.0})
    writer.close()


def test_a_full_disk_while_trimming_keeps_the_old_log(tmp_path, monkeypatch):
    write(tmp_path, 0, 1, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_lib, "write_aside", full)
    with pytest.raises(UserError, match="No space left"):
        MetricsWriter(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------- counters and rates


def device(kind):
    """A device of a kind that no test machine has."""
    return Mock(spec=jax.Device, device_kind=kind)


@pytest.fixture
def totals():
    config = ml_collections.ConfigDict(
        {"batch_size": 4, "data": {"text_len": 10}, "objective": "text"}
    )
    model = from_variant("tiny")
    devices = np.array([device("NVIDIA H100 80GB HBM3"), device("NVIDIA H100 80GB HBM3")])
    mesh = Mock(spec=Mesh, size=2, devices=devices)
    step = Mock(spec=jax.Array)
    return Totals(
        model, config, TrainState(step, {"llm/embedder/input_embedding": step}, {}, None), mesh
    )


def step_metrics(**tasks):
    """Metrics of a step as the compiled program gives them; `tasks`: name → (loss sum, tokens)."""
    pairs = np.array([tasks.get(name, (0.0, 0.0)) for name in TASK_NAMES], np.float32)
    norms = {"lr": 0.1, "grad_norm": 1.0, "update_norm": 2.0, "param_norm": 3.0}
    numbers = {k: np.float32(v) for k, v in {"loss": 0.5, **norms}.items()}
    arrays = {k: np.asarray(v) for k, v in numbers.items()}
    return {"task_loss": pairs[:, 0], "task_tokens": pairs[:, 1], **arrays}


def counts(**rows):
    table = np.zeros((2, len(COUNTER_NAMES)), np.int32)
    for name, (first, second) in rows.items():
        table[:, COUNTER_NAMES.index(name)] = first, second
    return {"counts": table}


def test_counters_add_up_over_an_interval_and_start_again(totals):
    totals.add(counts(context_cut=(1, 0), target_cut=(0, 1)))
    totals.add(counts(context_cut=(1, 1)))
    values = totals.flush(step_metrics(), 1.0)
    data = {k: v for k, v in values.items() if k.startswith("data/")}
    assert data == {"data/context_cut": 3.0, "data/target_cut": 1.0}
    assert totals.shown(values)["context_cut"] == "3"
    totals.add(counts(target_cut=(1, 1)))
    again = totals.flush(step_metrics(), 1.0)
    assert again["data/target_cut"] == 2.0 and "data/context_cut" not in again


def test_loss_per_task_is_a_mean_over_tokens_of_tasks_that_were_there(totals):
    values = totals.flush(step_metrics(detect=(6.0, 4.0)), 1.0)
    losses = {k: v for k, v in values.items() if k.startswith("train/loss")}
    assert losses == {"train/loss": 0.5, "train/loss/detect": 1.5}


def test_rates_follow_from_steps_per_second(totals):
    values = totals.flush(step_metrics(), 3.0)
    assert values["train/samples_per_s"] == 12.0
    assert values["train/tokens_per_s"] == 120.0
    assert values["train/tflops_per_s"] == pytest.approx(3 * totals.flops / 1e12)
    assert values["train/mfu"] == pytest.approx(3 * totals.flops / (2 * 989e12))
    assert totals.shown(values)["samples/s"] == "12.0"


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("cpu", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", 989e12),
    ],
)
def test_peak_by_device_kind(kind, peak):
    assert peak_flops(device(kind)) == peak


def test_without_a_known_peak_there_is_no_mfu(totals):
    totals.peak = None
    values = totals.flush(step_metrics(), 1.0)
    assert "train/mfu" not in values and "MFU" not in totals.shown(values)


# ---------------------------------------------------------------- the loss is a number


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["train/loss", "train/param_norm"])
def test_what_is_no_number_stops_the_run(name, value):
    values = {"train/loss": 1.0, "train/param_norm": 1.0}
    check_finite(values, 5)
    with pytest.raises(UserError, match="step 5") as error:
        check_finite({**values, name: value}, 5)
    assert str(value) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- the line of the terminal


@pytest.fixture
def now(monkeypatch):
    """A wall clock that the test sets: `now[0] = seconds`."""
    seconds = [100.0]
    fake = SimpleNamespace(monotonic=lambda: seconds[0], time=lambda: 0.0)
    monkeypatch.setattr(metrics_lib, "time", fake)
    return seconds


@pytest.fixture
def out():
    return io.StringIO()


def test_rate_and_time_left_leave_out_pauses(now, out):
    progress = Progress(100, 1000)
    progress.stream = out
    now[0] += 30.0
    progress.pause(10.0)
    assert progress.tick(140) == pytest.approx(2.0)
    progress.line(140, {"loss": "1.5"})
    assert out.getvalue() == "step  140/1000  loss 1.5  7:10 left\n"
    now[0] += 10.0
    assert progress.tick(150) == pytest.approx(1.0), "a pause counts once"


def test_no_time_left_without_a_rate(now, out):
    progress = Progress(0, 10)
    progress.stream = out
    progress.line(0, {})
    assert out.getvalue() == "step  0/10  0:00 left\n"


@pytest.mark.parametrize(
    "seconds, text",
    [(0.0, "0:00"), (59.6, "1:00"), (95.0, "1:35"), (7300.0, "2:01:40"), (3599.5, "1:00:00")],
)
def test_clock(seconds, text):
    assert clock(seconds) == text
