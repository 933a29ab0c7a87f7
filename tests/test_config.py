"""Config arguments, durations and the comparison of configs."""

import runpy
from pathlib import Path

import pytest

from rg_jax import config as config_lib
from rg_jax import run
from rg_jax.data.tasks import get_task
from rg_jax.errors import UserError
from rg_jax.training.state import split_names

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
ARGUMENTS = {
    "det.py": ("", "demo,steps=5", "freeze_encoder=false,image_size=448", "variant=10b,steps=5")
    + ("lora", "demo,modality=mr,start=runs/ct,lora", "demo,modality=ct"),
    "seg.py": ("", "demo", "slake", "slake,tiny", "decoder=published", "slake,only_decoder")
    + ("lora",),
    "joint.py": ("", "demo", "slake,freeze_encoder=false", "slake,tiny,steps=5", "only_decoder")
    + ("slake,lora",),
    "siglip.py": ("", "demo", "text_layers=2,image_size=448,steps=5"),
    "slake.py": ("", "tiny", "lora"),
}


def test_arguments_take_the_type_of_their_default():
    arg = config_lib.parse_arg("demo,steps=20,lr=1e-3", demo=False, steps=0, lr=0.1, name="x")
    assert (arg.demo, arg.steps, arg.lr, arg.name) == (True, 20, 1e-3, "x")
    assert config_lib.parse_arg(None, demo=False).demo is False
    assert config_lib.parse_arg("demo=false", demo=True).demo is False


@pytest.mark.parametrize(
    "text, culprit",
    [
        ("dmo", "dmo"),
        ("step=3", "step"),
        ("steps=many", "steps"),
        ("steps", "steps"),
        ("demo=7", "demo"),
    ],
)
def test_a_wrong_argument_is_named(text, culprit):
    with pytest.raises(UserError, match=culprit) as error:
        config_lib.parse_arg(text, demo=False, steps=0)
    assert "\n" not in str(error.value)


def test_durations_in_every_unit():
    def steps(**config):
        return config_lib.duration(config, "total", total_steps=200, batch_size=10, examples=1000)

    assert steps(total_steps=7) == 7
    assert steps(total_epochs=2) == 200
    assert steps(total_examples=50) == 5
    assert steps(total_percent=10) == 20
    assert steps() is None
    with pytest.raises(UserError, match="total_steps, total_epochs"):
        steps(total_steps=7, total_epochs=1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_survives_json_and_refuses_unknown_arguments(path):
    get_config = runpy.run_path(str(path))["get_config"]
    for arg in (None, *ARGUMENTS[path.name]):
        config = get_config(arg)
        again = config_lib.from_json(config_lib.to_json(config))
        assert config_lib.to_json(again) == config_lib.to_json(config)
        assert config_lib.duration(config, "total", batch_size=config.batch_size, examples=1000)
    with pytest.raises(UserError, match="no_such_argument"):
        get_config("no_such_argument=1")


def test_differences_name_nested_fields():
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 3, "c": [1]}}
    assert config_lib.differences(old, new) == ["a.b: 1 -> 3", "d: 2 -> None"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    config_lib.write_aside(path, "old")

    def broken(*_):
        raise OSError("no space")

    monkeypatch.setattr(config_lib.os, "replace", broken)
    with pytest.raises(OSError, match="no space"):
        config_lib.write_aside(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_makes_sense(path):
    """Values are in range, every parameter has a schedule, tasks and masks go together."""
    get_config = runpy.run_path(str(path))["get_config"]
    for argument in ARGUMENTS[path.name]:
        c = get_config(argument)
        config_lib.check(c)
        model = run.make_model(c, c.tokenizer.vocab_size or run.GEMMA_IDS)
        trained, _ = split_names(list(run.param_shapes(model)), c.schedule)
        assert trained, argument
        tasks = {task for part in c.data.train for task in part["tasks"]}
        assert any(get_task(task).has_masks for task in tasks) == (model.config.masks is not None)
        sizes = ("total_steps", "total_epochs", "total_examples")
        assert sum(c[size] is not None for size in sizes) == 1, argument
        # A tiny model learns from random numbers, and asks for no file but an earlier run.
        from_files = c.model.variant != "tiny" or "start=" in argument
        assert bool(c.weights) == bool(c.tokenizer.path) == from_files, argument


def config_of(name, argument):
    path = CONFIGS[0].with_name(name)
    return runpy.run_path(str(path))["get_config"](argument)


@pytest.mark.parametrize(
    "name, argument",
    [
        ("det.py", "demo,variant=10b"),
        ("seg.py", "demo,image_size=448"),
        ("seg.py", "slake,tiny,freeze_encoder=false"),
        ("seg.py", "demo,slake"),
        ("joint.py", "demo,tiny"),
        ("slake.py", "tiny,variant=10b"),
    ],
)
def test_an_argument_that_would_go_unheard_is_refused(name, argument):
    with pytest.raises(UserError, match="config argument"):
        config_of(name, argument)


def test_the_joint_recipe_trains_every_prompt_that_it_promises():
    for argument in ("", "demo"):
        tasks = config_of("joint.py", argument).data.train[0]["tasks"]
        assert {"joint", "detect", "segment"} <= set(tasks), argument


@pytest.mark.parametrize("name", ["det.py", "seg.py", "joint.py", "slake.py"])
def test_the_config_that_is_named_where_something_is_missing_needs_nothing(name):
    for argument in ("", "slake") if name in ("seg.py", "joint.py") else ("",):
        path, _, other = config_of(name, argument).runs_without.partition(":")
        instead = config_of(path.removeprefix("configs/"), other)
        assert not instead.weights and not instead.tokenizer.path
        assert {part["name"] for part in instead.data.train} == {"phantom"}
