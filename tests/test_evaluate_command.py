"""Evaluation later gives what training gave at its end, however rows are batched."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from rg_jax import evaluate
from rg_jax import run as run_lib
from rg_jax.errors import UserError
from rg_jax.evaluation import answering, compare, driver
from rg_jax.evaluation.predictor import Predictor, fingerprint
from rg_jax.evaluation.results import make_result, read_results, write_results
from rg_jax.run import open_run
from rg_jax.training.state import unflatten
from rg_jax.weights.npz import save_npz
from tfds_builders import __main__ as build_command
from tfds_builders.vqa_rad.vqa_rad_dataset_builder import Builder

REPOSITORY = Path(__file__).parents[1]
OUT = Path("eval") / "phantom-test"


def command(*arguments, code=None, **environment):
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "rg_jax.evaluate"]), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )


def flag_values(*arguments):
    """The command's flags, as this process would have been given them."""
    values = flags.FlagValues()
    evaluate.define_flags(values)
    values(["evaluate", *map(str, arguments)])
    return values


@pytest.fixture
def copy(finished_run, tmp_path):
    """The finished run without what its evaluation wrote."""
    target = tmp_path / "run"
    shutil.copytree(
        finished_run,
        target,
        ignore=shutil.ignore_patterns("eval", "metrics.json", "*.answers.jsonl"),
    )
    assert not (target / OUT).exists()
    return target


def again(workdir, step=None, limit=0, **fields):
    """What the command does, in this process; `fields` of config.eval are changed."""
    run, params, step = open_run(workdir, step)
    for name, value in fields.items():
        run.config.eval[name] = value
    driver.evaluate_all(run, params, workdir, "test", limit, step)
    return run


def predictions(workdir):
    text = (workdir / OUT / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_gives_the_same_bytes_as_training(finished_run, copy, compiled_once):
    done = command(f"--workdir={copy}")
    assert done.returncode == 0, done.stderr
    for name in (OUT / "predictions.jsonl", OUT / "metrics.json", "metrics.json"):
        assert (copy / name).read_bytes() == (finished_run / name).read_bytes(), name
    assert "G-IoU" in done.stdout and str(copy / OUT / "index.html") in done.stdout
    rows = predictions(copy)
    assert len(rows) == 16
    assert any(row["prediction"] for row in rows), "a model that says nothing proves nothing"


FILES = (OUT / "predictions.jsonl", OUT / "metrics.json", Path("metrics.json"))


def check_same_files(found, wanted):
    for name in FILES:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


# 16 samples in batches of 24: the last one holds rows that only fill it up.
@pytest.mark.parametrize("batch_size", [1, 3, 24])
def test_another_batch_size_gives_the_same_predictions(finished_run, copy, batch_size):
    run = again(copy, batch_size=batch_size)
    assert answering.batch_size_of(run) == -(-batch_size // 8) * 8
    check_same_files(copy, finished_run)


# Stores five answers and is killed, as the kernel kills: nothing is tidied up.
KILLED = """
import os, signal, sys
from absl import flags
from rg_jax import cli, evaluate
from rg_jax.evaluation.answers import Answers

add, left = Answers.add, [5]

def and_die(self, answered):
    add(self, answered)
    left[0] -= len(answered)
    if left[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)

Answers.add = and_die
evaluate.define_flags(flags.FLAGS)
cli.main(evaluate.main)
"""


@pytest.fixture
def counted(monkeypatch):
    """Counts the samples for which an answer is generated."""
    generated = []
    call = Predictor.__call__

    def counting(self, *arguments, **more):
        for row in call(self, *arguments, **more):
            generated.append(row.index)
            yield row

    monkeypatch.setattr(Predictor, "__call__", counting)
    return generated


def test_killed_on_one_device_and_gone_on_with_on_eight(finished_run, copy, counted, capsys):
    """The files are those of an evaluation on eight devices that was never stopped."""
    one = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    done = command(f"--workdir={copy}", code=KILLED, **one)
    assert done.returncode == -signal.SIGKILL, done.stderr
    stored = copy / "eval" / "phantom-test.answers.jsonl"
    lines = stored.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 5 and not (copy / OUT).exists()
    # Of the last answer the kill left only a part.
    stored.write_bytes(b"".join(lines)[:-9])
    again(copy)
    assert len(counted) == 16 - 4
    check_same_files(copy, finished_run)
    # Whoever asks once more is answered from what is there.
    again(copy, gallery=2)
    assert len(counted) == 16 - 4
    check_same_files(copy, finished_run)
    assert "discarded" not in capsys.readouterr().out


def test_answers_of_another_checkpoint_are_not_taken(finished_run, copy, counted, capsys):
    again(copy, step=8)
    again(copy)
    assert len(counted) == 2 * 16
    check_same_files(copy, finished_run)
    assert "16 answers of other weights or data are discarded" in capsys.readouterr().out


def test_a_fingerprint_sees_every_bit_and_no_sharding(finished_run):
    run, params, _ = open_run(finished_run, None)
    known = fingerprint(params)
    assert fingerprint({n: jax.device_put(np.asarray(v)) for n, v in params.items()}) == known
    name = max(params, key=lambda n: params[n].size)
    for change in (
        lambda v: v.at[(0,) * v.ndim].add(1e-6),
        lambda v: jnp.flip(v, 0),
        lambda v: jnp.swapaxes(v, 0, -1).reshape(v.shape),
    ):
        assert fingerprint({**params, name: change(params[name])}) != known
    assert run.mesh.size == 8


# ---------------------------------------------------------------- other places, other weights


def test_weights_with_a_config_give_what_the_run_gave(finished_run, tmp_path):
    run, params, _ = open_run(finished_run, None)
    save_npz(tmp_path / "model.npz", unflatten(params))
    config = run_lib.load_config(finished_run)
    config.tokenizer.vocab_size = 0
    config.tokenizer.path = str(finished_run / "tokenizer.model")
    again, weights = evaluate.open_weights(config, str(tmp_path / "model.npz"))
    for name, value in params.items():
        np.testing.assert_array_equal(np.asarray(weights.params[name]), np.asarray(value))
    out = tmp_path / "out"
    metrics = driver.evaluate_sets(again, weights, "test", 0, out=out)
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert rows == predictions(finished_run)
    assert metrics["set"]["weights"] == "model.npz" and "step" not in metrics["set"]
    assert {p.name for p in tmp_path.iterdir()} == {"model.npz", "out", "out.answers.jsonl"}
    page = (out / "index.html").read_text()
    assert "model.npz" in page and str(tmp_path) not in page


def test_weights_need_a_tokenizer_that_they_know(finished_run, tmp_path):
    config = run_lib.load_config(finished_run)
    message = error_of(lambda: evaluate.open_weights(config, "model.npz"))
    assert "--config.tokenizer.path" in message
    config.tokenizer.vocab_size, config.tokenizer.path = 0, str(finished_run / "tokenizer.model")
    message = error_of(lambda: evaluate.open_weights(config, str(tmp_path / "none.npz")))
    assert "none.npz" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--workdir"),
        (("--workdir=a", "--weights=b"), "--weights goes with --config"),
        (("--workdir=a", "--benchmark=slake", "--split=val"), "leave out --data and --split"),
        (("--workdir=a", "--embedder=none/such"), "none/such"),
    ],
)
def test_flags_that_do_not_go_together(arguments, words):
    assert words in error_of(lambda: evaluate.evaluate_command(flag_values(*arguments)))


def test_another_folder_and_nothing_but_it_is_replaced(copy, finished_run, tmp_path):
    out = tmp_path / "figures"
    values = flag_values(f"--workdir={copy}", f"--out={out}", "--definition=published_detection")
    evaluate.evaluate_command(values)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["set"]["definition"] == "published_detection"
    assert metrics["g_iou"] == metrics["by_definition"]["published_detection"]["g_iou"]
    paper = json.loads((finished_run / "metrics.json").read_text())["g_iou"]
    assert metrics["by_definition"]["paper"]["g_iou"] == pytest.approx(paper)
    assert not (copy / "eval").exists() and not (copy / "metrics.json").exists()
    evaluate.evaluate_command(values)  # an evaluation's own folder may be replaced
    (out / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in error_of(lambda: evaluate.evaluate_command(values))
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.fixture(scope="module")
def vqa_rad_dir(tmp_path_factory):
    """VQA-RAD in the image-disjoint layout, with three pictures, built."""
    source, data = (tmp_path_factory.mktemp(name) for name in ("vqa_rad", "built"))
    (source / "images").mkdir()
    rng = np.random.default_rng(0)
    for k, name in enumerate(("train", "validation", "test")):
        picture = rng.integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(picture).save(source / "images" / f"{k}.jpg")
        questions = [("Is it large?", "Yes", "closed"), ("What is shown?", "the liver", "open ")]
        rows = [
            {"image_name": f"{k}.jpg", "question": q, "answer": a, "q_type": t}
            for q, a, t in questions
        ]
        (source / f"{name}_fixed_split.json").write_text(json.dumps(rows))
    build_command.build(Builder, Builder.CONFIG(), str(data), str(source))
    return data


def test_a_benchmark_by_name(copy, vqa_rad_dir, capsys):
    for name in ("vqa_rad", "vqa_rad_published"):
        evaluate.evaluate_command(
            flag_values(f"--workdir={copy}", f"--benchmark={name}", f"--data_dir={vqa_rad_dir}")
        )
        metrics = json.loads((copy / "eval" / name / "metrics.json").read_text())
        about = metrics["set"]
        assert about["benchmark"]["name"] == name and about["split"] == "test"
        assert about["benchmark"]["file"] == "test_fixed_split.json"
        assert about["seen_in_training"] == {} and about["total"] == about["n"] == 2
        assert about.get("marks_removed") == (
            "published_both" if name == "vqa_rad_published" else None
        )
        sizes = [metrics[f"text_f1_{kind}"]["n"] for kind in ("open", "closed", "questions")]
        assert sizes == [1, 1, 2]
        rows = [json.loads(r) for r in (copy / "eval" / name / "predictions.jsonl").open()]
        assert rows[0]["prompt"] == "\nIs it large?\nAnswer: "
        assert {row["why"] for row in metrics["published"] if row["ours"]} == {
            "not the whole set: 2 of 735 questions"
        }
    assert "not the whole set: 2 of 735 questions" in capsys.readouterr().out


def test_two_runs_are_compared_with_their_pictures(copy, finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "eval", copy / "eval")
    path, fmt = copy / OUT / "predictions.jsonl", open_run(copy, None)[0].fmt
    # Every second answer becomes the right one.
    results = [
        make_result(r.sample, r.sample.target, fmt) if k % 2 else r
        for k, r in enumerate(read_results(path))
    ]
    write_results(path, results)
    compare.compare(finished_run, copy, tmp_path / "out")
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert compared["metrics"]["g_iou"]["difference"]["low"] > 0
    assert compared["n"] == 16 and compared["only_in_a"] == compared["only_in_b"] == 0
    shown = compared["disagreements"]
    assert len(shown) == 8
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('<article class="both">') == len(shown)
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) == 2 * len(shown)
    assert all((tmp_path / "out" / picture).is_file() for picture in pictures)
    out = capsys.readouterr().out
    assert "A = finished at step 12, B = run at step 12" in out


def test_an_earlier_step_and_fewer_samples(finished_run, copy):
    again(copy, step=8, limit=4)
    metrics = json.loads((copy / OUT / "metrics.json").read_text())
    assert metrics["set"]["step"] == 8
    rows, all_rows = predictions(copy), predictions(finished_run)
    assert len(rows) == 4
    assert {row["id"] for row in rows} < {row["id"] for row in all_rows}
    by_id = {row["id"]: row["prediction"] for row in all_rows}
    changed = [row for row in rows if row["prediction"] != by_id[row["id"]]]
    assert changed, "parameters of step 8 gave what those of step 12 gave"


# ---------------------------------------------------------------- what is no run


def error_of(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_run(tmp_path):
    message = error_of(lambda: open_run(tmp_path, None))
    assert str(tmp_path / "config.json") in message and "--workdir" in message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_ends_the_command_with_one_line(tmp_path):
    done = command(f"--workdir={tmp_path / 'none'}")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and str(tmp_path / "none") in line


def test_a_config_that_is_no_json(copy):
    (copy / "config.json").write_text('{"seed": ')
    assert "config.json" in error_of(lambda: open_run(copy, None))


def test_a_run_without_its_tokenizer(copy):
    (copy / "tokenizer.model").unlink()
    assert "tokenizer.model" in error_of(lambda: open_run(copy, None))


def test_a_run_without_a_checkpoint(copy):
    shutil.rmtree(copy / "checkpoints")
    assert "checkpoints" in error_of(lambda: open_run(copy, None))
    (copy / "checkpoints").mkdir()
    assert "no complete checkpoint" in error_of(lambda: open_run(copy, None))


def test_a_step_that_is_not_there_names_it(copy):
    assert "checkpoints/7" in error_of(lambda: open_run(copy, 7))


def test_data_that_is_gone(copy, tmp_path):
    run, params, step = open_run(copy, None)
    run.config.data.dir = str(tmp_path / "nowhere")
    message = error_of(lambda: driver.evaluate_all(run, params, copy, "test", 0, step))
    assert "phantom" in message and str(tmp_path / "nowhere") in message
    assert not (copy / OUT).exists()
