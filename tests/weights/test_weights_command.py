"""convert, inspect and compare, and a released model as a run that evaluation opens."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rg_jax import run as run_lib
from rg_jax.errors import UserError
from rg_jax.grounding.format import PUBLISHED_SEGMENTATION
from rg_jax.training import mesh as mesh_lib
from rg_jax.weights import export, listing
from rg_jax.weights.formats import open_weights

REPOSITORY = Path(__file__).parents[2]
FLAGS = {
    "dtype": "",
    "max_shard": "5GB",
    "tokenizer": None,
    "model": None,
    "image_size": None,
    "heads": None,
    "norms": True,
    "config": None,
}


@pytest.fixture
def command(monkeypatch):
    """The command in this process: `command(*names, flag=value)`."""
    module = importlib.import_module("rg_jax.weights.__main__")

    def run(*names, **flags):
        monkeypatch.setattr(module, "FLAGS", SimpleNamespace(**{**FLAGS, **flags}), raising=False)
        module.main(["weights", *map(str, names)])

    return run


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_command_and_its_exit_codes(released):
    def ends(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "rg_jax.weights", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=200,
        )

    done = ends("inspect", "--model=3b")
    assert done.returncode == 0 and "3,032,094,960 parameters" in done.stdout
    assert "llm/embedder/input_embedding" in done.stdout and "(257152,2304)" in done.stdout
    one, other = (str(released[kind].folder) for kind in ("plain", "detection"))
    done = ends("compare", one, other)
    assert done.returncode == 1 and "differences" in done.stdout, done.stderr
    done = ends("inspect", "/nonexistent")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_inspect_lists_all_there_is(command, released, capsys):
    made = released["segmentation"]
    command("inspect", made.folder)
    text = capsys.readouterr().out
    source = open_weights(str(made.folder))
    for name, leaf in source.leaves.items():
        (line,) = (row for row in text.splitlines() if row.split()[:1] == [name])
        norm = float(np.linalg.norm(leaf.stored().astype(np.float64).reshape(-1)))
        assert float(line.split()[-1]) == pytest.approx(norm, rel=1e-4)
        assert str(leaf.shape).replace(" ", "") in line and f"{leaf.size:,}" in line
    total = sum(leaf.size for leaf in source.leaves.values())
    assert f"total: {total:,} parameters" in text and "float32" in text
    first = made.tokenizer.image_id + 1
    assert f"<seg> {first}, </seg> {first + 1}" in text and made.tokenizer.sha256 in text
    assert "'xyxy'" in text and "kind='published'" in text
    command("inspect", model="tiny", image_size=224)
    assert "(1,256,96)" in capsys.readouterr().out
    assert "4b" in error_of(lambda: command("inspect", model="4b"))
    for names in ([], ["turn"], ["convert", "a"], ["compare", "a", "b", "c"]):
        assert "python -m rg_jax.weights" in error_of(lambda names=names: command(*names))


def changed(folder, target, change):
    """A copy as an .npz with arrays changed, by our names."""
    source = open_weights(str(folder))
    export.to_npz(source, target, show_progress=False)
    with np.load(target) as file:
        arrays = {key.removeprefix("params/"): file[key] for key in file.files}
    change(arrays)
    np.savez(target, **{f"params/{name}": array for name, array in arrays.items()})
    return target


def test_compare_names_every_difference(command, released, capsys, tmp_path):
    folder = released["plain"].folder
    up = "llm/layers/mlp/gating_einsum"

    def change(arrays):
        del arrays["img/head/bias"]
        arrays["llm/more"] = np.ones(3, np.float32)
        arrays["llm/final_norm/scale"] = arrays["llm/final_norm/scale"][:-1]
        arrays["img/pos_embedding"][0, 2, 3] += 0.25
        arrays[up] = arrays[up][::-1].copy()

    other = changed(folder, tmp_path / "other.npz", change)
    with pytest.raises(SystemExit) as ended:
        command("compare", folder, other)
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert re.search(r"only in \S*plain: img/head/bias", text)
    assert "only in" in text and "params/llm/more" in text
    assert "other shape: llm/final_norm/scale: (24,) and (23,)" in text
    assert re.search(r"differs: img/pos_embedding: 0.25, relative 0\.\d+$", text, re.M)
    assert f"swapped: {up}: layer 0 of one is layer 1 of the other" in text
    assert f"differs: {up}" in text and "layers 0, 1" in text

    same = changed(folder, tmp_path / "same.npz", lambda arrays: None)
    command("compare", folder, same)
    assert re.search(r"^\d+ arrays are equal, 0 differences$", capsys.readouterr().out, re.M)


def test_values_that_are_no_numbers_are_compared_too(released):
    leaf = next(iter(open_weights(str(released["plain"].folder)).leaves.values()))
    array = leaf.stored().copy()
    broken = array.copy()
    broken.reshape(-1)[5] = np.nan

    def of(values):
        return type(leaf)(values.shape, values.dtype, lambda dtype: values)

    assert listing.difference(of(array), of(array), False) is None
    assert listing.difference(of(broken), of(broken), False) is None
    assert listing.difference(of(array), of(broken), False).absolute == np.inf


def test_convert_there_and_back(command, released, capsys, tmp_path):
    made = released["detection"]
    command("convert", made.folder, tmp_path / "w.npz", dtype="bfloat16")
    beside = {path.name for path in tmp_path.iterdir()}
    assert beside == {"w.npz", "w.grounding_format.json", "w.tokenizer.model"}
    command("convert", tmp_path / "w.npz", tmp_path / "hf", max_shard="20KB")
    with pytest.raises(SystemExit):
        command("compare", made.folder, tmp_path / "hf")
    command("compare", tmp_path / "w.npz", tmp_path / "hf")
    assert "0 differences" in capsys.readouterr().out
    assert "exists already" in error_of(
        lambda: command("convert", tmp_path / "w.npz", tmp_path / "hf")
    )
    message = error_of(lambda: command("convert", f"{tmp_path}/w.npz:img", tmp_path / "new"))
    assert "part of a model" in message
    (tmp_path / "w.tokenizer.model").unlink()
    message = error_of(lambda: command("convert", tmp_path / "w.npz", tmp_path / "new"))
    assert "--tokenizer=FILE" in message and not (tmp_path / "new").exists()
    command("convert", f"{tmp_path}/w.npz:img", tmp_path / "img.npz")
    assert {name.split("/")[0] for name in open_weights(f"{tmp_path}/img.npz").leaves} == {"img"}


def test_a_released_model_becomes_a_run_that_is_evaluated(
    command, released, phantom_dir, tiny_config, tmp_path, monkeypatch
):
    from rg_jax import evaluate
    from rg_jax.evaluation import driver

    # One device: programs for eight take three times as long to compile.
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda devices=None: mesh)
    made = released["segmentation"]
    config = tiny_config(phantom_dir, **{"eval.max_new_tokens": 4, "eval.gallery": 1})
    config.data.test[0]["tasks"] = {"segment": 1.0}
    config.masks.slots = 2
    folder = tmp_path / "run"
    command("convert", made.folder, folder, config=config)
    source, run = open_weights(str(made.folder)), open_weights(str(folder))
    assert run.fmt == source.fmt == PUBLISHED_SEGMENTATION and run.masks == source.masks
    assert run.tokens["</seg>"] == made.tokenizer.extra_ids[1]
    for name, leaf in source.leaves.items():
        np.testing.assert_array_equal(run.leaves[name].stored(), leaf.stored(), err_msg=name)
    opened, params, step = evaluate.open_run(folder, None)
    assert step == 0 and opened.model.config.masks.kind == "published"
    driver.evaluate_all(opened, params, folder, "test", 8, step)
    assert (folder / "index.html").is_file()
    assert jax.tree.leaves(params) and run_lib.load_config(folder).weights == str(made.folder)


def test_a_file_of_something_else_and_a_target_that_cannot_be(tmp_path):
    """Each one line and exit code 2; asking for help is no mistake."""
    np.savez(tmp_path / "other.npz", a=np.zeros(3))

    def run(*words):
        command = [sys.executable, "-m", "rg_jax.weights", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr

    code, text = run("inspect", tmp_path / "other.npz")
    assert code == 2 and "none of its 1 arrays is known here" in text
    code, text = run("convert", tmp_path / "other.npz", "/proc/none/there.npz")
    assert code == 2 and text.startswith("error: ") and "Traceback" not in text
    assert run("--help")[0] == 0
