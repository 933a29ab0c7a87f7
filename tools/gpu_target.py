"""Compiling for a GPU that is not there: what it would take, asked on any machine.

JAX's CUDA plug-in (`pip install -e ".[cuda12]"`) compiles without a device, for one that is
described to it. Kernels are then not tuned on the device, so nothing is said about speed; where
memory goes does not depend on that.
"""

import os
from typing import Any

import jax
from jax.experimental import topologies

from rg_jax.errors import UserError
from rg_jax.training import mesh as mesh_lib

# Bytes of memory and bytes per second, from the maker's data sheets. The rest is Hopper's.
TARGETS = {"h100": (80 * 10**9, 3350 * 10**9), "h200": (141 * 10**9, 4800 * 10**9)}
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def mesh_of(name: str) -> Any:
    """A mesh of one device of this kind, to compile for; nothing can be put on it.

    Raises UserError for an unknown kind, and where the plug-in is missing or refuses.
    """
    if name not in TARGETS:
        raise UserError(f"--target={name}: known are {', '.join(TARGETS)}")
    memory, bandwidth = TARGETS[name]
    described = _HOPPER.format(memory=memory, bandwidth=bandwidth, name=name.upper())
    # The plug-in would otherwise ask the driver for its devices, and fail without one.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")  # what runs at all runs here
    try:
        found = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=described)
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--target={name}: JAX's CUDA plug-in cannot be used ({str(error).splitlines()[0]}); "
            'pip install -e ".[cuda12]" brings it, a GPU is not needed'
        ) from error
    return mesh_lib.make_mesh(list(found.devices))
