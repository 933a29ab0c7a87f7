"""Master weights are cast to the compute dtype once per step, not in every micro-batch."""

import argparse
import copy
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rg_jax.training import memory
from rg_jax.training import mesh as mesh_lib
from tools import bench_setup, measure_memory

core = jax.extend.core


def options(**changes):
    parser = argparse.ArgumentParser()
    bench_setup.add_flags(parser)
    given = {"model": "tiny", "batch": 16, "text_len": 8, "accumulation": 2} | changes
    return parser.parse_args([f"--{k}={v}" for k, v in given.items()])


def casts(jaxpr, in_loop=False):
    """(inside a loop?, shape) of every float32 → bfloat16 in a traced function."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type":
            value = eqn.invars[0].aval
            if value.dtype == jnp.float32 and eqn.params["new_dtype"] == jnp.bfloat16:
                yield in_loop, value.shape
        inside = in_loop or eqn.primitive.name in ("scan", "while")
        for value in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(value, core.ClosedJaxpr):
                value = value.jaxpr
            if isinstance(value, core.Jaxpr):
                yield from casts(value, inside)


def test_layers_are_cast_before_the_micro_batches():
    case = bench_setup.make_case(options(compute_dtype="bfloat16"))
    traced = bench_setup.make_step(case).trace(*bench_setup.step_shapes(case))
    found = list(casts(traced.jaxpr.jaxpr))
    llm = case.config.llm
    gating, linear = (2, llm.width, llm.mlp_dim), (llm.mlp_dim, llm.width)
    whole = [shape for looped, shape in found if not looped]
    assert (llm.depth, *gating) in whole and (llm.depth, *linear) in whole
    for looped, shape in found:
        assert not (looped and shape[-3:] == gating), "a weight is cast in every micro-batch"
        assert not (looped and shape[-2:] == linear), "a weight is cast in every micro-batch"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizer_computes_in_float32(accumulation):
    """Norms and squares too, not in the bfloat16 in which a product hands its gradient back."""
    case = bench_setup.make_case(options(compute_dtype="bfloat16", accumulation=accumulation))
    seen = {}

    def spy(grads, opt_state, params, step):
        seen.update({name: grad.dtype for name, grad in grads.items()})
        return case.optimizer.update(grads, opt_state, params, step)

    optimizer = copy.copy(case.optimizer)
    optimizer.update = spy
    spied = dataclasses.replace(case, optimizer=optimizer)
    jax.eval_shape(bench_setup.make_step(spied), *bench_setup.step_shapes(case))
    assert seen.keys() == case.shapes.trainable.keys()
    assert set(seen.values()) == {jnp.dtype(jnp.float32)}


def test_the_estimate_counts_the_copy():
    one = measure_memory.estimate(bench_setup.make_case(options(accumulation=1)))
    two = measure_memory.estimate(
        bench_setup.make_case(options(compute_dtype="bfloat16", accumulation=2))
    )
    assert "weights in the compute dtype" not in one
    copy, micro = two["weights in the compute dtype"], two["gradients"]
    # Of each weight of the layers half a copy and half a gradient; table and head as masters.
    assert 0 < copy < micro
    assert copy + micro == pytest.approx(two["trainable parameters (float32)"], rel=1e-3)


@pytest.mark.parametrize(
    "measured, more",
    [
        (38.46, {"remat": "dots_no_batch"}),
        (24.43, {"remat": "full"}),
        (48.57, {"remat": "dots_no_batch", "batch": 288, "accumulation": 12}),
        (39.15, {"remat": "dots_no_batch", "recipe": "seg"}),
    ],
)
def test_the_estimate_is_near_what_a_gpu_took(measured, more, monkeypatch):
    """GiB at the peak of a step of the 3B model on an H200 (see BENCHMARKS.md)."""
    one = mesh_lib.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(mesh_lib, "make_mesh", lambda: one)
    given = {"accumulation": 1, "batch": 24, "text_len": 200, "recipe": "det"} | more
    parser = bench_setup.Parser("test", "")
    bench_setup.add_flags(parser)
    case = bench_setup.make_case(parser.parse_args([f"--{k}={v}" for k, v in given.items()]))
    total = sum(measure_memory.estimate(case).values()) / memory.GIB
    assert total == pytest.approx(measured, rel=0.06)


def test_the_estimate_is_near_what_the_compiler_counts():
    case = bench_setup.make_case(options(accumulation=1, batch=8, text_len=32))
    row = measure_memory.measure(case)
    share = row["estimate_bytes"] / row["compiled_bytes"]
    assert 0.4 < share < 2.5, memory.table(row["estimate_parts"], 1)
