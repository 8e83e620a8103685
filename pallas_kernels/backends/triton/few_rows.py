"""A few rows times a matrix of 8 bits: a product that waits for the weights alone, which are read once.

A program sums up 16 columns of the result. Weights become float32 in registers, and take their scales at the end.
"""

from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.kernel_types import Ref, Scalar

WHOLE = pl.BlockSpec(memory_space=pl.ANY)
COLUMNS = 16
DEPTH = 1024
"""How far along the sums a program reads at once, at most: a power of two that divides the depth."""


def few_rows(
    x: Float[Array, "M K"],
    w: Int[Array, "L E K"],
    column_scale: Float[Array, "L E"],
    bias: Float[Array, "L E"] | None,
    layer: Int[Array, ""],
    *,
    interpret: bool,
) -> Float[Array, "M E"]:
    _, columns, _ = w.shape
    vectors = [column_scale] if bias is None else [column_scale, bias]
    return pl.pallas_call(
        _multiply,
        grid=(columns // COLUMNS,),
        in_specs=[WHOLE] * (3 + len(vectors)),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="few_rows_matmul",
    )(layer, x, w, *vectors)


def _multiply(layer: Ref, x: Ref, w: Ref, column_scale: Ref, *refs: Ref) -> None:
    *bias, out = refs
    rows, depth = x.shape
    step, entry = gcd(depth, DEPTH), layer[...]
    columns = pl.ds(pl.program_id(0) * COLUMNS, COLUMNS)

    def load(ref: Ref, *at: Any) -> Array:
        return plgpu.load(ref.at[at]).astype(jnp.float32)

    def along(i: Scalar, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        piece = pl.ds(i * step, step)
        tile = load(w, entry, columns, piece)
        return tuple(
            total + (tile * load(x, jnp.int32(row), piece)[None]).sum(axis=1) for row, total in enumerate(sums)
        )

    sums = lax.fori_loop(0, depth // step, along, (jnp.zeros(COLUMNS, jnp.float32),) * rows)
    scale, added = load(column_scale, entry, columns), [load(one, entry, columns) for one in bias]
    for row, total in enumerate(sums):
        plgpu.store(out.at[jnp.int32(row), columns], sum(added, start=total * scale).astype(out.dtype))
