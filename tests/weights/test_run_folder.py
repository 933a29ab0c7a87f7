"""A run's folder as a source of weights: leaf by leaf, padding cut off, factors merged."""

import jax
import numpy as np
import pytest

from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.errors import UserError
from rg_jax.model.lora import merge
from rg_jax.training.checkpoints import Checkpoints
from rg_jax.training.state import describe, flatten, unflatten
from rg_jax.weights.formats import open_weights
from rg_jax.weights.vocabulary import TABLE


class NoData:
    def get_state(self):
        return {}


def saved_run(config, folder):
    """(run, flat parameters) of a run that was saved before its first step, all at random."""
    fmt = run_lib.grounding_format(config)
    tokenizer = run_lib.make_tokenizer(config, fmt, folder / run_lib.TOKENIZER_FILE, list)
    run = run_lib.assemble(config, fmt, tokenizer, 1)
    state = start_lib.first_state(run)
    random = np.random.default_rng(0)
    # Also what starts at zero, as half of the factors do.
    trainable = {
        name: jax.device_put(
            random.normal(0, 0.3, x.shape).astype(x.dtype), run.shardings.trainable[name]
        )
        for name, x in state.trainable.items()
    }
    state = state._replace(trainable=trainable)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, state, NoData(), wait=True)
    checkpoints.close()
    run_lib.save_description(run, folder, describe(run.shapes))
    return run, jax.device_get({**state.trainable, **state.frozen})


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_read_is_what_the_run_computes_with(tiny_config, tokenizer_file, tmp_path, rank):
    config = tiny_config("/nonexistent")
    config.tokenizer = {"path": str(tokenizer_file), "sha256": "", "vocab_size": 0}
    if rank:
        config.lora.rank = rank
        config.schedule = [("lora/.*", {"decay": "cosine"}), (".*", None)]
    run, params = saved_run(config, tmp_path)
    source = open_weights(str(tmp_path))
    expected = flatten(merge(unflatten(params), run.model.config))
    assert source.leaves.keys() == expected.keys()
    assert bool(source.notes) == bool(rank) and source.fmt == run.fmt
    rows = run.tokenizer.vocab_size
    for name, array in expected.items():
        array = np.asarray(array)[:rows] if name == TABLE else np.asarray(array)
        leaf = source.leaves[name]
        assert leaf.shape == array.shape and leaf.dtype == array.dtype
        np.testing.assert_array_equal(leaf.stored(), array, err_msg=name)
        if rank and name.startswith("llm/layers/mlp"):
            assert (leaf.stored() != params[name]).any(), name
    (tmp_path / "checkpoints" / "0").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(str(tmp_path))


def test_factors_are_merged_in_the_wanted_dtype(tiny_config, tokenizer_file, tmp_path):
    """What they add is far below a bfloat16's last digit, and float32 was asked for."""
    config = tiny_config("/nonexistent")
    config.tokenizer = {"path": str(tokenizer_file), "sha256": "", "vocab_size": 0}
    config.lora.rank, config.frozen_dtype = 2, "bfloat16"
    config.schedule = [("lora/.*", {"decay": "cosine"}), (".*", None)]
    run, params = saved_run(config, tmp_path)
    wide = {n: np.asarray(x).astype(np.float32) for n, x in params.items()}
    expected = flatten(merge(unflatten(wide), run.model.config))
    source = open_weights(str(tmp_path))
    adapted = {n.removeprefix("lora/").rpartition("/")[0] for n in params if n.endswith("/a")}
    assert adapted
    for name in adapted - {TABLE}:
        found = source.leaves[name].read(np.dtype(np.float32))
        np.testing.assert_allclose(found, expected[name], rtol=1e-6, atol=1e-7)


def test_an_encoder_of_a_run_has_no_tokens_to_compare(tiny_config, tokenizer_file, tmp_path):
    config = tiny_config("/nonexistent")
    config.tokenizer = {"path": str(tokenizer_file), "sha256": "", "vocab_size": 0}
    saved_run(config, tmp_path)
    source = open_weights(str(tmp_path))
    assert source.tokens and source.only("img").tokens is None and source.only("llm").tokens
