"""What accelerators can do at most: the denominator of MFU."""

import re

import jax

# Dense bf16 peak of one chip in FLOP/s, from the makers' data sheets (without sparsity).
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "TPU v6 lite": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak of the device's kind, or None (a CPU, an unknown chip): then no MFU is reported."""
    kind = device.device_kind.lower()
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{name.lower()}\b", kind):  # an L40 is no L4
            return peak
    return None
