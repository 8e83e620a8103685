"""Arrow attention as a Pallas kernel on the Mosaic GPU backend, for Hopper: TMA, wgmma and warp specialisation.

The grid is as large as the GPU, and a block takes one job after the other: a tile of queries of one head. Some
warpgroups compute 64 of these queries each; one more fetches keys and values into a ring in shared memory, for the next
job already while the last one ends. A job walks its keys as in the "triton" kernel: text, the band's left edge, its
inside without masks, its right edge. Jobs that hold text queries walk every key; all heads' come first.

Shared memory holds each tile as columns of 64 (128 bytes, one swizzle), so that a copy is a plain box of the
[B, T, N, H] array: Mosaic's tiled copies would need lengths and starts that are multiples of 8, and SD3 has 4,429
tokens.
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
"""Keys of one step, and steps that the ring holds. At a head_dim of 64, four steps gained nothing (H100)."""

COMPUTE = {64: 3, 128: 2}
"""Warpgroups that compute, by head_dim: as many as their registers allow. At 64, two took 1.22 to 1.29 times as long
for full and mixed heads at 2048 px (H100), and 0.96 to 1.02 times for narrow ones. Interpret mode does not end with
three in blocks of more than one job (jax 0.11.2): it gets two."""

REGISTERS = {2: (240, 24), 3: (160, 32)}
"""Of a thread that computes and of one that fetches, by the number of warpgroups that compute; 64 K in all."""

BLOCKS = 132
"""Multiprocessors of an H100 or H200; one block fills one. Right on any other count, if not as well spread."""

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
    batch, _, heads, dim = q.shape
    compute = 2 if interpret else COMPUTE[dim]
    jobs = Jobs(layout, compute * ROWS, heads, batch)
    order = jnp.arange(heads, dtype=jnp.int32) if head_order is None else head_order
    out = jax.new_ref(jnp.full(q.shape, jnp.nan, q.dtype) if cache is None else cache)
    entry = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    plgpu.kernel(
        partial(_allocate, jobs=jobs, stacked=layer is not None, interpret=interpret),
        out_type=(),
        grid=(min(2 if interpret else BLOCKS, jobs.count),),
        grid_names=("blocks",),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,  # pyright: ignore[reportAttributeAccessIssue] not in 0.10.2
        kernel_name="arrow_attention_mosaic",
    )(entry, order, half_window, q, k, v, out)
    return out[...]


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Tiles of `rows` queries of every head and batch entry, those with text queries first."""

    layout: Layout
    rows: int
    heads: int
    batch: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.layout.length, self.rows)

    @property
    def text_tiles(self) -> int:
        text = self.layout.text
        return pl.cdiv(text.stop, self.rows) - text.start // self.rows if self.layout.num_text else 0

    @property
    def count(self) -> int:
        return self.tiles * self.heads * self.batch

    def __call__(self, job: Any) -> tuple[Any, Any, Any]:
        """Its place in the order of heads, its batch entry and its first query."""
        of_text = self.text_tiles * self.heads * self.batch
        is_text = job < of_text
        rest = jnp.where(is_text, job, job - of_text)
        tiles = jnp.where(is_text, jnp.int32(max(self.text_tiles, 1)), jnp.int32(max(self.tiles - self.text_tiles, 1)))
        tile, pair = lax.rem(rest, tiles), lax.div(rest, tiles)
        text_at, visual_at = (0, self.text_tiles) if self.layout.text_first else (self.tiles - self.text_tiles, 0)
        first = (tile + jnp.where(is_text, jnp.int32(text_at), jnp.int32(visual_at))) * self.rows
        return lax.div(pair, jnp.int32(self.batch)), lax.rem(pair, jnp.int32(self.batch)), first


def _allocate(entry, order, half_window, q, k, v, out, *, jobs: Jobs, stacked: bool, interpret: bool):
    columns, compute = q.shape[-1] // COLUMNS, jobs.rows // ROWS

    def tiles(count: int, rows: int) -> Any:
        if interpret:
            return plgpu.SMEM((count, columns, rows, COLUMNS), q.dtype)
        cut = count, columns, rows // 8, 1, 8, COLUMNS
        return plgpu.SMEM(cut, q.dtype, transforms=(plgpu.SwizzleTransform(128),))

    filled = plgpu.Barrier(num_arrivals=columns, num_barriers=STAGES)
    free = plgpu.Barrier(num_arrivals=compute, num_barriers=STAGES)
    kernel = partial(_attend, jobs=jobs, stacked=stacked, interpret=interpret)
    pl.run_scoped(
        partial(kernel, entry, order, half_window, q, k, v, out),
        (tiles(compute, ROWS), tiles(STAGES, KEYS), tiles(STAGES, KEYS)),
        (plgpu.Barrier(num_arrivals=columns, num_barriers=compute), filled, filled),
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
    untile = plgpu.TilingTransform((8, COLUMNS)).undo(None)  # pyright: ignore[reportArgumentType] it reads no type
    return dataclasses.replace(tile, transforms=(*tile.transforms, untile))


class Walk:
    """The key tiles of one job: `whole` steps of text without masks, masks until `inner_start`, none until
    `inner_stop`, masks until `stop`."""

    def __init__(self, layout: Layout, rows: int, first: Any, window: Any):
        text, visual = layout.text, layout.visual
        last = first + rows - 1
        some = (first < text.stop) & (last >= text.start)
        every = (first >= text.start) & (last < text.stop)
        window = jnp.where(some, jnp.int32(EVERYTHING), window)
        seen = band(first - visual.start, last - visual.start, window, layout.num_visual, KEYS)
        mixed = some & jnp.logical_not(every)
        self.text_start, self.visual_start = text.start, visual.start
        self.whole, ragged = divmod(layout.num_text, KEYS)
        self.text_steps = self.whole + (ragged > 0)
        self.skipped = seen.start
        inner_start, inner_stop = (jnp.where(mixed, seen.stop, edge) for edge in (seen.inner_start, seen.inner_stop))
        self.inner_start, self.inner_stop, self.stop = (
            self.text_steps + edge - seen.start for edge in (inner_start, inner_stop, seen.stop)
        )

    def first_key(self, step: Any) -> Any:
        text = self.text_start + step * KEYS
        return jnp.where(
            step < self.text_steps, text, self.visual_start + (step - self.text_steps + self.skipped) * KEYS
        )


def _attend(
    entry, order, half_window, q, k, v, out, tiles, filled, free, *, jobs: Jobs, stacked: bool, interpret: bool
):
    layout, compute, columns = jobs.layout, jobs.rows // ROWS, q.shape[-1] // COLUMNS
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("blocks")
    blocks = lax.axis_size("blocks")
    mine = lax.div(jobs.count - 1 - block, jnp.int32(blocks)) + 1
    target = out.at[entry[0]] if stacked else out

    def fetch(source, b, row, rows, head, to, barrier):
        for column in range(columns):
            box = source.at[b, pl.ds(row, rows), head, pl.ds(column * COLUMNS, COLUMNS)]
            plgpu.copy_gmem_to_smem(box, flat(to.at[column], interpret), barrier)

    def each(body):
        """Run `body` on this block's jobs. It gets the steps of the ring before the job, and returns those after."""

        def run(i, passed):
            place, b, first = jobs(block + i * blocks)
            head = order[place]
            window = half_window[head]
            width = jnp.where(window == FULL, jnp.int32(EVERYTHING), window)
            walk = Walk(layout, jobs.rows, first, width)
            steps = jnp.where(window == CACHED, 0, walk.stop)

            @pl.when(window != CACHED)
            def job():
                body(walk, passed, b, head, first, width)

            return passed + steps

        return lax.fori_loop(jnp.int32(0), mine, run, jnp.int32(0))

    @pl.when(warpgroup < compute)
    def compute_all():
        plgpu.set_max_registers(REGISTERS[compute][0], action="increase")
        queries, arrived = tiles[0].at[warpgroup], filled[0].at[warpgroup]

        def job(walk, passed, b, head, first, width):
            row = first + warpgroup * ROWS
            fetch(q, b, row, ROWS, head, queries, arrived)
            plgpu.barrier_wait(arrived)
            values = _softmax(queries, tiles, filled, free, walk, passed, row, width, layout, interpret)
            for column, value in enumerate(values):
                matrix(queries.at[column], interpret)[...] = value.astype(q.dtype)
            plgpu.commit_smem()
            for column in range(columns):
                box = target.at[b, pl.ds(row, ROWS), head, pl.ds(column * COLUMNS, COLUMNS)]
                plgpu.copy_smem_to_gmem(flat(queries.at[column], interpret), box)
            plgpu.wait_smem_to_gmem(0)

        each(job)

    @pl.when(warpgroup == compute)
    def fetch_all():
        plgpu.set_max_registers(REGISTERS[compute][1], action="decrease")

        def job(walk, passed, b, head, first, width):
            @pl.loop(jnp.int32(0), walk.stop)
            def ahead(step):
                slot = lax.rem(passed + step, jnp.int32(STAGES))
                for source, to, here, done in zip((k, v), tiles[1:], filled[1:], free, strict=True):

                    @pl.when(passed + step >= STAGES)
                    def until_read(done=done):
                        plgpu.barrier_wait(done.at[slot])

                    fetch(source, b, walk.first_key(step), KEYS, head, to.at[slot], here.at[slot])

        passed = each(job)

        @pl.loop(jnp.maximum(passed - STAGES, 0), passed)
        def drain(step):
            """A block must not end with a phase of a barrier that nobody has seen."""
            for done in free:
                plgpu.barrier_wait(done.at[lax.rem(step, jnp.int32(STAGES))])


def _softmax(queries, tiles, filled, free, walk: Walk, passed, row, width, layout: Layout, interpret) -> list[Array]:
    """What 64 queries get, in columns of 64."""
    columns = queries.shape[0]
    scale = math.log2(math.e) / math.sqrt(columns * COLUMNS)
    rows = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + row
    is_text = (rows >= layout.text.start) & (rows < layout.text.stop)
    reach = jnp.where(is_text, jnp.int32(EVERYTHING), width)

    def across(x: Array, size: int) -> Array:
        return lax.broadcast_in_dim(x, (ROWS, size), [0])

    least, most = rows - reach, jnp.minimum(rows + reach, layout.visual.stop - 1)
    ragged = walk.text_steps > walk.whole

    def step(at, running, masked):
        values, highest, total = running
        slot = lax.rem((passed + at).astype(jnp.uint32), jnp.uint32(STAGES)).astype(jnp.int32)
        k_tile, v_tile = (tile.at[slot] for tile in tiles[1:])
        plgpu.barrier_wait(filled[1].at[slot])

        def scores_of(acc):
            for column in range(columns):
                plgpu.wgmma(
                    acc, matrix(queries.at[column], interpret), matrix(k_tile.at[column], interpret).transpose((1, 0))
                )
            return acc[...]

        scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, KEYS), jnp.float32))
        plgpu.barrier_arrive(free[0].at[slot])
        if masked:
            start = walk.visual_start + (at - walk.text_steps + walk.skipped) * KEYS
            low, high = least, most
            if ragged:
                of_text = at < walk.text_steps
                start = jnp.where(of_text, walk.text_start + at * KEYS, start)
                low = jnp.where(of_text, jnp.int32(0), least)
                high = jnp.where(of_text, jnp.int32(layout.text.stop - 1), most)
            keys = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)
            offset = (keys - across(low - start, KEYS)).astype(jnp.uint32)
            scores = jnp.where(offset <= across((high - low).astype(jnp.uint32), KEYS), scores, UNSEEN)
        new = jnp.maximum(highest, scores.max(axis=1) * scale)
        decay = jnp.exp2(highest - new)
        weights = jnp.exp2(scores * scale - across(new, KEYS))
        eights = [weights[:, i : i + 8] for i in range(0, KEYS, 8)]  # summed within a thread; across threads at the end
        total = total * across(decay, 8) + sum(eights[1:], eights[0])
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
        constant((ROWS, 8), 0, MATRIX),
    )

    def half(of_band, running):
        """Up to the inside of the band, then from there: steps without masks, then with. One loop for both, as four
        in a row take more instructions a step (head_dim 128: 7.7 per score without masks instead of 7.5)."""
        start = jnp.where(of_band == 0, jnp.int32(0), walk.inner_start)
        edge = jnp.where(of_band == 0, jnp.int32(walk.whole), walk.inner_stop)
        stop = jnp.where(of_band == 0, walk.inner_start, walk.stop)
        running = lax.fori_loop(start, edge, partial(step, masked=False), running)
        return lax.fori_loop(edge, stop, partial(step, masked=True), running)

    values, _, total = lax.fori_loop(jnp.int32(0), jnp.int32(2), half, running)
    return [value / across(total.sum(axis=1), COLUMNS) for value in values]
