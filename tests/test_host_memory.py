"""Memory that is kept: the second array of a size does not come from the system."""

import subprocess
import sys

PROGRAM = """
import resource
import numpy as np
from rg_jax.host_memory import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def pages(megabytes):
    np.ones(megabytes * 2**20, np.uint8)
    before = faults()
    for _ in range(4):
        np.ones(megabytes * 2**20, np.uint8)
    return (faults() - before) / (4 * megabytes * 256)  # share of pages that were new

kept = keep_freed({large})
print(kept, pages({megabytes}))
"""


def new_pages(large: bool, megabytes: int) -> float:
    code = PROGRAM.format(large=large, megabytes=megabytes)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, share = out.stdout.split()
    assert kept == str(sys.platform == "linux")
    return float(share) if kept == "True" else 0.0


def test_arrays_of_some_megabytes_are_kept():
    assert new_pages(large=False, megabytes=8) < 0.1


def test_large_arrays_are_kept_where_a_computation_needs_them():
    assert new_pages(large=True, megabytes=100) < 0.1


def test_otherwise_large_arrays_go_back_to_the_system():
    if sys.platform == "linux":
        assert new_pages(large=False, megabytes=100) > 0.002
