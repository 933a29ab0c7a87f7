"""Shared by all tests: eight fake devices, shapes checked, golden folders, no network."""

import atexit
import os
import runpy
import shutil
import tempfile
from pathlib import Path

# Before JAX starts: sharding is tested on fake devices, without any accelerator.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: the compiler is in a hurry, which halves their time. Flags
# of the caller go over these: XLA_FLAGS="--xla_backend_optimization_level=3 …" tests as users run.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    os.environ.get("XLA_FLAGS", ""),
)
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
# Fake devices share two cores: programs that run at once could wait for each other for ever.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
os.environ.setdefault("TFDS_DATA_DIR", "/nonexistent")
# Nothing of the user's own is read or written: the key of patients' groups would lie there.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="rg_jax_tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes written in annotations hold for every call that a test makes.
install_import_hook("rg_jax", "beartype.beartype")

DEFAULT_GOLDEN = Path(__file__).parent / "golden"


def golden_root() -> Path:
    """The folder of golden sets: `$RG_JAX_GOLDEN`, or `tests/golden`."""
    return Path(os.environ.get("RG_JAX_GOLDEN", DEFAULT_GOLDEN))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The golden folder; a missing one is an error, never a skip."""
    root = golden_root()
    assert root.is_dir(), f"no golden sets in {root}"
    return root


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """A data folder with a small phantom: 24 slices of 32 pixels in train, 8 in val and in test."""
    from tfds_builders import __main__ as command
    from tfds_builders.phantom.phantom_dataset_builder import Builder, PhantomConfig

    data_dir = tmp_path_factory.mktemp("phantom")
    config = PhantomConfig(name="tiny", image_size=32, train=24, val=8, test=8)
    command.build(Builder, config, str(data_dir))
    return data_dir


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(data_dir, **overrides)`: the config of tests/training/tiny_run.py.

    Overrides are fields by their dotted names: `tiny_config(d, **{"eval.samples": 2})`.
    """
    path = Path(__file__).parent / "training" / "tiny_run.py"
    get_config = runpy.run_path(str(path))["get_config"]

    def make(data_dir, **overrides):
        config = get_config()
        config.data.dir = str(data_dir)
        for field, value in overrides.items():
            *parents, name = field.split(".")
            node = config
            for parent in parents:
                node = node[parent]
            if name not in node:
                raise KeyError(f"tiny_run.py has no field {field}")
            with node.ignore_type():
                node[name] = value
        return config

    return make


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """Programs that several runs share are compiled by the first of them."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = str(tmp_path_factory.mktemp("compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def finished_run(phantom_dir, tiny_config, tmp_path_factory, compiled_once) -> Path:
    """The folder of a run of 12 steps that has ended, with its evaluation. Not to be changed."""
    from rg_jax.train import train

    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny_config(phantom_dir, total_steps=12), workdir)
    return workdir
