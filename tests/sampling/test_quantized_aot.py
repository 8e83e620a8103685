"""Whole loops of 8-bit transformers at published shapes, compiled for an H200: where weights lie, what is float32."""

import re

import jax
import pytest
from real_shapes import denoise_arguments, planned_arguments

from dfa2_jax.sampling.loop import denoise, denoise_planned
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies

MLP = {"FLUX.1-dev": 12288, "SD3.5-large": 9728}
"""Width of the hidden layer."""


def buffers(hlo):
    """What every instruction outside of a fusion writes, as text."""
    is_fused = False
    for line in hlo.splitlines():
        if heading := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line):
            is_fused = "fused" in heading[1] or "wrapped" in heading[1]
        if not is_fused and (found := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) [\w-]+\(", line)):
            yield found[1]


def assert_weights_stay(compiled, params, name):
    """Neither is a quantised weight copied, nor does an array of the hidden layer's width become float32."""
    copied = [copy for copy in weight_copies(compiled.hlo, unknown=1) if re.match(r"(s8|f8e4m3fn)\[", copy.shape)]
    assert not copied
    hidden = re.compile(rf"f32\[(1,|2,)?[1-9]\d{{3,}},{MLP[name]}\]")
    assert not [buffer for buffer in buffers(compiled.hlo) if hidden.search(buffer)]
    assert compiled.hlo.count("quantized_matmul_mosaic") > 0


@pytest.mark.aot
@pytest.mark.parametrize(("name", "precision"), [("FLUX.1-dev", "float8"), ("SD3.5-large", "int8")])
def test_dense_loops_read_8_bit_weights_where_they_lie(name, precision):
    target = aot.target("h200")
    graph, *rest = denoise_arguments(name, 1024, precision)
    compiled = aot.compile_for(target, denoise, graph, *target.abstract(tuple(rest)))
    assert_weights_stay(compiled, rest[0], name)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rest[0]))
    if name == "FLUX.1-dev":
        assert nbytes < 12.1e9  # of 23.8 in bfloat16


@pytest.mark.aot
def test_a_planned_loop_reads_the_rows_of_named_heads():
    target = aot.target("h200")
    graph, *rest = planned_arguments("FLUX.1-dev", 1024, "float8")
    compiled = aot.compile_for(target, denoise_planned, graph, *target.abstract(tuple(rest)))
    assert_weights_stay(compiled, rest[0], "FLUX.1-dev")
