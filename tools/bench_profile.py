"""Where a device's time goes: kernels of a traced run, by name and by kind.

    python -m tools.bench_train --profile=10                 the ten costliest kernels of a step

A profile says why a figure is what it is; the figure itself is taken without one.
"""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# First match wins. Names of kernels as cuBLAS, cuDNN, Triton and XLA's own emitters give them.
KINDS = (
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|dot|wgmma|custom-call|conv"),
    ("attention (cuDNN)", r"cudnn|flash"),
    ("copies", r"memcpy|memset|copy|transpose|dynamic.update.slice|concatenate"),
    ("between devices", r"nccl|all-gather|all-reduce|reduce-scatter"),
    ("reductions", r"reduce|softmax"),
    ("elementwise", r"fusion|loop_|triton|wrapped|broadcast|convert"),
)


def profile(run: Callable[[], Any], times: int = 2) -> dict[str, Any]:
    """Traces `times` calls of `run`, which returns when its work is done.

    Returns seconds per call: `busy` (sum over kernels), `kinds`, and `kernels`, the costliest
    first, as {"name", "op", "seconds", "calls"}. On a CPU, which has no
    kernels, XLA's own operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions: large, and not asked for
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(times):
                run()
        # A trace may hold several hosts' files; this process writes one.
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
    spent: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for name, operation, nanoseconds in _events(data):
        entry = spent[name, operation]
        entry[0] += nanoseconds / 1e9 / times
        entry[1] += 1 / times
    kinds: dict[str, float] = collections.defaultdict(float)
    for (name, operation), (seconds, _) in spent.items():
        kinds[kind_of(name, operation)] += seconds
    ranked = sorted(spent.items(), key=lambda item: -item[1][0])
    return {
        "busy": sum(kinds.values()),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": name, "op": operation, "seconds": seconds, "calls": calls}
            for (name, operation), (seconds, calls) in ranked
        ],
    }


def kind_of(name: str, operation: str) -> str:
    """Which of KINDS a kernel is, by its own name, else by the operation it was made for."""
    for text in (name, operation):
        for kind, pattern in KINDS:
            if re.search(pattern, text, re.IGNORECASE):
                return kind
    return "other"


def _events(data):
    """(kernel, operation it belongs to, nanoseconds) of everything that ran on the device."""
    planes = [p for p in data.planes if p.name.startswith(("/device:GPU", "/device:TPU"))]
    for plane in planes or [p for p in data.planes if p.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # Other lines of a device say the same again, by module and by step.
            if planes and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats or planes:
                    yield event.name, str(stats.get("hlo_op", "")), event.duration_ns


def table(found: dict[str, Any], top: int) -> list[str]:
    """Lines for people, with the `top` costliest kernels."""
    if not found["kernels"]:
        return ["profile: the tracer saw no kernel of this device"]
    lines = [f"profile: {found['busy']:.4f} s in kernels"]
    lines += [
        f"  {kind:<26}{seconds:>10.4f}{seconds / found['busy']:>8.1%}"
        for kind, seconds in found["kinds"].items()
    ]
    for row in found["kernels"][:top]:
        name = f"{row['op']} ({row['name']})" if row["op"] not in ("", row["name"]) else row["name"]
        lines.append(f"    {row['seconds']:>9.4f} s {row['calls']:>6.0f} ×  {name[:84]}")
    return lines
