"""What the Triton kernels share: a step of online softmax (arXiv 1805.02867) in base 2, and a walk over keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends.kernel_types import Flag, Scalar
from pallas_kernels.layout import Layout
from pallas_kernels.mask import UNSEEN

FMA_EXP2 = "{ .reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }"
"""XLA compiles Triton kernels without contraction and with denormals: 2**(a*b - c) takes six instructions, not two."""


class Running(NamedTuple):
    """Softmax of the keys so far: `values / total` is the output, `highest + log2(total)` the log-sum-exp."""

    values: Float[Array, "R H"]
    highest: Float[Array, " R"]
    total: Float[Array, " R"]


def nothing(rows: int, dim: int) -> Running:
    zero = jnp.zeros((rows, dim), jnp.float32), jnp.zeros(rows, jnp.float32)
    return Running(zero[0], jnp.full(rows, UNSEEN, jnp.float32), zero[1])


def exp2(x: Float[Array, "R K"], scale: float, shift: Float[Array, "R 1"], inline_asm: bool) -> Float[Array, "R K"]:
    """2**(x * scale - shift). Interpret mode has no inline assembly."""
    if not inline_asm:
        return jnp.exp2(x * scale - shift)
    args = [x, jnp.full(x.shape, scale, jnp.float32), jnp.broadcast_to(-shift, x.shape)]
    out = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return plgpu.elementwise_inline_asm(FMA_EXP2, args=args, constraints="=f,f,f,f", pack=1, result_shape_dtypes=[out])[
        0
    ]


def product(a: Array, b: Array, trans_b: bool = False) -> Float[Array, "M N"]:
    """The product of two tiles in float32. Float32 operands have an IEEE product: the default on NVIDIA is TF32."""
    return plgpu.dot(a, b, trans_b=trans_b, precision=lax.Precision.HIGHEST)


def attend_tile(
    running: Running,
    q: Float[Array, "R H"],
    k: Float[Array, "K H"],
    v: Float[Array, "K H"],
    kept: Bool[Array, "R K"] | None = None,
    *,
    scale: float,
    inline_asm: bool,
) -> Running:
    """One more tile of keys. `scale` is that of the scores, times log2(e)."""
    scores = product(q, k, trans_b=True)
    if kept is not None:
        scores = jnp.where(kept, scores, UNSEEN)
    highest = jnp.maximum(running.highest, jnp.max(scores, axis=1) * scale)
    decay = jnp.exp2(running.highest - highest)
    weights = exp2(scores, scale, highest[:, None], inline_asm)
    values = running.values * decay[:, None] + product(weights.astype(v.dtype), v)
    return Running(values, highest, running.total * decay + jnp.sum(weights, axis=1))


class Queries(NamedTuple):
    """The rows of one program: all of text or all of visual tokens."""

    is_text: Flag
    tile: Scalar
    """Number of the tile, counted from the first token of its kind."""
    first: Scalar
    """Position in the sequence of the first row."""
    rows: Int[Array, " R"]
    exist: Bool[Array, "R 1"]


def queries(layout: Layout, is_text: Flag, tile: Scalar, size: int) -> Queries:
    start = jnp.where(is_text, jnp.int32(layout.text.start), jnp.int32(layout.visual.start))
    stop = jnp.where(is_text, jnp.int32(layout.text.stop), jnp.int32(layout.visual.stop))
    rows = start + tile * size + jnp.arange(size, dtype=jnp.int32)
    return Queries(is_text, tile, start + tile * size, rows, (rows < stop)[:, None])


def within(x: Int[Array, "R K"], most: Int[Array, "R 1"]) -> Bool[Array, "R K"]:
    """0 <= x <= most, where `most` is not negative.

    One unsigned comparison: of two signed ones LLVM makes two selections (14.2 and 15.1 instructions per score).
    """
    return x.astype(jnp.uint32) <= most.astype(jnp.uint32)
