"""Programs compiled for a GPU that is not there, and what the compiled text says of their weights."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from real_shapes import denoise_arguments

from dfa2_jax.sampling.loop import denoise
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies

LAYERS, WIDTH, TOKENS = 6, 512, 1024
SLICE = WIDTH * WIDTH * 2  # bytes of a layer's bfloat16 kernel

NESTED_LOOPS = """\
HloModule jit_f, is_scheduled=true

%slice_of_stack (p.0: bf16[6,8,4], p.1: s32[]) -> (bf16[1,8,4], f32[8,4]) {
  %p.0 = bf16[6,8,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ds = bf16[1,8,4]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %squeezed = bf16[8,4]{1,0} bitcast(%ds)
  %wide = f32[8,4]{1,0} convert(%squeezed)
  ROOT %both = (bf16[1,8,4]{2,1,0}, f32[8,4]{1,0}) tuple(%ds, %wide)
}

%product_from_stack (p.2: bf16[6,8,4], p.3: s32[], p.4: bf16[3,8]) -> bf16[3,4] {
  %p.4 = bf16[3,8]{1,0} parameter(2)
  %p.2 = bf16[6,8,4]{2,1,0} parameter(0)
  %p.3 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %ds.1 = bf16[1,8,4]{2,1,0} dynamic-slice(%p.2, %p.3, %zero.1, %zero.1), dynamic_slice_sizes={1,8,4}
  %squeezed.1 = bf16[8,4]{1,0} bitcast(%ds.1)
  ROOT %dot = bf16[3,4]{1,0} dot(%p.4, %squeezed.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%layers (carry: (s32[], bf16[3,8], bf16[6,8,4])) -> (s32[], bf16[3,8], bf16[6,8,4]) {
  %carry = (s32[], bf16[3,8]{1,0}, /*index=2*/bf16[6,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[3,8]{1,0} get-tuple-element(%carry), index=1
  %w = bf16[6,8,4]{2,1,0} get-tuple-element(%carry), index=2
  %slices = (bf16[1,8,4]{2,1,0}, f32[8,4]{1,0}) fusion(%w, %i), kind=kLoop, calls=%slice_of_stack
  %in_place = bf16[3,4]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%product_from_stack
  %moved_x = bf16[8,3]{1,0} transpose(%x), dimensions={1,0}
  ROOT %next = (s32[], bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}) tuple(%i, %x, %w)
}

%steps (state: (bf16[3,8], bf16[6,8,4], bf16[6,8,4])) -> (bf16[3,8], bf16[6,8,4], bf16[6,8,4]) {
  %state = (bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) parameter(0)
  %x.1 = bf16[3,8]{1,0} get-tuple-element(%state), index=0
  %w.1 = bf16[6,8,4]{2,1,0} get-tuple-element(%state), index=1
  %changing = bf16[6,8,4]{2,1,0} get-tuple-element(%state), index=2
  %copy.1 = bf16[6,8,4]{2,1,0} copy(%changing)
  %changed = bf16[6,8,4]{2,1,0} add(%copy.1, %w.1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}) tuple(%start, %x.1, %w.1)
  %inner = (s32[], bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}) while(%init), condition=%c, body=%layers, TRIP_COUNT
  %x.2 = bf16[3,8]{1,0} get-tuple-element(%inner), index=1
  ROOT %out = (bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) tuple(%x.2, %w.1, %changed)
}

ENTRY %main (params: bf16[6,8,4], x.3: bf16[3,8]) -> (bf16[3,8], bf16[8,4]) {
  %x.3 = bf16[3,8]{1,0} parameter(1), metadata={op_name="x"}
  %params = bf16[6,8,4]{2,1,0} parameter(0), metadata={op_name="params[\\'w\\'].value"}
  %state.1 = (bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) tuple(%x.3, %params, %params)
  %outer = (bf16[3,8]{1,0}, bf16[6,8,4]{2,1,0}, bf16[6,8,4]{2,1,0}) while(%state.1), condition=%c, body=%steps
  %result = bf16[3,8]{1,0} get-tuple-element(%outer), index=0
  %slice-start = ((bf16[6,8,4]{2,1,0}), bf16[8,4]{1,0}, u32[]) fusion-start(%params), kind=kLoop, calls=%first_layer
  %slice-done = bf16[8,4]{1,0} fusion-done(%slice-start)
  ROOT %results = (bf16[3,8]{1,0}, bf16[8,4]{1,0}) tuple(%result, %slice-done)
}

%first_layer (p.5: bf16[6,8,4]) -> bf16[8,4] {
  %p.5 = bf16[6,8,4]{2,1,0} parameter(0)
  %first = bf16[1,8,4]{2,1,0} slice(%p.5), slice={[0:1], [0:8], [0:4]}
  ROOT %squeezed.2 = bf16[8,4]{1,0} bitcast(%first)
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"6"}}'


def test_copies_are_counted_per_iteration_of_the_outermost_loop():
    """Slices in six layers, in two widths; none for the slice in a product, for activations or for sums of weights."""
    copies = weight_copies(NESTED_LOOPS.replace("TRIP_COUNT", KNOWN))
    assert [(c.shape, c.num_bytes, c.times, c.in_loop) for c in copies] == [
        ("bf16[1,8,4]", 64, 6, True),
        ("f32[8,4]", 128, 6, True),
        ("bf16[8,4]", 64, 1, False),
    ]


def test_a_copy_in_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match=r"inner copies bf16\[1,8,4\] of weights an unknown number of times"):
        weight_copies(NESTED_LOOPS.replace(", TRIP_COUNT", ""))
    told = weight_copies(NESTED_LOOPS.replace(", TRIP_COUNT", ""), unknown=6)
    assert told == weight_copies(NESTED_LOOPS.replace("TRIP_COUNT", KNOWN))


def test_weights_are_an_argument_of_the_program():
    with pytest.raises(ValueError, match="argument='weights'"):
        weight_copies(NESTED_LOOPS, "weights")


def test_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'h300' is not described, only \['a100', 'h200'\]"):
        aot.target("h300")


def test_missing_plugin_is_told_with_the_line_that_installs_it(monkeypatch):
    def refuse(**kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", refuse)
    with pytest.raises(RuntimeError, match=f"jax-cuda13-plugin=={re.escape(jax.__version__)} .*JAX_PLATFORMS=cpu"):
        aot.target("h200")


def layer(x, kernel):
    return x @ kernel


def scanned(params, x, steps):
    return jax.lax.fori_loop(0, steps, lambda i, x: jax.lax.scan(lambda x, w: (layer(x, w), None), x, params)[0], x)


def looped(params, x, steps):
    def step(i, x):
        for kernel in params:
            x = layer(x, kernel)
        return x

    return jax.lax.fori_loop(0, steps, step, x)


def reversed_stack(params, x, steps):
    return scanned(jax.lax.optimization_barrier(params[::-1]), x, steps)


@pytest.mark.aot
@pytest.mark.parametrize("gpu", aot.targets())
@pytest.mark.parametrize(
    ("function", "stacked", "in_loop", "once"),
    [(scanned, True, LAYERS * SLICE, 0), (looped, False, 0, 0), (reversed_stack, True, LAYERS * SLICE, LAYERS * SLICE)],
)
def test_copies_of_a_known_program(gpu, function, stacked, in_loop, once):
    """A stack that is scanned gives a slice a layer; layers of their own give none."""
    kernel = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    params = kernel((LAYERS, WIDTH, WIDTH)) if stacked else [kernel((WIDTH, WIDTH))] * LAYERS
    target = aot.target(gpu)
    arguments = target.abstract((params, kernel((TOKENS, WIDTH)), jax.ShapeDtypeStruct((), jnp.int32)))
    compiled = aot.compile_for(target, jax.jit(function), *arguments)
    copies = weight_copies(compiled.hlo)
    assert sum(c.num_bytes * c.times for c in copies if c.in_loop) == in_loop
    assert sum(c.num_bytes * c.times for c in copies if not c.in_loop) == once
    assert compiled.argument_bytes == LAYERS * SLICE + TOKENS * WIDTH * 2 + 4
    assert compiled.peak_bytes == compiled.argument_bytes + compiled.temp_bytes + TOKENS * WIDTH * 2


def sizes(shape):
    """Axes longer than 1, in no order: the same for a stack and its transposed or reshaped-by-1 copy."""
    return tuple(sorted(size for size in shape if size > 1))


@pytest.mark.aot
@pytest.mark.parametrize("name", ["SD3.5-medium", "FLUX.1-dev"])
def test_sampling_loop_compiles_for_h200_without_copying_a_stack(name):
    target = aot.target("h200")
    graph, *arrays = denoise_arguments(name, 1024)
    params, *rest = target.abstract(arrays)
    compiled = aot.compile_for(target, denoise, graph, params, *rest, implementation="cudnn")
    leaves = jax.tree.leaves(params)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    copies = weight_copies(compiled.hlo)

    stacks = {sizes(leaf.shape) for leaf in leaves if leaf.ndim == 3 and leaf.shape[0] > 1}
    shapes = {copy.shape: [int(size) for size in re.findall(r"\d+", copy.shape.split("[")[1])] for copy in copies}
    assert stacks
    assert not [shape for shape, axes in shapes.items() if sizes(axes) in stacks]
    assert all(math.prod(axes) < 2**27 for axes in shapes.values())  # FLUX's largest matrix has 57 million numbers
    assert all(copy.in_loop for copy in copies)
    assert sum(copy.num_bytes * copy.times for copy in copies) <= weights  # no weight twice a step
    assert compiled.temp_bytes < 1e9
    assert "__cudnn$fmhaSoftmax" in compiled.hlo
