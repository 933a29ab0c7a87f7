"""The arithmetic of the mask studies and their command; no run is trained here."""

import json

import numpy as np
import pytest

from rg_jax.config import check
from tools import mask_studies
from tools.mask_studies import STUDIES, compare, figures, run_config, table


def columns(rng, shift):
    g_iou = rng.uniform(0.2, 0.6, 300)
    pairs = rng.integers(0, 4, 300).astype(float)
    return [{"g_iou": g_iou + s, "dice": pairs * (g_iou + s), "pairs": pairs} for s in (0.0, shift)]


def test_a_paired_difference_sees_what_two_intervals_hide():
    pairs = [columns(np.random.default_rng(seed), 0.02) for seed in range(3)]
    difference = compare([b for _, b in pairs], [a for a, _ in pairs])
    for name in ("mask_g_iou", "mask_dice"):
        assert difference[name]["mean"] == pytest.approx(0.02)
        assert 0.019 < difference[name]["low"] <= difference[name]["high"] < 0.021
    plain = figures(pairs[0][0])
    assert plain["mask_g_iou"]["high"] - plain["mask_g_iou"]["low"] > 0.02


@pytest.mark.parametrize("gap, verdict", [(0.02, "the same within"), (0.2, "NOT the same within")])
def test_the_table_says_which_order_study_failed(gap, verdict):
    base, shifted = columns(np.random.default_rng(0), gap)
    told = {
        "study": "order",
        "steps": 5,
        "runs": {"a": figures(base), "b": figures(shifted)},
        "difference": compare([shifted], [base]),
    }
    assert verdict in table(told)


def test_both_arms_of_a_study_differ_in_one_thing_only(tmp_path):
    for name, arms in STUDIES.items():
        first, second = (json.loads(run_config(arm, 7, 3, str(tmp_path)).to_json()) for arm in arms)
        check(run_config(arms[0], 7, 3, str(tmp_path)))
        assert first["total_steps"] == 7 and first["seed"] == 3
        assert first.pop("name") != second.pop("name")
        field = "masks" if name == "decoders" else "data"
        assert first.pop(field) != second.pop(field)
        assert first == second


def test_wrong_flags_are_one_line(tmp_path, capsys):
    for flags, said in ((["--seeds=a"], "--seeds=a"), (["--steps=0"], "--steps=0")):
        with pytest.raises(SystemExit) as stopped:
            mask_studies.main(["order", f"--out={tmp_path}", *flags])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
