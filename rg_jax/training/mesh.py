"""Where arrays live: one mesh axis over all devices, parameters sharded along it (FSDP)."""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rg_jax.errors import UserError
from rg_jax.host_memory import keep_freed

T = TypeVar("T")

AXIS = "fsdp"
# Below this many entries a copy on every device is cheaper than gathering it in every step.
MIN_SHARDED_SIZE = 2**14


# What JAX needs to use anything but a CPU.
_PLUGINS = (
    "jax_cuda12_plugin",
    "jax_cuda13_plugin",
    "jax_rocm60_plugin",
    "jax_rocm7_plugin",
    "libtpu",
)


def prepare_backend(hosts: bool = False, steps: bool = True) -> None:
    """To be called before JAX touches a device; `hosts`: several processes work together.

    With `steps`, where there is nothing but a CPU, this process keeps the memory of its steps.

    On a CPU that plays several devices, two programs under way at once can wait for each other
    for ever: there, a program is finished before the next one starts. GPUs, TPUs and a CPU that
    is one device are not affected.
    """
    if hosts or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if steps and (jax.config.jax_platforms == "cpu" or not any(map(find_spec, _PLUGINS))):
        keep_freed(large=True)


def define_host_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """The flags of a command that may run on several hosts; see `join_hosts`."""
    more = {"flag_values": values}
    flags.DEFINE_bool("distributed", False, "several hosts, found by JAX (TPU, SLURM, …)", **more)
    flags.DEFINE_string("coordinator", None, "address:port of host 0, on every host", **more)
    flags.DEFINE_integer("num_hosts", None, "with --coordinator: how many hosts", **more)
    flags.DEFINE_integer("host", None, "with --coordinator: which host this is, from 0", **more)


def join_hosts(values: flags.FlagValues) -> None:
    """Joins the other hosts, if the flags speak of any; before anything else touches a device."""
    several = bool(values.distributed or values.coordinator)
    prepare_backend(hosts=several)
    if several:
        jax.distributed.initialize(
            values.coordinator, num_processes=values.num_hosts, process_id=values.host
        )


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over the given devices (default: all devices of all hosts)."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), (AXIS,))


def param_spec(name: str, shape: tuple[int, ...], devices: int) -> P:
    """Shards the largest axis that the devices divide; the axis of stacked layers stays whole.

    The scan over layers slices that leading axis in every iteration, so sharding it would send
    each layer to a single device.
    """
    stacked = "layers/" in name or "encoderblock/" in name
    if int(np.prod(shape, initial=1)) < MIN_SHARDED_SIZE or devices == 1:
        return P()
    candidates = [
        (size, axis)
        for axis, size in enumerate(shape)
        if size % devices == 0 and not (stacked and axis == 0)
    ]
    if not candidates:
        return P()
    _, axis = max(candidates)
    return P(*[AXIS if i == axis else None for i in range(len(shape))])


def shard_tree(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of shapes, by `param_spec` on its path."""

    def one(path: tuple, leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        return NamedSharding(mesh, param_spec(name, tuple(leaf.shape), mesh.size))

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are spread over all devices."""
    return NamedSharding(mesh, P(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, accumulation: int, mesh: Mesh, field: str = "batch_size") -> None:
    """Raises UserError unless every micro-batch fills all devices evenly."""
    if batch_size % accumulation:
        raise UserError(
            f"config.{field}={batch_size} is not divisible by config.accumulation={accumulation}"
        )
    micro = batch_size // accumulation
    if micro % mesh.size:
        raise UserError(
            f"config.{field}={batch_size} in {accumulation} micro-batches gives {micro} rows for "
            f"{mesh.size} devices: choose a multiple of {accumulation * mesh.size}"
        )


def host0_first(work: Callable[[], T]) -> T:
    """Does `work` on host 0, then on the others, which find the files that it has made.

    Where it fails with UserError on one host it fails on all: none waits for the others for ever.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    for turn in (jax.process_index() == 0, jax.process_index() > 0):
        error = None
        if turn:
            try:
                result = work()
            except UserError as caught:
                error = caught
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
        if error:
            raise error
        if len(failed):
            raise UserError(f"host {failed[0]} has stopped; see what it says")
    return result


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch → global arrays spread over all devices of all hosts."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
