"""Arrow attention under every window of a list in one pass, as a Pallas kernel on the Triton backend.

A program takes one tile of queries of one head. It visits text keys first, then ring after ring of visual keys outwards
from the diagonal. After each ring, what it has so far is the output under that ring's window. Tiles that lie in a ring
as a whole need no mask. Those on its edges do, and both of the rings that share them visit them.
"""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.base import Problem
from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.backends.triton.softmax import Running, attend_tile, nothing, queries
from pallas_kernels.backends.triton.tiles import Tiles
from pallas_kernels.layout import Layout
from pallas_kernels.mask import EVERYTHING, Band, IntArray, Segment, band, cut_text, ring, steps, tile_at

WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def nested_arrow_attention(
    problem: Problem[Array], half_windows: Int[Array, " W"], tiles: Tiles, *, interpret: bool
) -> Float[Array, "W+1 B T N H"]:
    q, layout = problem.q, problem.layout
    windows = jnp.append(half_windows, jnp.int32(EVERYTHING))
    lengths = [] if problem.text_length is None else [problem.text_length]
    return pl.pallas_call(
        partial(
            _attend,
            layout=layout,
            tiles=tiles,
            scale=q.shape[-1] ** -0.5,
            is_padded=bool(lengths),
            inline_asm=not interpret,
        ),
        grid=(pl.cdiv(layout.num_text, tiles.rows) + pl.cdiv(layout.num_visual, tiles.rows), q.shape[0], q.shape[2]),
        in_specs=[WHOLE] * (4 + len(lengths)),
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((len(windows), *q.shape), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="nested_arrow_attention",
    )(windows, *lengths, q, problem.k, problem.v)


def _attend(
    windows: Ref, *refs: Ref, layout: Layout, tiles: Tiles, scale: float, is_padded: bool, inline_asm: bool
) -> None:
    lengths, (q, k, v, out) = refs[:is_padded], refs[is_padded:]
    text_tiles = pl.cdiv(layout.num_text, tiles.rows)
    program, b, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    is_text = program < text_tiles
    mine = queries(layout, is_text, jnp.where(is_text, program, program - text_tiles), tiles.rows)
    q_tile = plgpu.load(q.at[b, pl.ds(mine.first, tiles.rows), head, :], mask=mine.exist, other=0.0)
    attend = partial(attend_tile, q=q_tile, scale=scale * math.log2(math.e), inline_asm=inline_asm)

    def tile(ref: Ref, first: Scalar) -> Ref:
        return ref.at[b, pl.ds(first, tiles.keys), head, :]

    def clean(segments: tuple[Segment, ...], step: Scalar, running: Running) -> Running:
        first = tile_at(step, segments, tiles.keys)
        return attend(running, k=plgpu.load(tile(k, first)), v=plgpu.load(tile(v, first)))

    def masked(
        segments: tuple[Segment, ...], stop: IntArray, inner: Scalar, outer: Scalar, step: Scalar, running: Running
    ) -> Running:
        first = tile_at(step, segments, tiles.keys)
        keys = first + jnp.arange(tiles.keys, dtype=jnp.int32)
        exist = keys < stop
        keys = jnp.where(exist, keys, jnp.int32(2 * EVERYTHING - 1))  # out of every window
        distance = jnp.abs(mine.rows[:, None] - keys[None, :])
        k_tile, v_tile = (plgpu.load(tile(ref, first), mask=exist[:, None], other=0.0) for ref in (k, v))
        return attend(running, k=k_tile, v=v_tile, kept=(distance > inner) & (distance <= outer))

    def visual(ranges: Iterable[tuple[IntArray, IntArray]]) -> tuple[Segment, ...]:
        return tuple(Segment(layout.visual.start + start * tiles.keys, stop - start) for start, stop in ranges)

    def attend_ring(index: Scalar, running: Running) -> Running:
        """Text queries see everything in the first ring and nothing in those after."""
        inner, outer = windows[jnp.maximum(index - 1, 0)], windows[index]
        inner, outer = (jnp.where(is_text, jnp.int32(EVERYTHING), window) for window in (inner, outer))
        of_rows = partial(band, mine.tile * tiles.rows, mine.tile * tiles.rows + tiles.rows - 1)
        kept = of_rows(outer, layout.num_visual, tiles.keys)
        before = Band(
            *(jnp.where(index == 0, kept.inner_start, n) for n in of_rows(inner, layout.num_visual, tiles.keys))
        )
        inner = jnp.where(index == 0, jnp.int32(-1), inner)
        here = ring(before, kept)
        running = lax.fori_loop(0, steps(visual(here.clean)), partial(clean, visual(here.clean)), running)
        edges = partial(masked, visual(here.masked), layout.visual.stop, inner, outer)
        running = lax.fori_loop(0, steps(visual(here.masked)), edges, running)
        result = (running.values / running.total[:, None]).astype(out.dtype)
        plgpu.store(out.at[index, b, pl.ds(mine.first, tiles.rows), head, :], result, mask=mine.exist)
        return running

    running = nothing(tiles.rows, q.shape[-1])
    num_text = lengths[0][b] if lengths else layout.num_text
    whole, ragged = cut_text(num_text, tiles.keys)
    text = (Segment(layout.text.start, whole),)
    running = lax.fori_loop(0, whole, partial(clean, text), running)
    if lengths or ragged:
        text = (Segment(layout.text.start + whole * tiles.keys, 1),)
        edge = partial(masked, text, layout.text.start + num_text, -1, EVERYTHING)
        running = lax.fori_loop(0, ragged, edge, running)
    lax.fori_loop(0, len(windows), attend_ring, running)
