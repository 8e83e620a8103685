"""What the Mosaic GPU kernels share: their shared memory, the jobs of a persistent grid, and a step of online softmax.

Shared memory holds each tile as columns of 64 (128 bytes, one swizzle), so that a copy is a plain box of the
[B, T, N, H] array: Mosaic's tiled copies would need lengths and starts that are multiples of 8, and SD3 has 4,429
tokens.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from .layout import Layout
from .mask import UNSEEN

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

    def of_block(self, body: Callable[[Any, Any], Any]) -> Any:
        """Run `body` on each job of this block. It gets the steps of the ring before it, and returns those after."""
        block, blocks = lax.axis_index("blocks"), lax.axis_size("blocks")
        mine = lax.div(self.count - 1 - block, jnp.int32(blocks)) + 1
        return lax.fori_loop(jnp.int32(0), mine, lambda i, passed: body(block + i * blocks, passed), jnp.int32(0))


class Ring(NamedTuple):
    """Tiles of keys and values in shared memory, with a pair of barriers for each: filled, and free again."""

    tiles: tuple[Any, Any]
    filled: tuple[Any, Any]
    free: tuple[Any, Any]

    def send(self, k: Any, v: Any, b: Any, head: Any, first_key: Any, step: Any, interpret: bool) -> None:
        """Fetch one tile of each, once its slot is free."""
        slot = lax.rem(step, jnp.int32(STAGES))
        for source, to, filled, free in zip((k, v), *self, strict=True):

            @pl.when(step >= STAGES)
            def until_read(free=free):
                plgpu.barrier_wait(free.at[slot])

            fetch(source, b, first_key, KEYS, head, to.at[slot], filled.at[slot], interpret)

    def drain(self, passed: Any) -> None:
        """A block must not end with a phase of a barrier that nobody has seen."""

        @pl.loop(jnp.maximum(passed - STAGES, 0), passed)
        def wait(step):
            for free in self.free:
                plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(STAGES))])


def kernel(
    body: Callable,
    jobs: Jobs,
    dtype: DTypeLike,
    dim: int,
    name: str,
    interpret: bool,
    *,
    tiles_of_rows: int,
    out_type: Any,
) -> Any:
    """A call of `body(*refs, tiles, arrived, ring)` by each warpgroup of each block; `jobs.rows // ROWS` compute.

    `tiles` are so many tiles of 64 rows for each of them in shared memory, `arrived` a barrier for each.
    """
    columns, compute = dim // COLUMNS, jobs.rows // ROWS

    def tiles(count: int, rows: int) -> Any:
        if interpret:
            return plgpu.SMEM((count, columns, rows, COLUMNS), dtype)
        cut = count, columns, rows // 8, 1, 8, COLUMNS
        return plgpu.SMEM(cut, dtype, transforms=(plgpu.SwizzleTransform(128),))

    filled = plgpu.Barrier(num_arrivals=columns, num_barriers=STAGES)
    free = plgpu.Barrier(num_arrivals=compute, num_barriers=STAGES)

    def allocate(*refs):
        pl.run_scoped(
            lambda rows, arrived, *ring: body(*refs, rows, arrived, Ring(*ring)),
            tuple(tiles(compute, ROWS) for _ in range(tiles_of_rows)),
            plgpu.Barrier(num_arrivals=columns, num_barriers=compute),
            (tiles(STAGES, KEYS), tiles(STAGES, KEYS)),
            (filled, filled),
            (free, free),
            collective_axes="warpgroup",
        )

    return plgpu.kernel(
        allocate,
        out_type=out_type,
        grid=(min(2 if interpret else BLOCKS, jobs.count),),
        grid_names=("blocks",),
        num_threads=compute + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,  # pyright: ignore[reportAttributeAccessIssue] not in 0.10.2
        kernel_name=name,
    )


def warpgroups(dim: int, interpret: bool) -> int:
    """That compute."""
    return 2 if interpret else COMPUTE[dim]


def flat(tile: Any, interpret: bool) -> Any:
    """A tile [R/8, 1, 8, 64] as [R, 64], for copies."""
    return tile if interpret else tile.reshape(tile.shape[0] * 8, COLUMNS)


def matrix(tile: Any, interpret: bool) -> Any:
    """The same, for wgmma."""
    if interpret:
        return tile
    untile = plgpu.TilingTransform((8, COLUMNS)).undo(None)  # pyright: ignore[reportArgumentType] it reads no type
    return dataclasses.replace(tile, transforms=(*tile.transforms, untile))


def fetch(source: Any, b: Any, row: Any, rows: int, head: Any, to: Any, barrier: Any, interpret: bool) -> None:
    for column in range(to.shape[0]):
        box = source.at[b, pl.ds(row, rows), head, pl.ds(column * COLUMNS, COLUMNS)]
        plgpu.copy_gmem_to_smem(box, flat(to.at[column], interpret), barrier)


def store(values: list[Array], tile: Any, target: Any, b: Any, row: Any, head: Any, interpret: bool) -> None:
    """Through shared memory, which is free again on return."""
    for column, value in enumerate(values):
        matrix(tile.at[column], interpret)[...] = value.astype(target.dtype)
    plgpu.commit_smem()
    for column in range(len(values)):
        box = target.at[b, pl.ds(row, ROWS), head, pl.ds(column * COLUMNS, COLUMNS)]
        plgpu.copy_smem_to_gmem(flat(tile.at[column], interpret), box)
    plgpu.wait_smem_to_gmem(0)


class Running(NamedTuple):
    """Softmax of the keys so far."""

    values: Float[Array, "64 H"]
    highest: Float[Array, "64"]
    totals: Float[Array, "64 8"]
    """Sums within a thread: across threads only at the end, which saves four shuffles a step."""

    @property
    def output(self) -> list[Array]:
        columns = self.values.shape[1] // COLUMNS
        values = self.values / across(self.totals.sum(axis=1), self.values.shape[1])
        return [values[:, i * COLUMNS : (i + 1) * COLUMNS] for i in range(columns)]


def nothing(columns: int) -> Running:
    def constant(shape: tuple[int, ...], value: float, layout: Any) -> Array:
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    zeros = constant((ROWS, columns * COLUMNS), 0.0, MATRIX)
    return Running(zeros, constant((ROWS,), UNSEEN, ROW), constant((ROWS, 8), 0.0, MATRIX))


def rows_from(row: Any) -> Int[Array, "64"]:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + row


def key_index() -> Int[Array, "64 128"]:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)


def across(x: Array, size: int) -> Array:
    return lax.broadcast_in_dim(x, (ROWS, size), [0])


def attend_tile(
    running: Running,
    queries: Any,
    ring: Ring,
    step: Any,
    interpret: bool,
    kept: Callable[[], Bool[Array, "64 128"]] | None = None,
) -> Running:
    """One more tile of keys, the ring's `step`."""
    columns = queries.shape[0]
    scale = math.log2(math.e) / math.sqrt(columns * COLUMNS)
    slot = lax.rem(step.astype(jnp.uint32), jnp.uint32(STAGES)).astype(jnp.int32)
    k_tile, v_tile = (tile.at[slot] for tile in ring.tiles)
    plgpu.barrier_wait(ring.filled[0].at[slot])

    def scores_of(acc):
        for column in range(columns):
            q_column, k_column = (matrix(tile.at[column], interpret) for tile in (queries, k_tile))
            plgpu.wgmma(acc, q_column, k_column.transpose((1, 0)))
        return acc[...]

    scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, KEYS), jnp.float32))
    plgpu.barrier_arrive(ring.free[0].at[slot])
    if kept is not None:
        scores = jnp.where(kept(), scores, UNSEEN)
    highest = jnp.maximum(running.highest, scores.max(axis=1) * scale)
    decay = jnp.exp2(running.highest - highest)
    weights = jnp.exp2(scores * scale - across(highest, KEYS))
    eights = [weights[:, i : i + 8] for i in range(0, KEYS, 8)]
    totals = running.totals * across(decay, 8) + sum(eights[1:], eights[0])
    weights = weights.astype(queries.dtype)
    values = running.values * across(decay, columns * COLUMNS)
    plgpu.barrier_wait(ring.filled[1].at[slot])
    if interpret:  # has no wgmma with an operand in registers
        exact = weights.astype(jnp.float32)
        values += jnp.concatenate([jnp.dot(exact, v_tile[i].astype(jnp.float32)) for i in range(columns)], axis=1)
    else:

        def add(acc):
            for column in range(columns):
                part = acc.at[:, pl.ds(column * COLUMNS, COLUMNS)]
                plgpu.wgmma(part, weights, matrix(v_tile.at[column], interpret))

        values: Any = pl.run_state(add)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(ring.free[1].at[slot])
    return Running(values, highest, totals)
