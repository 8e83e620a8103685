"""Sampling loops of videos at published sizes, compiled for an H200: memory, and what is copied."""

import re
from functools import cache

import jax
import pytest
from real_shapes import VIDEO_GRIDS, denoise_arguments, planned_arguments

from dfa2_jax.sampling.loop import denoise, denoise_planned
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import uses_of_stacks, weight_copies

H200 = 139 * 2**30
PEAKS = {
    "CogVideoX-5B": (13.6e9, 22.8e9),
    "CogVideoX1.5-5B": (17.0e9, 40.4e9),
    "HunyuanVideo 544p": (30.8e9, 55.7e9),
    "HunyuanVideo 720p": (34.6e9, 78.6e9),
}
"""Bytes that a dense and a planned loop need at most, with 11.14 GB of weights, HunyuanVideo 25.64. The memory of
attention is 9.17, 23.28, 24.91 and 43.89 GB. XLA plans the rest: 2.34, 5.7, 5.1 and 8.9 GB."""

names = pytest.mark.parametrize("name", PEAKS)


@cache
def dense(name):
    """The parameters' shapes, and the program."""
    target = aot.target("h200")
    graph, *rest = denoise_arguments(name, VIDEO_GRIDS[name])
    return rest[0], aot.compile_for(target, denoise, graph, *target.abstract(tuple(rest)))


@cache
def planned(name):
    """Those and the memory's shapes. The plan has bands over time."""
    target, grid = aot.target("h200"), VIDEO_GRIDS[name]
    graph, *rest = planned_arguments(name, grid, over_time=True)
    compiled = aot.compile_for(target, denoise_planned, graph, *target.abstract(tuple(rest)), frames=grid.frames)
    return rest[0], rest[1].memory, compiled


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def assert_no_stack_is_copied(compiled, params):
    """A product of so many rows reads a copy of its layer's weights (`nn.weights.MANY_ROWS`): never of all layers."""
    stacks = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 3]
    layer = max(shape[1] * shape[2] for shape in stacks)
    copies = weight_copies(compiled.hlo, unknown=1)
    assert stacks and copies
    for copy in copies:
        sizes = [int(size) for size in re.findall(r"\d+", copy.shape.split("[")[1])]
        assert sorted(size for size in sizes if size > 1) not in [sorted(shape) for shape in stacks], copy
        assert copy.num_bytes <= 2 * layer, copy
        assert copy.in_loop or copy.num_bytes < 1e6, copy
    return copies


@pytest.mark.aot
@names
def test_a_dense_loop_fits_and_copies_each_layer_once(name):
    params, compiled = dense(name)
    assert compiled.peak_bytes < PEAKS[name][0] < H200
    assert compiled.argument_bytes < nbytes(params) + 0.2e9
    copies = assert_no_stack_is_copied(compiled, params)
    assert sum(copy.num_bytes * copy.times for copy in copies) <= nbytes(params)


@pytest.mark.aot
@names
def test_a_planned_loop_fits_and_its_memory_stays_where_it_is(name):
    params, memory, compiled = planned(name)
    assert compiled.peak_bytes < PEAKS[name][1] < H200
    assert compiled.alias_bytes >= nbytes(memory)
    assert compiled.peak_bytes < dense(name)[1].peak_bytes + nbytes(memory) + 0.1e9
    stacks = {f"bf16[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(memory)}
    assert all(f"= {stack}" in compiled.hlo for stack in stacks), "not as it is looked for"
    made, reads = uses_of_stacks(compiled.hlo, stacks)
    assert made == {}, "the memory is copied or made anew"
    assert 1 <= max(reads.values()) <= 2, "a block reads its entry, in both orders"
    assert_no_stack_is_copied(compiled, params)
