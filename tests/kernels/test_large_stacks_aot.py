"""Kernels that write into memory of more than 2^31 numbers, compiled for an H200: how they address it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Layout, arrow_attention
from pallas_kernels.inspect import aot

LAYOUT, BATCH, HEADS, HEAD_DIM = Layout(226, 11 * 48 * 85, text_first=True), 2, 48, 64
LAYER = BATCH * LAYOUT.length * HEADS * HEAD_DIM
LAYERS = 42
"""CogVideoX1.5-5B at 81 x 768 x 1360: 1.2e10 numbers in all. Its first 7 layers are fewer than 2^31."""


def compiled(implementation, layers):
    """The arrow kernels that write an entry of a stack, with the whole program."""
    target, shape = aot.target("h200"), jax.ShapeDtypeStruct
    tensor = shape((BATCH, LAYOUT.length, HEADS, HEAD_DIM), jnp.bfloat16)
    stack = shape((layers, *tensor.shape), jnp.bfloat16)

    @partial(jax.jit, donate_argnames="cache")
    def attend(q, k, v, cache, half_window, layer):
        options = {"cache": cache, "layer": layer, "implementation": implementation}
        return arrow_attention(q, k, v, half_window, layout=LAYOUT, **options)

    arguments = tensor, tensor, tensor, stack, shape((HEADS,), jnp.int32), shape((), jnp.int32)
    program, kernels = aot.kernels(target, attend, *target.abstract(arguments))
    assert program.alias_bytes == program.output_bytes == stack.size * 2  # the stack's own buffer
    return [kernel for kernel in kernels if "arrow" in kernel.name]


def products_with_the_layer(ptx):
    """Instructions that multiply by the size of a layer, in numbers or in bytes."""
    return re.findall(rf"\b((?:mul|mad)\.\S+)\s[^;]*\b(?:{LAYER}|{2 * LAYER})\b", ptx)


def is_wide(instruction):
    return ".wide." in instruction or instruction.endswith("64")


@pytest.mark.aot
@pytest.mark.parametrize(("implementation", "names"), [("triton", 2), ("jax_triton", 1)])
def test_triton_kernels_find_a_layer_by_64_bits(implementation, names):
    assert LAYERS * LAYER > 2**31
    kernels = compiled(implementation, LAYERS)
    assert len(kernels) == names
    for kernel in kernels:
        instructions = products_with_the_layer(kernel.ptx)
        assert instructions and all(map(is_wide, instructions)), (kernel.name, instructions)


@pytest.mark.aot
def test_an_offset_of_32_bits_would_be_seen():
    """Pallas takes 32 bits where they are enough, as for 7 layers."""
    assert 7 * LAYER < 2**31
    instructions = [x for kernel in compiled("triton", 7) for x in products_with_the_layer(kernel.ptx)]
    assert instructions and not any(map(is_wide, instructions))


@pytest.mark.aot
def test_the_mosaic_kernel_leaves_addresses_to_the_copy_engine():
    """All that it writes goes by copies of boxes, by five coordinates of the stack, each below 2^31.

    The hardware multiplies coordinates by strides, of 64 bits in the copy's descriptor. Of its own addresses in global
    memory, which could be too short, a thread writes one: that of the counter of jobs.
    """
    (kernel,) = compiled("mosaic", LAYERS)
    ptx = kernel.ptx
    assert not products_with_the_layer(ptx)
    assert not re.search(r"\b(st|red)\.\S*global", ptx) and len(re.findall(r"\batom\.", ptx)) == 1
    writes = re.findall(r"cp\.\S*bulk\S*\.(\dd)\.global\S* \[%\w+, \{([^}]*)\}", ptx)
    assert writes and all(rank == "5d" and len(at.split(",")) == 5 for rank, at in writes)
    reads = re.findall(r"cp\.\S*bulk\S*\.(\dd)\.shared", ptx)
    assert reads and set(reads) == {"4d"}  # q, k and v
