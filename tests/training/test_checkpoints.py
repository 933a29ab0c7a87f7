"""Checkpoints: what was saved comes back, and what was not saved whole is never taken for it."""

import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.handlers import json_checkpoint_handler

from rg_jax.errors import UserError
from rg_jax.training import mesh as mesh_lib
from rg_jax.training.checkpoints import Checkpoints
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import new_state, state_shapes

ROWS = 4096  # of the one array that is sharded; incompressible, so that its file is large
ADAM = {"name": "adamw", "lr": 1e-3, "b2": 0.98, "weight_decay": 0.01, "clip_norm": 1.0}


class Data:
    """An iterator's state, as Checkpoints sees it."""

    def __init__(self, place=0):
        self.place = place

    def get_state(self):
        return {"next_batch": self.place}

    def set_state(self, state):
        self.place = state["next_batch"]


class Setup:
    """Shapes, shardings and states of a made-up model: one array learns, two are frozen."""

    def __init__(self, rows=ROWS, frozen_dtype="bfloat16", optimizer=ADAM):
        shapes = {
            "llm/embedder": jax.ShapeDtypeStruct((rows, 8), jnp.float32),
            "img/a/kernel": jax.ShapeDtypeStruct((3, 5), jnp.float32),
            "img/b": jax.ShapeDtypeStruct((2048, 16), jnp.float32),
        }
        schedules = {"llm/embedder": {"decay": "constant"}}
        self.optimizer = Optimizer(optimizer, schedules, 10)
        self.mesh = mesh_lib.make_mesh()
        self.shapes = state_shapes(shapes, schedules, self.optimizer, frozen_dtype)
        self.shardings = mesh_lib.shard_tree(self.shapes, self.mesh)

    def state(self, step):
        rng = np.random.default_rng(step)
        wanted = {**self.shapes.trainable, **self.shapes.frozen}
        values = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in wanted.items()}
        state = new_state(self.shapes, self.shardings, values, self.optimizer)

        def fill(leaf):
            # Moments that differ from where an optimizer begins.
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf + step
            return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

        return state._replace(step=state.step + step, opt_state=jax.tree.map(fill, state.opt_state))


@pytest.fixture(scope="module")
def setup():
    return Setup()


@pytest.fixture
def saved(setup, tmp_path):
    """A folder whose newest step is 4."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(4, setup.state(4), Data(40))
    checkpoints.close()
    return tmp_path / "checkpoints"


def same(found, wanted):
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True)
    for (path, a), b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def restores(folder, setup, step):
    """The newest step of the folder is `step`, and it is whole."""
    checkpoints = Checkpoints(folder)
    data = Data()
    assert checkpoints.latest() == step
    same(checkpoints.restore(setup.shapes, setup.shardings, data), setup.state(step))
    assert data.place == 10 * step
    checkpoints.close()


def error_of(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- back as it was


def test_a_state_comes_back_bit_for_bit_and_in_its_places(saved, setup):
    restores(saved, setup, 4)
    checkpoints = Checkpoints(saved)
    state = checkpoints.restore(setup.shapes, setup.shardings, Data())
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(setup.shardings), strict=True)
    assert all(array.sharding.is_equivalent_to(place, array.ndim) for array, place in pairs)
    embedder = state.trainable["llm/embedder"]
    assert embedder.addressable_shards[0].data.shape == (ROWS // 8, 8), "nothing was sharded"


def test_parameters_alone_come_back_with_their_bfloat16(saved, setup):
    reader = Checkpoints(saved, read_only=True)
    params = reader.restore_params(setup.shapes, setup.shardings)
    state = setup.state(4)
    same(params, dict(sorted({**state.trainable, **state.frozen}.items())))
    dtypes = {name: str(array.dtype) for name, array in params.items()}
    assert dtypes == {
        "img/a/kernel": "bfloat16",
        "img/b": "bfloat16",
        "llm/embedder": "float32",
    }


def test_parameters_can_be_read_while_the_optimizer_is_gone(saved, setup):
    shutil.rmtree(saved / "4" / "optimizer")
    reader = Checkpoints(saved, read_only=True)
    assert set(reader.restore_params(setup.shapes, setup.shardings, 4)) == {
        "img/a/kernel",
        "img/b",
        "llm/embedder",
    }


def test_the_newest_are_kept(setup, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, setup.state(step), Data(10 * step))
    checkpoints.close()
    assert {p.name for p in tmp_path.iterdir() if p.name.isdigit()} == {"2", "3"}
    restores(tmp_path, setup, 3)


def test_a_step_that_is_there_is_not_written_again(saved, setup):
    checkpoints = Checkpoints(saved)
    checkpoints.save(4, setup.state(5), Data(50))
    checkpoints.close()
    restores(saved, setup, 4)


# ---------------------------------------------------------------- saves that fail


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def check_failed_save(saved, setup, checkpoints, reason):
    message = error_of(lambda: checkpoints.save(8, setup.state(8), Data(80), wait=True))
    assert reason in message and "step 8" in message, message
    assert "step 4 is the last good one" in message and str(saved) in message, message


def test_a_full_disk_is_one_line_that_names_the_last_good_step(saved, setup, monkeypatch):
    checkpoints = Checkpoints(saved)
    with monkeypatch.context() as patch:
        # Orbax's own writer of the small files.
        patch.setattr(json_checkpoint_handler.json, "dumps", no_space)
        check_failed_save(saved, setup, checkpoints, "No space left on device")
    restores(saved, setup, 4)


def test_a_full_disk_at_the_last_moment_leaves_no_step(saved, setup, monkeypatch):
    checkpoints = Checkpoints(saved)
    with monkeypatch.context() as patch:
        for cls in [ocp.path.atomicity.AtomicRenameTemporaryPath]:
            patch.setattr(cls, "finalize", no_space)
        check_failed_save(saved, setup, checkpoints, "No space left on device")
    restores(saved, setup, 4)


def test_arrays_that_really_cannot_be_written(saved, setup):
    """The system itself refuses to let files grow, under Orbax's writer of arrays."""
    checkpoints = Checkpoints(saved)
    state = setup.state(8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        message = error_of(lambda: checkpoints.save(8, state, Data(80), wait=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step 4 is the last good one" in message
    restores(saved, setup, 4)


def test_a_save_that_failed_in_the_background_is_told_when_waiting(saved, setup, monkeypatch):
    checkpoints = Checkpoints(saved)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", no_space)

        def save_and_wait():
            checkpoints.save(8, setup.state(8), Data(80))
            checkpoints.wait()

        message = error_of(save_and_wait)
    assert "No space left on device" in message and "step 4 is the last good one" in message
    restores(saved, setup, 4)


def test_the_first_save_that_fails_names_no_step(setup, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(json_checkpoint_handler.json, "dumps", no_space)
    message = error_of(lambda: checkpoints.save(4, setup.state(4), Data(), wait=True))
    assert "there is none before it" in message
    assert checkpoints.latest() is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error_of(lambda: Checkpoints(tmp_path / "file" / "checkpoints"))


# ---------------------------------------------------------------- what a killed save leaves


@pytest.mark.parametrize("how", ["renamed", "cut"])
def test_half_written_steps_are_ignored(saved, setup, how):
    """As a kill leaves them: the temporary folder of step 8, whole or with only a part of it."""
    temporary = saved / "8.orbax-checkpoint-tmp"
    shutil.copytree(saved / "4", temporary)
    (temporary / "commit_success.txt").unlink(missing_ok=True)
    if how == "cut":
        shutil.rmtree(temporary / "params")
    assert Checkpoints(saved, read_only=True).latest() == 4
    assert temporary.exists(), "a reader tidies nothing: the run may be under way"
    restores(saved, setup, 4)
    assert not temporary.exists()


def test_a_run_goes_on_over_what_a_killed_save_left(saved, setup):
    shutil.copytree(saved / "4", saved / "8.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(saved)
    checkpoints.save(8, setup.state(8), Data(80))
    checkpoints.close()
    restores(saved, setup, 8)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "other, culprit",
    [
        (lambda: Setup(rows=ROWS * 2), "llm/embedder|llm.embedder|shape"),
        (lambda: Setup(optimizer={"name": "sgd", "lr": 1e-3}), ""),
    ],
    ids=["shapes", "optimizer"],
)
def test_a_checkpoint_of_another_config_is_refused(saved, other, culprit):
    wrong = other()
    checkpoints = Checkpoints(saved)
    message = error_of(lambda: checkpoints.restore(wrong.shapes, wrong.shardings, Data()))
    assert f"{saved}/4" in message and "config" in message


def test_parameters_of_another_shape_are_refused(saved):
    wrong = Setup(rows=ROWS // 2)
    reader = Checkpoints(saved, read_only=True)
    message = error_of(lambda: reader.restore_params(wrong.shapes, wrong.shardings))
    assert f"{saved}/4" in message


@pytest.mark.parametrize("step", [7, 0])
def test_a_step_that_is_not_there(saved, setup, step):
    reader = Checkpoints(saved, read_only=True)
    message = error_of(lambda: reader.restore_params(setup.shapes, setup.shardings, step))
    assert f"{saved}/{step}" in message


def test_an_empty_folder_and_none(setup, tmp_path):
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.latest() is None
    message = error_of(lambda: reader.restore_params(setup.shapes, setup.shardings))
    assert "no complete checkpoint" in message
    assert "does not exist" in error_of(lambda: Checkpoints(tmp_path / "none", read_only=True))


@pytest.mark.parametrize("item", ["params", "optimizer", "data"])
def test_a_step_with_a_missing_part_is_refused(saved, setup, item):
    shutil.rmtree(saved / "4" / item)
    checkpoints = Checkpoints(saved)
    message = error_of(lambda: checkpoints.restore(setup.shapes, setup.shardings, Data()))
    assert f"{saved}/4" in message


def test_damaged_arrays_are_refused(saved, setup):
    for path in (saved / "4" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:5_000])
    checkpoints = Checkpoints(saved)
    message = error_of(lambda: checkpoints.restore(setup.shapes, setup.shardings, Data()))
    assert f"{saved}/4" in message
