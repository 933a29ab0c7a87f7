"""The benchmarks: what they compare computes the same, and their figures add up."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest

from rg_jax.errors import UserError
from tools import (
    bench_data,
    bench_generate,
    bench_peer,
    bench_setup,
    bench_train,
    measure_memory,
    torch_peer,
)


def test_a_pair_is_measured_in_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) for name in ("ours", "theirs")}
    spent = bench_setup.interleave(sides, rounds=3, warm=1)
    assert order == ["ours", "theirs"] * 4
    assert {name: len(taken) for name, taken in spent.items()} == {"ours": 3, "theirs": 3}


def test_summary_and_ratio():
    ours, theirs = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)], [(2.0, 8.0), (6.0, 8.0), (12.0, 8.0)]
    assert bench_setup.summary(ours)["seconds"] == 2.0
    assert bench_setup.summary(ours)["processor_seconds"] == 2.0
    found = bench_setup.ratio(ours, theirs)
    assert found == {"ratio": 3.0, "quartiles": [2.5, 3.5], "by_processor_time": 4.0}


def test_a_step_needs_no_data_package():
    code = (
        "import sys, tools.bench_train, tools.bench_generate, tools.measure_memory;"
        "bad = {'grain', 'tensorflow_datasets', 'torch', 'pydicom', 'sentencepiece', 'orbax'};"
        "sys.exit(', '.join(bad & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_a_step_against_transformers(tmp_path):
    """The same weights give the same first loss, else the command itself fails."""
    target = tmp_path / "figures.json"
    bench_train.main(
        ["--model=tiny", "--batch=8", "--text_len=8", "--steps=1", "--no_parts"]
        + ["--peer=tuned", "--same_weights", f"--json={target}"]
    )
    figures = json.loads(target.read_text())
    peer = figures["peers"]["tuned"]
    assert peer["ratio"]["ratio"] == pytest.approx(
        peer["seconds"] / figures["ours"]["seconds"], rel=1e-6
    )
    assert figures["ours"]["samples_per_s"] == pytest.approx(8 / figures["ours"]["seconds"])


def test_generation_against_transformers(tmp_path):
    target = tmp_path / "figures.json"
    bench_generate.main(
        ["--model=tiny", "--batches=2", "--tokens=6", "--prompt_len=5", "--rounds=1"]
        + ["--peer=default", "--same_weights", f"--json={target}"]
    )
    (row,) = json.loads(target.read_text())["rows"]
    assert row["ours"]["tokens_per_s"] == pytest.approx(12 / row["ours"]["seconds"])
    assert row["default"]["ratio"]["ratio"] > 0


def test_weights_that_differ_are_noticed():
    """The comparison of tokens and the copying of weights can fail."""
    with pytest.raises(UserError, match="only 50%"):
        bench_generate._compare({"ours": np.zeros(4), "x": np.array([0, 0, 1, 1])}, 1, 4)
    parser = argparse.ArgumentParser()
    bench_setup.add_flags(parser)
    case = bench_setup.make_case(parser.parse_args(["--model=tiny", "--batch=8"]))
    model = torch_peer.make_model(case.config, "tuned", case.image_token)
    params = {k: np.asarray(v) for k, v in bench_setup.random_params(case).items()}
    torch_peer.copy_params(model, params)
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch_peer.copy_params(model, params | {"llm/final_norm/scale": np.zeros(3)})


def test_the_data_path_prints_one_object(capsys):
    bench_data.main(["--json", "--slices=4", "--size=64", "--batch=4", "--rounds=1"])
    figures = json.loads(capsys.readouterr().out)
    ways = figures["ways"]
    assert figures["ratio_per_core"] == pytest.approx(
        ways["ours"]["per_second_and_core"] / ways["published"]["per_second_and_core"]
    )
    assert {"ratio_per_core", "ratio_wall", "cores", "versions"} <= set(figures)


def test_mistakes_are_one_line(capsys):
    for main, flags, words in (
        (bench_train.main, ["--model=3b", "--batch=7", "--accumulation=2"], "not divisible"),
        (bench_generate.main, ["--model=tiny", "--batches=0"], "--batches=0"),
        (measure_memory.main, ["--recipes=x"], "--recipes=x"),
        (bench_train.main, ["--recipe=seg", "--same_weights"], "--recipe=det"),
        (bench_peer.main, ["--nothing"], "--help lists"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1


def test_smallest_device():
    gib = 2**30
    assert measure_memory.smallest_device(20 * gib).startswith("24 GB")
    assert measure_memory.smallest_device(70 * gib).startswith("80 GB")
    assert measure_memory.smallest_device(500 * gib) == "none alone"
