"""The whole compressed sampling loop at published shapes, compiled for an H200: caches are neither copied nor moved."""

import re
from functools import partial

import jax
import numpy as np
import pytest
from real_shapes import denoise_arguments, planned_arguments

from dfa2_jax import Method
from dfa2_jax.calibration.calibrate import Budget, calibrate_step, planning_tiles
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.sampling.loop import denoise, denoise_planned
from pallas_kernels import Layout, arrow_attention
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import uses_of_stacks, weight_copies


def test_the_reading_of_hlo_sees_what_it_must():
    hlo = """
%fused_update (p.0: bf16[3,8], p.1: bf16[8]) -> bf16[3,8] {
  ROOT %dus.1 = bf16[3,8]{1,0} dynamic-update-slice(%p.0, %p.1, %i)
}
%body (s: (bf16[3,8])) -> (bf16[3,8]) {
  %stack = bf16[3,8]{1,0} get-tuple-element(%s), index=0
  %ours = bf16[3,8]{1,0:T(8)} custom-call(%stack), custom_call_target="x"
  %put = bf16[3,8]{1,0} fusion(%ours, %new), kind=kLoop, calls=%fused_update
  %moved = bf16[3,8]{1,0} copy(%put)
  %one = bf16[1,8]{1,0} fusion(%moved, %i), kind=kLoop, calls=%fused_slice
  ROOT %out = (bf16[3,8]{1,0}) tuple(%moved)
}"""
    made, reads = uses_of_stacks(hlo, {"bf16[3,8]"})
    assert made == {"copy": 1} and reads["body"] == 2  # the copy, and the slice


def copied_share(compiled, params):
    """The share of the weights that one step copies."""
    copied = sum(copy.num_bytes * copy.times for copy in weight_copies(compiled.hlo, unknown=1) if copy.in_loop)
    return copied / sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.aot
@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD3.5-medium"])
def test_caches_and_weights_stay_where_they_are(name):
    target = aot.target("h200")
    graph, *rest = planned_arguments(name, 1024)
    caches = rest[1].memory
    planned = aot.compile_for(target, denoise_planned, graph, *target.abstract(tuple(rest)))
    graph, *rest = denoise_arguments(name, 1024)
    params = rest[0]
    dense = aot.compile_for(target, denoise, graph, *target.abstract(tuple(rest)))

    leaves = jax.tree.leaves(caches)
    stacks = {f"bf16[{','.join(map(str, leaf.shape))}]" for leaf in leaves}
    assert all(f"= {stack}" in planned.hlo for stack in stacks), "not as they are looked for"
    made, reads = uses_of_stacks(planned.hlo, stacks)
    assert made == {}, "a stack of caches is copied or made anew"
    assert max(reads.values()) <= 2, (
        "a block reads more than its text and visual rows (FLUX), or two attentions' (SD3.5)"
    )
    assert planned.alias_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    # Loops in loops hold latents and the last velocity anew, 1 MB each; a copied stack would be 300 MB or more.
    assert planned.temp_bytes <= 1.05 * dense.temp_bytes + 4 * rest[1].latents.size * 4
    assert copied_share(dense, params) < 0.001, "biases alone: products read their weights in the stack"
    width = leaves[0].shape[-2] * leaves[0].shape[-1]
    assert re.search(rf"bf16\[\d+,{width // 2}\].*__cublas", planned.hlo), "no product of half of the heads"
    assert not re.search(r"bf16\[\d+,\d+,\d+,\d+\]\{3,1,0,2\}", planned.hlo), "heads are transposed"
    share = copied_share(planned, params)
    assert share < 0.3, (
        "q, k and v too, in steps that branch, and once more half of them, in the branch of so many heads"
    )


@pytest.mark.aot
def test_weights_of_long_inputs_are_copied_for_the_faster_products():
    target = aot.target("h200")
    graph, *rest = denoise_arguments("FLUX.1-dev", 2048)
    compiled = aot.compile_for(target, denoise, graph, *target.abstract(tuple(rest)))
    assert 0.3 < copied_share(compiled, rest[0]) < 0.5


@pytest.mark.aot
def test_dense_attention_on_hopper():
    """Mosaic for whole sequences of a head_dim of 64; cuDNN for some rows, and where it is differentiated."""
    target, layout = aot.target("h200"), Layout(64, 576, True)
    attend = jax.jit(partial(arrow_attention, layout=layout))
    gradient = jax.jit(jax.grad(lambda *x: attend(*x).astype(np.float32).sum()))
    q, rows = (jax.ShapeDtypeStruct((1, length, 2, 64), jax.numpy.bfloat16) for length in (640, 576))
    whole, some, pulled = (
        custom_calls(aot.compile_for(target, function, *target.abstract(arguments)).hlo)
        for function, arguments in ((attend, (q, q, q)), (attend, (rows, q, q)), (gradient, (q, q, q)))
    )
    assert "mosaic_gpu" in whole and "fmha" not in whole
    assert "fmhaSoftmax" in some and "mosaic" not in some
    assert "fmhaSoftmaxBackward" in pulled and "mosaic" not in pulled


def custom_calls(hlo):
    """Targets, in one string. The program's table of frames names every file of ours that was on the stack."""
    return " ".join(re.findall(r'custom_call_target="([^"]+)"', hlo))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "head_dim", "devices"), [("FLUX.1-dev", 128, 1), ("SD3.5-large", 64, 1), ("SD3.5-large", 64, 2)]
)
def test_calibration_with_its_exact_choice_compiles_where_caches_are(name, head_dim, devices):
    """24 and 38 heads, 4 methods. The choice is in the program: no callback to the host. Two devices share a batch."""
    target = aot.target("h200", devices)
    mesh = DeviceMesh.of([*target.mesh.devices.flat], devices) if devices > 1 else None
    target = target if mesh is None else aot.Target("h200", mesh.devices)
    graph, params, state, inputs, *_ = planned_arguments(name, 1024, mesh=mesh)
    step, budget = jax.ShapeDtypeStruct((), np.int32), Budget.of(0.1, 1.5, 24)
    arguments = target.abstract((params, state, inputs, step, budget))
    options = {"candidates": (Method("cached"), *map(Method.arrow, (8, 16, 32))), "tiles": planning_tiles(head_dim)}
    compiled = aot.compile_for(target, calibrate_step, graph, *arguments, **options, mesh=mesh)
    assert "callback" not in compiled.hlo
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.memory))
    assert compiled.alias_bytes >= size // devices
