"""PyTorch's files are read without running what they say, and damaged ones are named."""

import os
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from rg_jax.errors import UserError
from rg_jax.weights import torch_files
from rg_jax.weights.source import BF16, Leaf


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return OrderedDict(
        wide=base,
        half=torch.randn(5, generator=generator).half(),
        brain=torch.randn(3, 2, generator=generator).bfloat16(),
        turned=base.T,
        slice=base[2:4, 1:7:2],
        tied=base,
        scalar=torch.tensor(2.5),
        parameter=torch.nn.Parameter(torch.ones(2)),
        count=torch.arange(4),
    )


def assert_same(tensors, state):
    assert list(tensors) == list(state)
    for key, value in state.items():
        leaf, value = tensors[key], value.detach()
        assert leaf.shape == tuple(value.shape), key
        if value.dtype == torch.bfloat16:
            assert leaf.dtype == BF16
            np.testing.assert_array_equal(leaf.stored().view(np.int16), value.view(torch.int16))
        else:
            np.testing.assert_array_equal(leaf.stored(), value.numpy(), err_msg=key)
            assert leaf.stored().dtype == value.numpy().dtype == leaf.dtype
    np.testing.assert_array_equal(
        tensors["half"].read(np.dtype(np.float32)), state["half"].float().numpy()
    )


@pytest.mark.parametrize("nested", [False, True])
def test_pickled_tensors_of_every_kind(state, tmp_path, nested):
    path = tmp_path / "model.bin"
    torch.save({"state_dict": state, "epoch": 1} if nested else state, path)
    assert_same(torch_files.read_pickled(path), state)


def test_a_module_with_its_version_numbers(tmp_path):
    module = torch.nn.BatchNorm1d(3)
    torch.save(module.state_dict(), tmp_path / "m.bin")
    assert set(torch_files.read_pickled(tmp_path / "m.bin")) == set(module.state_dict())


class Evil:
    """Makes a file when it is unpickled by a reader that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Builtin(Evil):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("cls, culprit", [(Evil, "system"), (Builtin, "eval")])
@pytest.mark.parametrize("place", ["state_dict", "hyper_parameters", "inside"])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path, cls, culprit, place):
    trace, state = tmp_path / "trace", {"w": torch.ones(2)}
    content = {"state_dict": state}
    if place == "inside":
        state["evil"] = cls(trace)
    else:
        content[place] = cls(trace)
    torch.save(content, tmp_path / "evil.ckpt")
    message = error_of(lambda: torch_files.read_pickled(tmp_path / "evil.ckpt"))
    assert "wants to run" in message and culprit in message and "nothing is run" in message
    assert not trace.exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # a reader that trusts it runs it
    assert trace.exists()


def test_lying_tensors_are_refused(tmp_path):
    """Shapes beyond the storage, as a crafted file may claim, read no memory."""
    path = tmp_path / "lie.bin"
    torch.save({"w": torch.zeros(64)}, path)
    data = {}
    with zipfile.ZipFile(path) as archive:
        data = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (n for n in data if n.endswith("data.pkl"))
    assert data[name].count(b"K@\x85") == 1  # the shape (64,)
    data[name] = data[name].replace(b"K@\x85", b"K\xff\x85")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in data.items():
            archive.writestr(entry, content)
    assert "damaged" in error_of(lambda: torch_files.read_pickled(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_cut_files(state, tmp_path, share):
    whole = tmp_path / "whole.bin"
    torch.save(state, whole)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(share * len(data))])
    assert "cut short" in error_of(lambda: torch_files.read_pickled(whole))


def test_old_and_foreign_files(state, tmp_path):
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    message = error_of(lambda: torch_files.read_pickled(tmp_path / "old.bin"))
    assert "before PyTorch 1.6" in message
    with (tmp_path / "numpy.bin").open("wb") as file:
        np.savez(file, a=np.ones(3))
    assert "not one that PyTorch" in error_of(
        lambda: torch_files.read_pickled(tmp_path / "numpy.bin")
    )
    torch.save({"epoch": 3}, tmp_path / "empty.ckpt")
    assert "no tensors" in error_of(lambda: torch_files.read_pickled(tmp_path / "empty.ckpt"))
    (tmp_path / "text.safetensors").write_text("<html>")
    message = error_of(lambda: torch_files.read_file(tmp_path / "text.safetensors"))
    assert "text.safetensors: not a whole" in message
    assert "no such" in error_of(lambda: torch_files.read_file(tmp_path / "none.bin"))


def test_what_we_write_the_library_reads(tmp_path):
    from safetensors.torch import load_file, save_file

    random = np.random.default_rng(0)
    arrays = {
        "a.b": random.standard_normal((3, 5)).astype(np.float32),
        "c": random.standard_normal((2, 2)).astype(BF16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }
    leaves = {
        key: Leaf(x.shape, x.dtype, lambda dtype, x=x: x.astype(dtype)) for key, x in arrays.items()
    }
    size = torch_files.write_safetensors(tmp_path / "x.safetensors", leaves)
    assert size == sum(x.nbytes for x in arrays.values())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    read = load_file(tmp_path / "x.safetensors")
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key].float().numpy(), array.astype(np.float32))
    save_file(read, tmp_path / "y.safetensors")
    again = torch_files.read_safetensors(tmp_path / "y.safetensors")
    for key, array in arrays.items():
        assert again[key].dtype == array.dtype and again[key].shape == array.shape
        np.testing.assert_array_equal(again[key].stored(), array)

    def fail(dtype):
        raise OSError(28, "full")

    with pytest.raises(OSError, match=re.escape("full")):
        torch_files.write_safetensors(
            tmp_path / "x.safetensors", {**leaves, "z": Leaf((1,), np.dtype("float32"), fail)}
        )
    assert not list(tmp_path.glob("*.partial")) and len(load_file(tmp_path / "x.safetensors")) == 4
