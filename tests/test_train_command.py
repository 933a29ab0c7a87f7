"""What a user can get wrong ends with one line that names the culprit, before anything is spent."""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from rg_jax import recipes
from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.model.paligemma import init_params
from rg_jax.train import train
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.state import flatten
from rg_jax.weights.npz import save_npz

REPOSITORY = Path(__file__).parents[1]
TABLE = "llm/embedder/input_embedding"


def error_of(call, lines=1):
    """The message of the UserError that `call` ends with."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == lines, message
    return message


def command(*arguments, cwd=REPOSITORY):
    """(exit code, stdout, lines of stderr) of the real command."""
    done = subprocess.run(
        [sys.executable, "-m", "rg_jax.train", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, culprits",
    [
        (["--config=tests/training/tiny_run.py:stepz=3"], ["stepz", "steps", "batch", "seed"]),
        (["--config=configs/none.py"], ["configs/none.py"]),
        ([], ["--config", "configs/det.py:demo"]),
    ],
    ids=["argument", "file", "nothing"],
)
def test_a_wrong_command_line_is_one_line_and_code_2(arguments, culprits):
    code, _, errors = command(*arguments)
    assert code == 2 and len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert all(culprit in errors[0] for culprit in culprits), errors


def test_the_papers_recipe_without_anything_names_all_that_is_missing(tmp_path):
    code, _, errors = command(f"--config={REPOSITORY}/configs/det.py", cwd=tmp_path)
    assert code == 2
    starts = [line.split(" ")[1] for line in errors]
    assert all(line.startswith("error: ") for line in errors), errors
    assert starts[:2] == ["weights:", "tokenizer:"]
    data = [line for line in errors if line.startswith("error: data: ")]
    assert [sum(f"'{name}'" in line for line in data) for name in ("refrad2d", "slake", "vqa_rad")]
    assert len(data) == 3 and all("python -m tfds_builders" in line for line in data), data
    assert "--config.weights=" in errors[0] and "--config.tokenizer.path=" in errors[1]
    assert "configs/det.py:demo" in errors[-1] and len(errors) == 6, errors
    assert not list(tmp_path.iterdir()), "a run that cannot start leaves no folder"


def test_the_size_of_the_big_model_is_told_without_making_it():
    get_config = {}
    exec((REPOSITORY / "configs" / "det.py").read_text(), get_config)
    before, started = {id(x) for x in jax.live_arrays()}, time.monotonic()
    text = run_lib.describe_size(get_config["get_config"](), mesh_lib.make_mesh(jax.devices()[:1]))
    assert time.monotonic() - started < 30
    assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in before) < 2**20
    counts = [line for line in text.splitlines() if line.startswith("#")]
    assert "2,6" in counts[0] and "41" in counts[1], counts
    sizes = {
        line[:36].strip(): float(line.split()[-2])
        for line in text.splitlines()
        if line.endswith("GiB")
    }
    trainable = int(counts[0].split(":")[1].split()[0].replace(",", ""))
    assert sizes["trainable parameters (float32)"] == pytest.approx(4 * trainable / 2**30, abs=0.01)
    assert sizes["sum"] == pytest.approx(sum(sizes.values()) / 2, abs=0.05)


# ---------------------------------------------------------------- original weights


@dataclasses.dataclass
class Weights:
    """A tiny model's weights as they are published: without the rows of the extra tokens."""

    path: Path
    params: dict
    tokenizer: Tokenizer

    def changed(self, path, **changes):
        """Another file with single arrays replaced, or left out (None), by their flat names."""
        flat = {**flatten(self.params), **{k.replace("__", "/"): v for k, v in changes.items()}}
        save_npz(path, {name: v for name, v in flat.items() if v is not None})
        return path


@pytest.fixture(scope="module")
def weights(finished_run, phantom_dir, tiny_config, tmp_path_factory):
    config = tiny_config(phantom_dir)
    fmt = run_lib.grounding_format(config)
    tokenizer = Tokenizer.load(finished_run / run_lib.TOKENIZER_FILE, fmt.extra_tokens)
    model = run_lib.model_config(config, tokenizer.vocab_size)
    model = model.replace(valid_vocab=None, llm={"vocab_size": tokenizer.base_size})
    params = jax.device_get(init_params(model, jax.random.key(5)))
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    save_npz(path, params)
    return Weights(path, params, tokenizer)


def first_params(config, tokenizer):
    fmt = run_lib.grounding_format(config)
    run = run_lib.assemble(config, fmt, tokenizer, 12)
    state = start_lib.first_state(run)
    return {name: np.asarray(v) for name, v in {**state.trainable, **state.frozen}.items()}


def test_the_weights_are_what_training_starts_from(weights, phantom_dir, tiny_config):
    config = tiny_config(phantom_dir, weights=str(weights.path))
    found, stored = first_params(config, weights.tokenizer), flatten(weights.params)
    assert found.keys() == stored.keys()
    for name, value in stored.items():
        if name != TABLE:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    known, used = weights.tokenizer.base_size, weights.tokenizer.vocab_size
    table = found[TABLE]
    assert used == known + 6 and len(table) % 64 == 0 and len(table) >= used
    np.testing.assert_array_equal(table[:known], stored[TABLE])
    new, mean = table[known:used], stored[TABLE].mean(0)
    assert 0 < np.abs(new - mean).max() < np.abs(stored[TABLE] - mean).max()
    assert len(np.unique(new, axis=0)) == 6, "two new tokens are the same"
    assert not table[used:].any()
    np.testing.assert_array_equal(first_params(config, weights.tokenizer)[TABLE], table)


def test_bfloat16_weights_become_float32_masters(weights, phantom_dir, tiny_config, tmp_path):
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), weights.params)
    save_npz(tmp_path / "half.npz", half)
    config = tiny_config(phantom_dir, weights=str(tmp_path / "half.npz"))
    found = first_params(config, weights.tokenizer)
    assert {v.dtype for v in found.values()} == {np.dtype("float32")}
    name = "llm/final_norm/scale" if "llm/final_norm/scale" in found else "img/pos_embedding"
    np.testing.assert_array_equal(found[name], flatten(half)[name].astype(np.float32))


def test_training_that_leaves_the_numbers_stops_and_saves_nothing(
    weights, phantom_dir, tiny_config, tmp_path, capsys, compiled_once
):
    """The weights hold a NaN: were they not what training starts from, it would go well."""
    broken = np.array(flatten(weights.params)["img/head/bias"])
    broken[0] = np.nan
    path = weights.changed(tmp_path / "nan.npz", **{"img/head/bias": broken})
    config = tiny_config(phantom_dir, total_steps=12, weights=str(path))
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert "nan at step 1" in message and "config.optimizer.lr" in message
    assert f"starts from {path}" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_missing_file_says_where_to_get_it(phantom_dir, tiny_config, tmp_path):
    config = tiny_config(phantom_dir, weights=str(tmp_path / "none.npz"))
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert str(tmp_path / "none.npz") in message and "--config.weights=" in message
    assert not (tmp_path / "run").exists()


def cut(weights, path):
    path.write_bytes(weights.path.read_bytes()[:-2000])
    return "cut short"


def text_file(weights, path):
    path.write_text("<html>Please log in</html>")
    return "not a whole .npz file"


def lacks(weights, path):
    weights.changed(path, **{"img/head/bias": None})
    return "missing: params/img/head/bias"


def unknown(weights, path):
    weights.changed(path, **{"img/tail/bias": np.zeros(3, np.float32)})
    return "unknown: params/img/tail/bias"


def misshapen(weights, path):
    weights.changed(path, **{"img/head/bias": np.zeros(17, np.float32)})
    return "params/img/head/bias is (17,) but the model needs (16,)"


def short_table(weights, path):
    weights.changed(path, **{TABLE: flatten(weights.params)[TABLE][:-1]})
    return TABLE


@pytest.mark.parametrize("how", [cut, text_file, lacks, unknown, misshapen, short_table])
def test_wrong_weights_are_named(weights, phantom_dir, tiny_config, tmp_path, how):
    path = tmp_path / "wrong.npz"
    culprit = how(weights, path)
    config = tiny_config(phantom_dir, weights=str(path))
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert culprit in message, message
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


# ---------------------------------------------------------------- tokenizer


def given_tokenizer(path, sha256=""):
    return {"tokenizer": {"path": str(path), "sha256": sha256, "vocab_size": 0}}


def test_a_tokenizer_file_of_another_hash(weights, phantom_dir, tiny_config, tmp_path):
    path = tmp_path / "other.model"
    weights.tokenizer.save(path)
    config = tiny_config(phantom_dir)
    config.tokenizer = given_tokenizer(path, recipes.TOKENIZER_SHA256)["tokenizer"]
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert str(path) in message and recipes.TOKENIZER_SHA256 in message
    assert weights.tokenizer.sha256 in message
    assert not (tmp_path / "run" / run_lib.TOKENIZER_FILE).exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_tokenizer(phantom_dir, tiny_config, tmp_path, content):
    path = tmp_path / "fake.model"
    path.write_bytes(content)
    config = tiny_config(phantom_dir)
    config.tokenizer = given_tokenizer(path)["tokenizer"]
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert str(path) in message
    assert not (tmp_path / "run" / run_lib.TOKENIZER_FILE).exists()


def test_a_missing_tokenizer_and_too_many_bins(weights, phantom_dir, tiny_config, tmp_path):
    config = tiny_config(phantom_dir)
    config.tokenizer = given_tokenizer(tmp_path / "none.model")["tokenizer"]
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert "none.model" in message and "--config.tokenizer.path=" in message
    weights.tokenizer.save(tmp_path / "small.model")
    config.tokenizer.path = str(tmp_path / "small.model")
    config.grounding.bins = 64
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert "32 <loc> pieces" in message and "config.grounding.bins=64" in message


# ---------------------------------------------------------------- data


def part(split="train", tasks=None, name="phantom", **fields):
    return recipes.source(name, split, tasks or {"detect": 1.0}, **fields)


@pytest.mark.parametrize(
    "fields, culprits",
    [
        ({"data.dir": "/nonexistent/data"}, ["phantom", "/nonexistent/data", "tfds_builders"]),
        ({"data.train": [part(name="slaked")]}, ["slaked", "tfds_builders slaked"]),
        ({"data.train": [part("train[:0]")]}, ["phantom", "train[:0]"]),
        ({"data.train": [part("trian")]}, ["phantom", "trian", "train, ", "test"]),
        ({"data.test": [part("tset")]}, ["phantom", "tset"]),
        ({"data.train": []}, ["config.data.train"]),
        ({"data.train": [part(tasks={"detekt": 1.0})]}, ["detekt", "detect"]),
        ({"batch_size": 8, "accumulation": 3}, ["config.batch_size=8", "config.accumulation=3"]),
        ({"batch_size": 12}, ["config.batch_size=12", "8 devices"]),
        ({"batch_size": 16, "accumulation": 4}, ["config.batch_size=16", "8 devices", "32"]),
        ({"total_steps": None}, ["total_steps, total_epochs, total_examples"]),
        ({"total_epochs": 2}, ["total_steps", "total_epochs"]),
        ({"grounding.bins": 1}, ["config.grounding", "bins"]),
        ({"schedule": [("img/.*", None)]}, ["config.schedule", "llm/"]),
        ({"schedule": [("txt/.*", None), (".*", None)]}, ["config.schedule", "txt/.*"]),
        ({"model.variant": "4b"}, ["config.model", "4b", "3b"]),
        ({"model.image_size": 33}, ["config.model", "33"]),
        ({"masks.kind": "unet"}, ["config.model", "unet", "sam"]),
        ({"masks.weight": -1.0}, ["config.masks.weight=-1.0"]),
        ({"optimizer.name": "adamw2"}, ["adamw2"]),
        ({"data.image_style": "pretty"}, ["pretty"]),
        ({"loss.normalise": "words"}, ["config.loss.normalise", "words"]),
    ],
    ids=lambda value: (
        "-".join(f"{k}={str(v)[-18:]}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_wrong_field_is_named(phantom_dir, tiny_config, tmp_path, fields, culprits):
    config = tiny_config(phantom_dir, **fields)
    message = error_of(lambda: train(config, tmp_path / "run"))
    assert all(culprit in message for culprit in culprits), message
    assert not list((tmp_path / "run").glob("checkpoints/*")), "noticed too late"


def test_a_damaged_data_set_is_named(phantom_dir, tiny_config, tmp_path):
    data_dir = tmp_path / "data"
    shutil.copytree(phantom_dir, data_dir)
    (file,) = data_dir.glob("**/*train*array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 2] = b"\x5a" * (len(data) // 2 - len(data) // 3)
    file.write_bytes(data)
    message = error_of(lambda: train(tiny_config(data_dir), tmp_path / "run"))
    assert "phantom" in message and "train" in message and "tfds_builders" in message


# ---------------------------------------------------------------- the folder of the run


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_folders_place(phantom_dir, tiny_config, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    message = error_of(lambda: train(tiny_config(phantom_dir), tmp_path / place))
    assert f"--workdir={tmp_path / place}" in message
    assert (tmp_path / "file").read_text() == "mine"


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_by_another_process(phantom_dir, tiny_config, tmp_path):
    run = tmp_path / "run"
    run_lib.claim(run, tiny_config(phantom_dir)).close()
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "held\n"
        message = error_of(lambda: train(tiny_config(phantom_dir), run))
        assert str(run) in message and "in use by another process" in message
    finally:
        other.communicate()
    # Its end frees the folder, however it came.
    run_lib.claim(run, tiny_config(phantom_dir)).close()


def test_a_run_that_ends_with_an_error_gives_its_folder_back(phantom_dir, tiny_config, tmp_path):
    config = tiny_config(phantom_dir, total_steps=None)
    with pytest.raises(UserError) as error:
        train(config, tmp_path / "run")
    with (tmp_path / "run" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert error.value


@pytest.fixture
def folder_of_a_run(finished_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished_run / run_lib.CONFIG_FILE, run)
    return run


def test_a_folder_of_another_config_names_the_fields(folder_of_a_run, phantom_dir, tiny_config):
    config = tiny_config(phantom_dir, total_steps=13, **{"optimizer.lr": 1e-5})
    message = error_of(lambda: train(config, folder_of_a_run))
    assert "optimizer.lr: 0.002 -> 1e-05" in message and "total_steps: 12 -> 13" in message
    assert "batch_size" not in message and str(folder_of_a_run) in message
    assert json.loads((folder_of_a_run / run_lib.CONFIG_FILE).read_text())["total_steps"] == 12


def test_fields_that_change_no_numbers_may_differ(folder_of_a_run, phantom_dir, tiny_config):
    free = {"log_steps": 7, "eval.samples": 3, "data.workers": 2, "keep_checkpoints": 5}
    config = tiny_config(phantom_dir, total_steps=12, **free)
    run_lib.claim(folder_of_a_run, config).close()
    config.seed = 1
    assert "seed: 0 -> 1" in error_of(lambda: run_lib.claim(folder_of_a_run, config))


def test_a_config_file_of_a_run_that_is_damaged(folder_of_a_run, phantom_dir, tiny_config):
    (folder_of_a_run / run_lib.CONFIG_FILE).write_text('{"seed": ')
    message = error_of(lambda: train(tiny_config(phantom_dir), folder_of_a_run))
    assert str(folder_of_a_run / run_lib.CONFIG_FILE) in message
