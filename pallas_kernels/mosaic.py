"""Arrow attention as a Pallas kernel on the Mosaic GPU backend, for Hopper: TMA, wgmma and warp specialisation.

A block takes 128 queries of one head: two warpgroups compute 64 of them each, a third one fetches keys and values into a
ring in shared memory. Keys are walked as in the "triton" kernel: text, the band's left edge, its inside without masks,
its right edge. A block that holds a text query walks every key.

Shared memory holds each tile as columns of 64 (128 bytes, one swizzle), so that a copy is a plain box of the
[B, T, N, H] array: Mosaic's tiled copies would need lengths and starts that are multiples of 8, and SD3 has 4,429 tokens.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .layout import CACHED, FULL, Layout
from .mask import EVERYTHING, UNSEEN, band

ROWS = 64
"""Queries of one warpgroup: what one wgmma takes."""

COLUMNS = 64
"""16-bit values of one swizzled row of shared memory."""

KEYS, STAGES = 128, 2
"""Keys of one step, and steps that the ring holds. On an H200, 64 keys with 2 or 4 stages were slower at every size."""

ROW, MATRIX = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA


def arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_window: Int[Array, " N"],
    layout: Layout,
    cache: Float[Array, "*L B T N H"] | None,
    layer: Int[Array, ""] | None,
    head_order: Int[Array, " N"] | None,
    *,
    interpret: bool,
) -> Float[Array, "*L B T N H"]:
    batch, length, heads, _ = q.shape
    order = jnp.arange(heads, dtype=jnp.int32) if head_order is None else head_order
    out = jax.new_ref(jnp.full(q.shape, jnp.nan, q.dtype) if cache is None else cache)
    entry = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    plgpu.kernel(
        partial(_allocate, layout=layout, stacked=layer is not None, interpret=interpret),
        out_type=(),
        grid=(heads, batch, pl.cdiv(length, 2 * ROWS)),
        grid_names=("heads", "batch", "tiles"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="arrow_attention_mosaic",
    )(entry, order, half_window, q, k, v, out)
    return out[...]


def _allocate(entry, order, half_window, q, k, v, out, *, layout: Layout, stacked: bool, interpret: bool):
    columns = q.shape[-1] // COLUMNS

    def tiles(count: int, rows: int) -> Any:
        if interpret:
            return plgpu.SMEM((count, columns, rows, COLUMNS), q.dtype)
        cut = count, columns, rows // 8, 1, 8, COLUMNS
        return plgpu.SMEM(cut, q.dtype, transforms=(plgpu.SwizzleTransform(128),))

    filled, free = plgpu.Barrier(num_arrivals=columns, num_barriers=STAGES), plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    kernel = partial(_attend, layout=layout, stacked=stacked, interpret=interpret)
    pl.run_scoped(
        partial(kernel, entry, order, half_window, q, k, v, out),
        (tiles(2, ROWS), tiles(STAGES, KEYS), tiles(STAGES, KEYS)),
        (plgpu.Barrier(num_arrivals=columns, num_barriers=2), filled, filled),
        (free, free),
        collective_axes="warpgroup",
    )


def flat(tile: Any, interpret: bool) -> Any:
    """A tile [R/8, 1, 8, 64] as [R, 64], for copies."""
    return tile if interpret else tile.reshape(tile.shape[0] * 8, COLUMNS)


def matrix(tile: Any, interpret: bool) -> Any:
    """The same, for wgmma."""
    if interpret:
        return tile
    return dataclasses.replace(tile, transforms=(*tile.transforms, plgpu.TilingTransform((8, COLUMNS)).undo(None)))


class Walk:
    """The key tiles of one block: steps [0, clean) of whole text tiles, masks until `inner_start`, none until
    `inner_stop`, masks until `stop`."""

    def __init__(self, layout: Layout, first: Any, window: Any):
        text, visual = layout.text, layout.visual
        last = first + 2 * ROWS - 1
        some = (first < text.stop) & (last >= text.start)
        every = (first >= text.start) & (last < text.stop)
        window = jnp.where(some, jnp.int32(EVERYTHING), window)
        seen = band(first - visual.start, last - visual.start, window, layout.num_visual, KEYS)
        mixed = some & jnp.logical_not(every)
        self.text_start, self.visual_start = text.start, visual.start
        self.whole, ragged = divmod(layout.num_text, KEYS)
        self.text_steps = self.whole + (ragged > 0)
        self.skipped = seen.start
        inner_start, inner_stop = (
            jnp.where(mixed, seen.stop, edge) for edge in (seen.inner_start, seen.inner_stop)
        )
        self.inner_start, self.inner_stop, self.stop = (
            self.text_steps + edge - seen.start for edge in (inner_start, inner_stop, seen.stop)
        )

    def first_key(self, step: Any) -> Any:
        text = self.text_start + step * KEYS
        return jnp.where(
            step < self.text_steps, text, self.visual_start + (step - self.text_steps + self.skipped) * KEYS
        )


def _attend(entry, order, half_window, q, k, v, out, tiles, filled, free, *, layout: Layout, stacked: bool, interpret):
    b, warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
    head = order[lax.axis_index("heads")]
    window = half_window[head]
    tile = lax.axis_index("tiles")
    first = (tile if layout.text_first else pl.cdiv(layout.length, 2 * ROWS) - 1 - tile) * (2 * ROWS)
    width = jnp.where(window == FULL, jnp.int32(EVERYTHING), window)
    walk = Walk(layout, first, width)
    target = out.at[entry[0]] if stacked else out

    def fetch(source, row, rows, to, barrier):
        for column in range(q.shape[-1] // COLUMNS):
            box = source.at[b, pl.ds(row, rows), head, pl.ds(column * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(box, flat(to.at[column], interpret), barrier)

    @pl.when((warpgroup < 2) & (window != CACHED))
    def compute():
        plgpu.set_max_registers(232, action="increase")
        mine = tiles[0].at[warpgroup]
        row = first + warpgroup * ROWS
        fetch(q, row, ROWS, mine, filled[0].at[warpgroup])
        plgpu.barrier_wait(filled[0].at[warpgroup])
        values = _softmax(mine, tiles, filled, free, walk, row, width, layout, interpret)
        for column, value in enumerate(values):
            to = mine.at[column]
            if interpret:
                to[...] = value.astype(q.dtype)
            else:
                matrix(to, interpret)[...] = value.astype(q.dtype)
        plgpu.commit_smem()
        for column in range(len(values)):
            box = target.at[b, pl.ds(row, ROWS), head, pl.ds(column * COLUMNS, COLUMNS)]
            plgpu.copy_smem_to_gmem(flat(mine.at[column], interpret), box)
        plgpu.wait_smem_to_gmem(0)

    @pl.when((warpgroup == 2) & (window != CACHED))
    def load():
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(jnp.int32(0), walk.stop)
        def ahead(step):
            slot = lax.rem(step, jnp.int32(STAGES))
            for source, to, here, done in zip((k, v), tiles[1:], filled[1:], free, strict=True):

                @pl.when(step >= STAGES)
                def until_read(done=done):
                    plgpu.barrier_wait(done.at[slot])

                fetch(source, walk.first_key(step), KEYS, to.at[slot], here.at[slot])

        @pl.loop(jnp.maximum(walk.stop - STAGES, 0), walk.stop)
        def drain(step):
            """A block must not end with a phase of a barrier that nobody has seen."""
            for done in free:
                plgpu.barrier_wait(done.at[lax.rem(step, jnp.int32(STAGES))])


def _softmax(queries, tiles, filled, free, walk: Walk, row, width, layout: Layout, interpret) -> list[Array]:
    """What 64 queries get, in columns of 64."""
    columns = queries.shape[0]
    scale = math.log2(math.e) / math.sqrt(columns * COLUMNS)
    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + row
    is_text = (rows >= layout.text.start) & (rows < layout.text.stop)
    reach = jnp.where(is_text, jnp.int32(EVERYTHING), width)

    def across(x: Array, size: int) -> Array:
        return lax.broadcast_in_dim(x, (ROWS, size), [0])

    def step(at, running, masked):
        values, highest, total = running
        slot = lax.rem(at, jnp.int32(STAGES))
        k_tile, v_tile = (tile.at[slot] for tile in tiles[1:])
        plgpu.barrier_wait(filled[1].at[slot])

        def scores_of(acc):
            for column in range(columns):
                plgpu.wgmma(acc, matrix(queries.at[column], interpret), matrix(k_tile.at[column], interpret).transpose((1, 0)))
            return acc[...]

        scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, KEYS), jnp.float32))
        plgpu.barrier_arrive(free[0].at[slot])
        if masked:
            start = walk.first_key(at)
            of_text = at < walk.text_steps
            stop = jnp.where(of_text, jnp.int32(layout.text.stop), jnp.int32(layout.visual.stop))
            far = jnp.where(of_text, jnp.int32(EVERYTHING), reach)
            least = rows - far
            most = jnp.minimum(rows + far, stop - 1)
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)
            offset = (keys - across(least - start, KEYS)).astype(jnp.uint32)
            scores = jnp.where(offset <= across((most - least).astype(jnp.uint32), KEYS), scores, UNSEEN)
        new = jnp.maximum(highest, scores.max(axis=1) * scale)
        decay = jnp.exp2(highest - new)
        weights = jnp.exp2(scores * scale - across(new, KEYS))
        total = total * decay + weights.sum(axis=1)
        weights = weights.astype(queries.dtype)
        values = [value * across(decay, COLUMNS) for value in values]
        plgpu.barrier_wait(filled[2].at[slot])
        if interpret:  # has no wgmma with an operand in registers
            exact = weights.astype(jnp.float32)
            values = [value + jnp.dot(exact, v_tile[i].astype(jnp.float32)) for i, value in enumerate(values)]
        else:

            def add(accumulators):
                for column, acc in enumerate(accumulators):
                    plgpu.wgmma(acc, weights, matrix(v_tile.at[column], interpret))

            values = pl.run_state(add)([plgpu.ACC.init(value) for value in values])
        plgpu.barrier_arrive(free[1].at[slot])
        return values, new, total

    def constant(shape, value, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    running = (
        [constant((ROWS, COLUMNS), 0, MATRIX) for _ in range(columns)],
        constant((ROWS,), UNSEEN, ROW),
        constant((ROWS,), 0, ROW),
    )
    clean, masked = partial(step, masked=False), partial(step, masked=True)
    running = lax.fori_loop(jnp.int32(0), jnp.int32(walk.whole), clean, running)
    running = lax.fori_loop(jnp.int32(walk.whole), walk.inner_start, masked, running)
    running = lax.fori_loop(walk.inner_start, walk.inner_stop, clean, running)
    values, _, total = lax.fori_loop(walk.inner_stop, walk.stop, masked, running)
    return [value / across(total, COLUMNS) for value in values]
