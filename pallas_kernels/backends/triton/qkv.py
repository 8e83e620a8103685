"""From products to attention: RMS norms by head, rotary positions, and streams put in one sequence, in one pass.

A program takes 16 tokens of a head: queries, keys, and values, which it copies. Values of 16 bits are read and written
by pairs, as words of 32: rotary positions turn pairs. 16,896 tokens of 24 heads of 128 take 188 us on an H200, XLA's
fusions 435 (docs: quantization).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt32

from pallas_kernels.backends.kernel_types import Ref
from pallas_kernels.backends.passes import EPS, QKV, Projected, Rope

WHOLE = pl.BlockSpec(memory_space=pl.ANY)
ROWS = 16
"""Tokens of a program: 16, 32 and 64 take as long at 16,896 tokens of FLUX.1-dev, and 16 the least at 4,608."""


def normed_qkv(streams: Sequence[Projected], rope: Rope | None, *, interpret: bool) -> QKV:
    batch, _, _, dim = streams[0].heads.shape
    which, num_heads, dtype = streams[0].which, streams[0].num_heads, streams[0].heads.dtype
    made = num_heads if which is None else len(which)
    lengths = tuple(stream.heads.shape[1] for stream in streams)
    operands = [_pairs(stream.heads) for stream in streams]
    operands += [_pairs(norm) for stream in streams for norm in stream.norms or ()]
    operands += [*(rope or ()), *(() if which is None else (which,))]
    out = jax.ShapeDtypeStruct((batch, sum(lengths), num_heads, dim // 2), jnp.uint32)
    q, k, v = pl.pallas_call(
        partial(
            _norm, lengths=lengths, normed=tuple(stream.norms is not None for stream in streams),
            rotated=rope is not None, placed=which is not None, dtype=dtype,
        ),
        grid=(sum(pl.cdiv(length, ROWS) for length in lengths), made, batch),
        in_specs=[WHOLE] * len(operands),
        out_specs=[WHOLE] * 3,
        out_shape=[out] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="normed_qkv",
    )(*operands)  # fmt: skip
    q, k, v = (lax.bitcast_convert_type(x, dtype).reshape(*x.shape[:-1], dim) for x in (q, k, v))
    return q, k, v


def _pairs(x: Float[Array, "*dims H"]) -> UInt32[Array, "*dims half"]:
    """The first of a pair in the lower half of a word."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.uint32)


def _apart(words: UInt32[Array, "*dims"], dtype: DTypeLike) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
    halves = (words.astype(jnp.uint16), (words >> 16).astype(jnp.uint16))
    first, second = (lax.bitcast_convert_type(half, dtype).astype(jnp.float32) for half in halves)
    return first, second


def _together(first: Float[Array, "*dims"], second: Float[Array, "*dims"], dtype: DTypeLike) -> UInt32[Array, "*dims"]:
    low, high = (lax.bitcast_convert_type(x.astype(dtype), jnp.uint16).astype(jnp.uint32) for x in (first, second))
    return low | (high << 16)


def _norm(
    *refs: Ref, lengths: tuple[int, ...], normed: tuple[bool, ...], rotated: bool, placed: bool, dtype: DTypeLike
) -> None:
    given, (q, k, v) = iter(refs[:-3]), refs[-3:]
    streams = [next(given) for _ in lengths]
    norms = [(next(given), next(given)) if is_normed else (None, None) for is_normed in normed]
    rope = (next(given), next(given)) if rotated else ()
    tile, head, image = (pl.program_id(axis) for axis in range(3))
    made, place = streams[0].shape[2] // 3, next(given)[head] if placed else head
    first_tile, first_row = 0, 0

    for stream, length, (norm_q, norm_k) in zip(streams, lengths, norms, strict=True):
        tiles = pl.cdiv(length, ROWS)

        @pl.when((tile >= first_tile) & (tile < first_tile + tiles))
        def of_stream(
            stream=stream, length=length, norms=(norm_q, norm_k, None), first_tile=first_tile, first_row=first_row
        ):
            start = (tile - first_tile) * ROWS
            exist = (start + jnp.arange(ROWS, dtype=jnp.int32) < length)[:, None]
            rows, to = pl.ds(start, ROWS), pl.ds(first_row + start, ROWS)
            for number, (norm, out) in enumerate(zip(norms, (q, k, v), strict=True)):
                words = plgpu.load(stream.at[image, rows, number * made + head, :], mask=exist, other=jnp.uint32(0))
                turned = rotated and out is not v
                if norm is not None or turned:
                    x, y = _apart(words, dtype)
                    if norm is not None:
                        inverse = lax.rsqrt((x * x + y * y).sum(axis=1) / (2 * x.shape[1]) + EPS)[:, None]
                        of_x, of_y = _apart(norm[...], dtype)
                        x, y = x * inverse * of_x[None], y * inverse * of_y[None]
                    if turned:
                        cos, sin = (plgpu.load(table.at[to, :], mask=exist, other=0.0) for table in rope)
                        x, y = x * cos - y * sin, y * cos + x * sin
                    words = _together(x, y, dtype)
                plgpu.store(out.at[image, to, place, :], words, mask=exist)

        first_tile, first_row = first_tile + tiles, first_row + length
