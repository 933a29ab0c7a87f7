"""New runs that start where others ended: other data, LoRA's factors, an adapted encoder."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from rg_jax import recipes
from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.model.lora import TABLE, merge
from rg_jax.train import train
from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.state import flatten, unflatten
from rg_jax.weights.npz import load_npz, read_shapes, save_npz

CONFIGS = Path(__file__).parents[1] / "configs"


def adapt(config, start, lora=False):
    """What the arguments start=… and lora of a config do."""
    return recipes.adapted(config, ml_collections.ConfigDict({"start": str(start), "lora": lora}))


def assemble(config, tokenizer_of: Path):
    fmt = run_lib.grounding_format(config)
    tokenizer = Tokenizer.load(tokenizer_of / run_lib.TOKENIZER_FILE, fmt.extra_tokens)
    return run_lib.assemble(config, fmt, tokenizer, total_steps=10)


def plain(params, rows: int):
    """Flat parameters as NumPy arrays; of the table the rows that stand for a token."""
    params = jax.device_get(params)
    return {n: v[:rows] if n == TABLE else v for n, v in params.items()}


def first_params(config, tokenizer_of: Path):
    """Flat parameters of a run's first state."""
    run = assemble(config, tokenizer_of)
    state = start_lib.first_state(run)
    return plain({**state.trainable, **state.frozen}, run.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def start(finished_run):
    """The finished run and its flat parameters."""
    run, params, _ = run_lib.open_run(finished_run)
    return finished_run, plain(params, run.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def lora_run(start, phantom_dir, tiny_config, tmp_path_factory, compiled_once):
    """The folder of a run of three steps that trains factors from the finished run on."""
    config = adapt(tiny_config(phantom_dir, total_steps=3), start[0], lora=True)
    config.data.test = []
    workdir = tmp_path_factory.mktemp("runs") / "lora"
    train(config, workdir)
    return workdir


def test_a_run_starts_with_the_parameters_of_an_earlier_one(start, phantom_dir, tiny_config):
    folder, params = start
    found = first_params(adapt(tiny_config(phantom_dir), folder), folder)
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_only_the_factors_learn_and_all_is_written_down(start, lora_run):
    folder, params = start
    run, found, step = run_lib.open_run(lora_run)
    found, shapes = plain(found, run.tokenizer.vocab_size), run.shapes
    assert step == 3 and set(run.shapes.frozen) == set(params)
    for name, value in params.items():
        frozen = value.astype(jnp.bfloat16)
        assert found[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[name], frozen, err_msg=name)
    factors = {n: np.asarray(v) for n, v in found.items() if n.startswith("lora/")}
    assert factors.keys() == set(run.shapes.trainable)
    for name, value in factors.items():
        assert value.dtype == np.float32 and value.any(), f"{name} has not learnt"
    listing = (lora_run / run_lib.TRAINABLE_FILE).read_text()
    head, *rows = listing.splitlines()
    count = sum(v.size for v in factors.values())
    share = count / (count + sum(np.prod(s.shape) for s in shapes.frozen.values()))
    assert (
        head == f"# trainable: {count:,} parameters in {len(factors)} arrays ({share:.2%} of all)"
    )
    assert all(r.split("\t")[1].startswith("lora/") for r in rows if r.startswith("trainable"))
    # The run has its own copy of the tokenizer and needs the old folder no more.
    for name in (run_lib.TOKENIZER_FILE, run_lib.FORMAT_FILE):
        assert (lora_run / name).read_bytes() == (folder / name).read_bytes()


def test_a_run_that_starts_from_factors_has_them_merged(lora_run, phantom_dir, tiny_config):
    run, params, _ = run_lib.open_run(lora_run)
    expected = flatten(merge(unflatten(params), run.model.config))
    expected = plain(expected, run.tokenizer.vocab_size)
    params = plain(params, run.tokenizer.vocab_size)
    found = first_params(adapt(tiny_config(phantom_dir), lora_run), lora_run)
    assert found.keys() == expected.keys() and not any(n.startswith("lora/") for n in found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float32), err_msg=name)
    assert any((value != np.asarray(params[n])).any() for n, value in expected.items())


@pytest.mark.parametrize(
    "fields, culprits",
    [
        ({"grounding.box_order": "xyxy"}, ["config.grounding"]),
        ({"model.llm": {"depth": 2}}, ["llm/layers/", "(1, ", "(2, "]),
        ({"lora.rank": 2, "lora.include": ["llm/layer/.*"]}, ["lora.include", "llm/layer/.*"]),
    ],
)
def test_a_start_that_does_not_fit_is_named(start, phantom_dir, tiny_config, fields, culprits):
    config = tiny_config(phantom_dir)
    spec = {**config.model.llm, **fields.pop("model.llm", {})}
    config = adapt(tiny_config(phantom_dir, **fields, **{"model.llm": spec}), start[0])
    with pytest.raises(UserError) as error:
        first_params(config, start[0])
    message = str(error.value)
    assert all(culprit in message for culprit in culprits), message
    assert len(message.splitlines()) == 1


def test_another_tokenizer_is_refused(start, phantom_dir, tiny_config):
    run = assemble(adapt(tiny_config(phantom_dir), start[0]), start[0])
    run.tokenizer.model_bytes, run.tokenizer.sha256 = b"another file", "its hash"
    with pytest.raises(UserError, match="its tokenizer is not this run's") as error:
        start_lib.first_state(run)
    assert str(start[0] / run_lib.TOKENIZER_FILE) in str(error.value)


def test_a_folder_without_a_checkpoint_is_no_start(start, phantom_dir, tiny_config, tmp_path):
    shutil.copy(start[0] / run_lib.CONFIG_FILE, tmp_path)
    shutil.copy(start[0] / run_lib.TOKENIZER_FILE, tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        train(adapt(tiny_config(phantom_dir), tmp_path), tmp_path / "new")


def test_runs_made_before_a_part_of_the_config_existed(start, tmp_path, phantom_dir, tiny_config):
    stored = json.loads((start[0] / run_lib.CONFIG_FILE).read_text())
    for name in ("lora", "encoder_weights", "objective"):
        del stored[name]
    (tmp_path / run_lib.CONFIG_FILE).write_text(json.dumps(stored))
    config = run_lib.load_config(tmp_path)
    assert (config.lora.rank, config.encoder_weights, config.objective) == (0, "", "text")
    run_lib.claim(tmp_path, tiny_config(phantom_dir, total_steps=12)).close()
    with pytest.raises(UserError, match="lora.rank: 0 -> 2"):
        run_lib.claim(tmp_path, tiny_config(phantom_dir, total_steps=12, **{"lora.rank": 2}))


# ---------------------------------------------------------------- an adapted encoder


@pytest.fixture(scope="module")
def encoder_run(phantom_dir, tiny_config, tmp_path_factory, compiled_once):
    """The folder of a contrastive run of three steps."""
    reports = {"report": 1.0}
    config = tiny_config(
        phantom_dir,
        total_steps=3,
        objective="contrastive",
        schedule=[("img/head/.*", None), (".*", {"decay": "constant"})],
        **{
            "eval.every_steps": 2,
            "data.train": [recipes.source("phantom", "train", reports)],
            "data.val": [recipes.source("phantom", "val", reports)],
            "data.test": [recipes.source("phantom", "test", reports)],
        },
    )
    workdir = tmp_path_factory.mktemp("runs") / "encoder"
    metrics = train(config, workdir)
    assert metrics == json.loads((workdir / "metrics.json").read_text())
    return workdir


def test_a_contrastive_run_leaves_figures_and_an_encoder(encoder_run):
    metrics = json.loads((encoder_run / "metrics.json").read_text())
    recall, chance = metrics["image_to_text_recall@1"], metrics["chance"]
    assert recall["n"] == chance["n"] == 16  # eight slices in two languages
    assert 1 / 8 <= chance["mean"] < 1 and 0 <= recall["low"] <= recall["mean"] <= recall["high"]
    assert set(metrics["by_language"]) == {"en", "de"}
    log = [json.loads(line) for line in (encoder_run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/image_to_text_recall@1" in line for line in log)
    assert all(line["train/loss"] > 0 for line in log if "train/loss" in line)
    run, params, _ = run_lib.open_run(encoder_run)
    names = {k.removeprefix("params/") for k in read_shapes(encoder_run / "encoder.npz")}
    assert names == {n for n in params if n.startswith("img/") and "/head/" not in n}
    tree = unflatten({n: run.shapes.trainable[n] for n in names})
    for name, value in flatten(load_npz(encoder_run / "encoder.npz", tree)).items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)


def test_other_runs_begin_with_that_encoder(encoder_run, start, phantom_dir, tiny_config):
    folder, params = start
    encoder = encoder_run / "encoder.npz"
    config = adapt(tiny_config(phantom_dir, encoder_weights=str(encoder)), folder)
    found = first_params(config, folder)
    _, adapted, _ = run_lib.open_run(encoder_run)
    for name, value in params.items():
        of = adapted if name.startswith("img/") and "/head/" not in name else params
        np.testing.assert_array_equal(found[name], of[name], err_msg=name)
        if of is adapted and name.endswith("kernel"):
            assert (found[name] != value).any(), name


def test_an_encoder_that_does_not_fit_is_named(start, phantom_dir, tiny_config, tmp_path):
    folder, params = start
    config = tiny_config(phantom_dir, encoder_weights=str(tmp_path / "encoder.npz"))
    with pytest.raises(UserError, match="encoder.npz is not there"):
        train(config, tmp_path / "run")
    encoder = {n: v for n, v in params.items() if n.startswith("img/")}
    del encoder["img/embedding/bias"]
    save_npz(tmp_path / "encoder.npz", unflatten(encoder))
    with pytest.raises(UserError, match="img/embedding/bias"):
        first_params(config, folder)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"accumulation": 2, "batch_size": 16}, "config.accumulation=2"),
        ({"accumulation": 1, "batch_size": 1}, "config.batch_size=1: .* needs 2 or more"),
    ],
)
def test_batches_that_pairs_cannot_make(phantom_dir, tiny_config, tmp_path, sizes, words):
    config = tiny_config(phantom_dir, objective="contrastive", **sizes)
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")


# ---------------------------------------------------------------- the size of the large model


def test_factors_of_the_large_model_fit_a_gpu_of_24_gb():
    config = runpy.run_path(str(CONFIGS / "det.py"))["get_config"]("lora")
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    told = run_lib.describe_size(config, mesh)
    share = float(told.split("arrays (")[1].split("%")[0])
    assert 0 < share < 5
    fmt = run_lib.grounding_format(config)
    rows = run_lib.GEMMA_IDS + len(fmt.extra_tokens)
    model = run_lib.make_model(config, rows).config
    assert model.lora.new_rows == len(fmt.extra_tokens) == 5
    size = float(told.split("sum")[1].split("GiB")[0])
    assert 8 < size < 24e9 / memory.GIB
    # The projector's own gradients must pass through the encoder: its activations are counted.
    config.lora.include = ["llm/layers/(attn|mlp)/.*"]
    assert float(run_lib.describe_size(config, mesh).split("sum")[1].split("GiB")[0]) < size
