"""What the LoRA study says of its difference."""

import pytest

from tools.lora_study import verdict


@pytest.mark.parametrize(
    "mean, low, high, told",
    [
        (-0.02, -0.03, 0.01, "within 0.05, the whole interval"),
        (
            -0.048,
            -0.065,
            -0.031,
            "within 0.05 by the mean, but the interval goes beyond: not shown",
        ),
        (0.04, 0.01, 0.07, "within 0.05 by the mean, but the interval goes beyond: not shown"),
        (-0.08, -0.1, -0.06, "NOT within 0.05"),
    ],
)
def test_the_interval_counts(mean, low, high, told):
    assert verdict({"mean": mean, "low": low, "high": high}) == told
