"""The benchmarks: what they compare computes the same, and their figures add up."""

import argparse
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from rg_jax.errors import UserError
from tools import (
    bench_data,
    bench_generate,
    bench_peer,
    bench_profile,
    bench_setup,
    bench_suite,
    bench_train,
    gpu_target,
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


def test_kinds_of_kernels():
    """Names as GPUs' libraries and XLA's emitters give them; a graph's own name says nothing."""
    named = {
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN": "matrix products",
        "gemm_fusion_dot_36": "matrix products",
        "loop_add_multiply_fusion": "elementwise",
        "input_reduce_fusion_1": "reductions",
        "memcpy128": "copies",
        "wrapped_transpose_2": "copies",
        "ncclDevKernel_AllGather": "between devices",
    }
    for name, kind in named.items():
        assert bench_profile.kind_of(name, "command_buffer_186") == kind, name


def test_a_profile_of_a_step():
    product = jax.jit(lambda x: (x @ x).sum())
    x = jax.numpy.ones((64, 64))
    product(x).block_until_ready()
    found = bench_profile.profile(lambda: product(x).block_until_ready())
    assert found["busy"] > 0 and found["busy"] == pytest.approx(sum(found["kinds"].values()))
    lines = bench_profile.table(found, 1)
    assert lines[0].startswith("profile:") and len(lines) == 2 + len(found["kinds"])


def test_the_suite_runs_what_is_named_and_tells_what_failed(tmp_path, monkeypatch, capsys):
    entries = {"fine": "bench_train --no_parts --steps=1", "broken": "bench_train --batch=x"}
    monkeypatch.setattr(bench_suite, "SUITE", entries)
    failed = bench_suite.run_all(tmp_path, ["fine", "broken"], 300.0, "tiny")
    assert failed == ["broken"] and "samples/s" in capsys.readouterr().out
    assert json.loads((tmp_path / "fine.json").read_text())["ours"]["samples_per_s"] > 0
    assert (tmp_path / "fine.hlo").exists() and "--batch" in (tmp_path / "broken.log").read_text()
    with pytest.raises(SystemExit):
        bench_suite.main(["--out", str(tmp_path), "--only=nothing"])
    assert "known are fine, broken" in capsys.readouterr().err


def test_a_gpu_that_is_not_known():
    with pytest.raises(UserError, match="known are h100, h200"):
        gpu_target.mesh_of("h300")


def test_factors_alone_can_be_measured():
    options = measure_options("--model=tiny", "--lora=4")
    case = bench_setup.make_case(options)
    assert all(name.startswith("lora/") for name in case.shapes.trainable)
    assert case.facts()["lora"] == 4 and case.facts()["encoder"] == "frozen"


def measure_options(*flags):
    parser = bench_setup.Parser("test", "")
    bench_setup.add_flags(parser)
    return parser.parse_args(list(flags))
