"""Attention in portable XLA, in blocks, so that the scores never exist as a whole.

Two shapes of one idea. Accelerators take a chunk of queries of every head at once, and compute what a mask removes.
XLA's CPU backend runs a batched product on one core and a plain one on all. So on a CPU the loop is over heads and
tiles, every product is plain, and tiles out of a window are passed over.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import UNSEEN, rows_of_mask, seen_keys

SCORE_BYTES = 2**28
"""Float32 scores held at once in chunks of queries. FLUX at 2048 px would need 27 GB for all of them."""

TILE_ROWS, TILE_KEYS, TILES = 640, 1536, 2
"""Queries and keys of a CPU tile, and tiles in flight: while one exponentiates on one core, the other multiplies.
Measured on 2 cores at 24 heads x 64, 4,429 tokens, float32: 1.8 s, against 6.4 s in chunks and 3.8 s in torch. At
1,280 tokens, 640 rows take 0.87 of the time of 512."""

BAND_ROWS, BAND_TILES = 128, 4
"""The same for rows of a band, whose cost grows with the rows of a tile: each adds its width to all others' keys. From
`LONG` visual tokens on twice the rows: at 4,096 windows of 128 and 256 take 0.83 and 0.92 of the time (1,024: 1.12)."""

LONG = 2048

BAND_KEYS = (160, 192, 256, 384, 512, 640, 768, 1152, 1536)
"""Compiled sizes of a block of band keys: without waste for windows of 64, 128, 256 and 512 tokens on each side."""

SHORT = 192
"""Up to so many tokens a CPU, too, computes all heads at once. On 2 cores 104 tokens take 0.8 ms, by tiles 1.7; and 176
take 1.2 ms, by tiles 1.1 to 2.6. But 288 of head_dim 64 take 32 ms, by tiles 19. Tiles compile in 2 s, not in 0.3."""

LOG2_E = 1.4426950408889634

Bits = UInt[Array, "*dims"] | Float[Array, "*dims"]
"""Bits of 16-bit floats as integers; float32 as it is."""

Index = tuple[Array, Array]
Keeps = Callable[[Array], Array]
"""Positions [T] of queries to the keys [N, T, S] that every head keeps of them."""

Carry = tuple[Array, Array, Array]  # of the keys so far: maximum, sum of weights, weighted values
Carries = tuple[Carry, ...]


class Blockwise:
    interpretable = False

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        return None

    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        layout, arrays = problem.layout, (problem.q, problem.k, problem.v, problem.windows)
        chunked, arguments = (
            partial(chunked_arrows, layout),
            (*arrays, problem.cache, problem.layer, problem.text_length),
        )
        if layout.length <= SHORT:
            return chunked(*arguments)
        return jax.lax.platform_dependent(*arguments, cpu=partial(tiled_arrows, layout), default=chunked)

    def nested(
        self, problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
    ) -> Float[Array, "W+1 B T N H"]:
        """One pass per window: masked tiles of rings would cost more than the sparse passes do."""
        heads = problem.q.shape[2]
        windows = [jnp.broadcast_to(window, heads) for window in half_windows]
        arrows = [self.arrow(replace(problem, half_window=window), interpret=interpret) for window in windows]
        return jnp.stack([*arrows, self.dense(problem, interpret=interpret)])

    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        return dense_attention(problem.layout, problem.q, problem.k, problem.v, problem.text_length)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def dense_attention(
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention over every key but padding; scores, sums and outputs accumulate in float32."""
    chunked, arguments = partial(chunked_attention, layout), (q, k, v, text_length)
    if k.shape[1] <= SHORT:
        return chunked(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=partial(tiled_attention, layout), default=chunked)


@dense_attention.defjvp
def _differentiate(layout: Layout, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    """Tiles compute with the bits of floats, which have no gradient."""
    return jax.jvp(partial(chunked_attention, layout), primals, tangents)


def chunked_attention(
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    return _chunked(q, k, v, None, layout, text_length)


def _chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    keeps: Keeps | None,
    layout: Layout,
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """All heads at once, as many queries as `SCORE_BYTES` of scores allow."""
    seen = None if text_length is None else seen_keys(text_length, layout)
    batch, length, heads, _ = q.shape
    count = -(-length // max(1, SCORE_BYTES // (4 * batch * heads * k.shape[1])))
    rows = -(-length // count)  # equal chunks: at most count - 1 rows of padding

    def attend(first: Array | int, chunk: Array) -> Array:
        return _attend(chunk, k, v, keeps and keeps(first + jnp.arange(rows)), seen)

    if count == 1:
        return attend(0, q)
    padded = jnp.pad(q, ((0, 0), (0, count * rows - length), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(batch, count, rows, *q.shape[2:]), 1, 0)
    out = jax.lax.map(lambda xs: attend(*xs), (jnp.arange(count) * rows, chunks))
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * rows, *q.shape[2:])[:, :length]


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    kept: Bool[Array, "N T S"] | None,
    seen: Bool[Array, "B S"] | None,
) -> Array:
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None  # JAX's default on NVIDIA is TF32
    accumulate = {"precision": precision, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, **accumulate) * q.shape[-1] ** -0.5
    scores = scores if kept is None else jnp.where(kept, scores, UNSEEN)
    scores = scores if seen is None else jnp.where(seen[:, None, None], scores, UNSEEN)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]  # [B, T, N, 1]
    return (jnp.einsum("BNTS,BSNH->BTNH", weights.astype(v.dtype), v, **accumulate) / total).astype(q.dtype)


def tiled_attention(
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """One head after another, `TILES` tiles of queries at a time over blocks of keys; online softmax in float32."""
    heads = q.shape[2]
    every = _Rows(0, q.shape[1], TILE_ROWS, TILES)

    def head(i: Array, out: Array) -> Array:
        index = i // heads, i % heads
        this = _Head.of(q, k, v, index, layout, text_length)
        return _put(out, index, every.each(jnp.zeros_like(this.q), every.count, this.attend_all), q.dtype)

    return _values(jax.lax.fori_loop(0, q.shape[0] * heads, head, _bits(jnp.zeros_like(q))), q.dtype)


def chunked_arrows(
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_window: Int[Array, " N"],
    cache: Float[Array, "*L B T N H"] | None,
    layer: Int[Array, ""] | None,
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "*L B T N H"]:
    """Every pair of every head under its mask, also those of cached heads, whose outputs are then dropped.

    One H200, float32: 32 samples of 4 heads and 288 tokens take 0.2 ms, by tiles 24 to 37. One sample of 24 heads and
    4,429 tokens takes 5.6 ms, by tiles 17 to 24.
    """
    out = _chunked(q, k, v, partial(rows_of_mask, half_window, layout), layout, text_length)
    entry = jnp.nan if cache is None else cache if layer is None else cache[layer]
    out = jnp.where((half_window == CACHED)[:, None], entry, out)
    return out if cache is None or layer is None else jax.lax.dynamic_update_index_in_dim(cache, out, layer, 0)


def tiled_arrows(
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_window: Int[Array, " N"],
    cache: Float[Array, "*L B T N H"] | None,
    layer: Int[Array, ""] | None,
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "*L B T N H"]:
    """One head after another, at a cost proportional to what it keeps.

    The loops over query tiles are of run-time length, 0 where a head takes another one: unlike `lax.cond`, that leaves
    the output in place. Keys around the diagonal come in blocks. Their sizes are compiled (`BAND_KEYS`), and the window
    chooses one. In each block, keys out of the window are masked.
    """
    batch, heads, visual = q.shape[0], q.shape[2], layout.visual
    every = _Rows(0, layout.length, TILE_ROWS, TILES)
    text = _Rows(layout.text.start, layout.num_text, TILE_ROWS, TILES)
    band_rows = 2 * BAND_ROWS if layout.num_visual >= LONG else BAND_ROWS
    banded = _Rows(visual.start, layout.num_visual, band_rows, BAND_TILES)
    sizes = sorted({min(size, layout.num_visual) for size in BAND_KEYS} - {0})

    def compute(index: Index, window: Array) -> Float[Array, "T H"]:
        this = _Head.of(q, k, v, index, layout, text_length)
        is_full = (window == FULL) | (window >= layout.num_visual)
        out = every.each(jnp.zeros_like(this.q), jnp.where(is_full, every.count, 0), this.attend_all)
        out = text.each(out, jnp.where(is_full, 0, text.count), this.attend_all)
        span = jnp.minimum(banded.size + 2 * window, layout.num_visual)
        blocks = -(-span // max(sizes, default=1))
        need, smaller = -(-span // blocks), 0
        for size in sizes:
            taken = ~is_full & (need > smaller) & (need <= size)
            band = partial(this.attend_band, layout, window, size, blocks)
            out = banded.each(out, jnp.where(taken, banded.count, 0), band)
            smaller = size
        return out

    def head(i: Array, stack: Array) -> Array:
        b, n = i // heads, i % heads

        def put(n: Array, stack: Array) -> Array:
            index = (b, n) if layer is None else (layer, b, n)
            return _put(stack, index, compute((b, n), half_window[n]), q.dtype)

        # Nothing in it may be constant over this loop of one head or none: XLA would compute that before, for any head.
        return jax.lax.fori_loop(n, jnp.where(half_window[n] == CACHED, n, n + 1), put, stack)

    stack = _bits(jnp.full_like(q, jnp.nan) if cache is None else cache)
    return _values(jax.lax.fori_loop(0, batch * heads, head, stack), q.dtype)


def _bits(x: Float[Array, "*dims"]) -> Bits:
    """Integers in place of 16-bit floats: XLA's CPU backend slices and updates those by a float32 copy of the whole
    array.

    The copy takes 12 to 17 ms at 8 heads x 64, 4,608 tokens, even where every head is cached."""
    return x if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, jnp.uint16)


def _values(x: Bits, dtype: DTypeLike) -> Float[Array, "*dims"]:
    return x if dtype == jnp.float32 else jax.lax.bitcast_convert_type(x, dtype)


def _put(out: Bits, index: tuple[Array, ...], head: Float[Array, "T H"], dtype: DTypeLike) -> Bits:
    """`out` [..., T, N, H] with one head written in place. (Reshaped first, stacks of one sample would be copied.)"""
    *entry, n = index
    update = _bits(head.astype(dtype))[(*(None,) * len(entry), slice(None), None)]
    return jax.lax.dynamic_update_slice(out, update, (*entry, 0, n, 0))


class _Rows:
    """Query rows in `count` groups of `together` tiles of `size`, which overlap rather than run past the end."""

    def __init__(self, start: int, length: int, size: int, together: int):
        self.start, self.length, self.together = start, length, together
        self.size, self.count = _even(length, size, together) if length else (0, 0)

    def each(self, out: Float[Array, "T H"], count: Array | int, attend: Callable[..., Carries]) -> Float[Array, "T H"]:
        """`out` with the rows of the first `count` groups filled in with what `attend(starts, rows)` says."""

        def group(i: Array, out: Array) -> Array:
            last = self.length - self.size
            tiles = range(self.together)
            starts = [self.start + jnp.minimum((i * self.together + tile) * self.size, last) for tile in tiles]
            for start, (_, total, acc) in zip(starts, attend(starts, self.size), strict=True):
                out = jax.lax.dynamic_update_slice(out, acc / total[:, None], (start, 0))
            return out

        return jax.lax.fori_loop(0, count, group, out) if self.length else out


class _Head(NamedTuple):
    """Float32 tokens of one head of one sample, in one piece: each tile reads them again. Queries are scaled.

    padding: keys from the first to before the second are no tokens. None: all are.
    """

    q: Float[Array, "T H"]
    k: Float[Array, "S H"]
    v: Float[Array, "S H"]
    padding: tuple[Array, int] | None

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, index: Index, layout: Layout, text_length: Array | None) -> "_Head":
        def cut(x: Array) -> Float[Array, "T H"]:
            size = 1, x.shape[1], 1, x.shape[3]
            bits = jax.lax.dynamic_slice(_bits(x), (index[0], 0, index[1], 0), size).reshape(size[1::2])
            return _values(bits, x.dtype).astype(jnp.float32)

        text = layout.text
        padding = None if text_length is None else (text.start + text_length[index[0]], text.stop)
        return cls(cut(q) * (q.shape[-1] ** -0.5 * LOG2_E), cut(k), cut(v), padding)

    def attend_all(self, starts: list[Array], rows: int) -> Carries:
        fresh = (_fresh(rows, self.q.shape[1]),) * len(starts)
        return self.visit([_cut(self.q, start, rows) for start in starts], fresh, slice(0, len(self.k)))

    def visit(self, queries: list[Array], carries: Carries, keys: slice) -> Carries:
        """Every key of a static range, in equal blocks and a remainder."""
        length = keys.stop - keys.start
        block, _ = _even(length, TILE_KEYS, 1)

        def visit(carries: Carries, start: Array | int, size: int) -> Carries:
            k, v, kept = _cut(self.k, start, size), _cut(self.v, start, size), None
            if self.padding is not None:
                key = start + jnp.arange(size)[None]
                kept = (key < self.padding[0]) | (key >= self.padding[1])
            return tuple(_online(carry, q, k, v, kept) for carry, q in zip(carries, queries, strict=True))

        whole, rest = divmod(length, block)
        carries = jax.lax.fori_loop(0, whole, lambda j, c: visit(c, keys.start + j * block, block), carries)
        return visit(carries, keys.start + whole * block, rest) if rest else carries

    def attend_band(
        self, layout: Layout, window: Array, size: int, blocks: Array, starts: list[Array], rows: int
    ) -> Carries:
        """Text keys, then `blocks` blocks of `size` visual keys from the window's first one on."""
        queries, keys = [_cut(self.q, start, rows) for start in starts], layout.visual
        carries = (_fresh(rows, self.q.shape[1]),) * len(starts)
        if layout.num_text:  # for the rows of all tiles at once: a tall product is the faster one
            fresh = (_fresh(rows * len(starts), self.q.shape[1]),)
            (tall,) = self.visit([jnp.concatenate(queries)], fresh, layout.text)
            carries = tuple(zip(*(jnp.split(x, len(starts)) for x in tall), strict=True))
        firsts = [jnp.maximum(jnp.minimum(start - window, keys.stop - size * blocks), keys.start) for start in starts]

        def visit(j: Array, carries: Carries) -> Carries:
            out = []
            for carry, q, start, first in zip(carries, queries, starts, firsts, strict=True):
                new = first + j * size
                at = jnp.minimum(new, keys.stop - size)  # the last block may overlap the one before
                key = at + jnp.arange(size)[None]
                kept = (jnp.abs(start + jnp.arange(rows)[:, None] - key) <= window) & (key >= new)
                out.append(_online(carry, q, _cut(self.k, at, size), _cut(self.v, at, size), kept))
            return tuple(out)

        return jax.lax.fori_loop(0, blocks, visit, carries)


def _cut(x: Float[Array, "T H"], start: Array | int, size: int) -> Float[Array, "size H"]:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _fresh(rows: int, dim: int) -> Carry:
    return jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((rows, dim))


def _even(total: int, size: int, together: int) -> tuple[int, int]:
    """(size, count): `count` groups of `together` equal pieces of at most `size` cover `total`, with little overlap."""
    count = -(-total // (size * together))
    return min(total, -(-total // (count * together))), count


def _online(carry: Carry, q: Array, k: Array, v: Array, kept: Array | None = None) -> Carry:
    """One step of online softmax (arXiv 1805.02867); scores in units of log 2."""
    (maximum, total, acc), highest = carry, jax.lax.Precision.HIGHEST
    scores = jnp.dot(q, k.T, precision=highest)
    if kept is not None:
        scores = jnp.where(kept, scores, UNSEEN)
    new = jnp.maximum(maximum, scores.max(1))
    decay, weights = exp2(maximum - new), exp2(scores - new[:, None])
    return new, total * decay + weights.sum(1), acc * decay[:, None] + jnp.dot(weights, v, precision=highest)


def exp2(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """2**x for x <= 0 to a relative 1e-7: a polynomial on [-1/2, 1/2], an exponent. XLA's CPU exp takes twice as long.

    Below -126 the result stays at 2**-126, which no sum of weights in [0, 1] can tell from zero.
    """
    x = jnp.maximum(x, -126.0)
    whole = jnp.round(x)
    fraction, power = x - whole, jnp.float32(0.00132647282)
    for coefficient in (0.00967151284, 0.0555073374, 0.240222421, 0.693146978, 1.0):
        power = power * fraction + coefficient
    bits = jax.lax.bitcast_convert_type(power, jnp.int32) + (whole.astype(jnp.int32) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
