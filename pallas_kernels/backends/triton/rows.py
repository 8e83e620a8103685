"""Rows to 8 bits with a scale each, after an adaptive layer norm or without: a program takes a row, and reads it once.

16,896 rows of 3,072 took 87 us on an H200 as one array each, 56 without the norm. In pieces they take 0.81 and 0.94 of
that. XLA's fusions take 165 and 110 (docs: quantization).
"""

from functools import partial, reduce
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.kernel_types import Ref
from pallas_kernels.backends.passes import EPS, SMALLEST, ScaleAndShift

WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def quantized_rows(
    x: Float[Array, "*dims D"],
    modulation: ScaleAndShift | None,
    *,
    interpret: bool,
) -> tuple[Int[Array, "*dims D"], Float[Array, "*dims"]]:
    *dims, depth = x.shape
    rows = prod(dims)
    per_image = rows if modulation is None else rows // modulation[0].shape[0]
    vectors = [] if modulation is None else [part.reshape(-1) for part in modulation]
    values, scale = pl.pallas_call(
        partial(_quantize, depth=depth, per_image=per_image),
        grid=(rows,),
        in_specs=[WHOLE] * (1 + len(vectors)),
        out_specs=[WHOLE] * 2,
        out_shape=[jax.ShapeDtypeStruct((rows * depth,), jnp.int8), jax.ShapeDtypeStruct((rows,), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="quantized_rows",
    )(x.reshape(-1), *vectors)
    return values.reshape(x.shape), scale.reshape(dims)


def _quantize(x: Ref, *refs: Ref, depth: int, per_image: int) -> None:
    *modulation, values, scale = refs
    row, size = pl.program_id(0), piece_of(depth)
    pieces = range(0, depth, size)
    each = jnp.arange(size, dtype=jnp.int32)
    masks = [None if start + size <= depth else each < depth - start for start in pieces]

    def load(ref: Ref, entry: Array) -> list[Array]:
        parts = [ref.at[pl.ds(entry * depth + start, size)] for start in pieces]
        others = [None if mask is None else 0.0 for mask in masks]
        filled = zip(parts, masks, others, strict=True)
        return [plgpu.load(part, mask=mask, other=other).astype(jnp.float32) for part, mask, other in filled]

    def mean(parts: list[Array]) -> Array:
        return sum(parts[1:], parts[0]).sum() / depth

    here = load(x, row)
    if modulation:
        image, middle = lax.div(row, jnp.int32(per_image)), mean(here)
        here = [part - middle for part in here]
        here = [part if mask is None else jnp.where(mask, part, 0.0) for part, mask in zip(here, masks, strict=True)]
        inverse = lax.rsqrt(mean([part * part for part in here]) + EPS)
        scales, shifts = (load(ref, image) for ref in modulation)
        here = [part * inverse * (1 + a) + b for part, a, b in zip(here, scales, shifts, strict=True)]
    most = jnp.maximum(reduce(jnp.maximum, map(jnp.abs, here)).max(), SMALLEST) / 127
    for start, part, mask in zip(pieces, here, masks, strict=True):
        scaled = part / most
        rounded = (scaled + jnp.where(scaled < 0, -0.5, 0.5)).astype(jnp.int32)  # to the nearest, halves away from 0
        target = values.at[pl.ds(row * depth + start, size)]
        plgpu.store(target, jnp.clip(rounded, -127, 127).astype(jnp.int8), mask=mask)
    scale[row] = most


def piece_of(depth: int) -> int:
    """How many values of a row lie in one array, a power of two. Where one fits so well, a tenth lies beyond at most.

    One array of 3,072 values has 4,096, a quarter of them in vain.
    """
    sizes = [size for size in (1024, 512, 256, 128) if -depth % size <= depth / 10]
    return sizes[0] if sizes else pl.next_power_of_2(depth)
