"""What the Mosaic GPU kernels share: the warpgroups of a block, their shared memory, and a step of online softmax.

Shared memory holds each tile as columns of 64 (128 bytes, one swizzle). So a copy is a plain box of the [B, T, N, H]
array. Mosaic's tiled copies would need lengths and starts that are multiples of 8, and SD3 has 4,429 tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.backends.mosaic.jobs import SLOTS, Jobs, Queue
from pallas_kernels.mask import UNSEEN

ROWS = 64
"""Queries of one warpgroup: what one wgmma takes."""

COLUMNS = 64
"""16-bit values of one swizzled row of shared memory."""

KEYS, STAGES = 128, 2
"""Keys of one step, and steps that the ring holds. At a head_dim of 64, four steps gained nothing (H100)."""

COMPUTE = {64: 3, 128: 2}
"""Warpgroups that compute, by head_dim: as many as their registers allow. At 64, two took 1.18 to 1.24 times as long
for full and mixed heads at 2048 px (H100). For narrow heads, two took 0.96 to 1.08 times as long. At 128, barriers by
which the two take turns at the tensor cores (FlashAttention-3's ping-pong) took 1.01 to 1.03 times as long as none."""

INTERPRETED = 2
"""Instead, in interpret mode: there each warpgroup waits in a thread of XLA's pool, which has one for each core, or in
the caller's. Three computing and one that fetches starve on two cores (jax 0.11.2)."""

REGISTERS = {2: (240, 24), 3: (160, 32)}
"""Registers of a thread that computes and of a thread that fetches, by the number of warpgroups that compute.
A multiprocessor has 64 K."""

BLOCKS = 132
"""Multiprocessors of an H100 or H200; one block fills one. Right on any other count, if not as well spread."""

VECTOR, MATRIX = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA


Work = Callable[[Scalar, Array], Array]
"""Does one job. It gets the job's number and the steps of the ring before it, and returns the steps after it."""


class TileRing(NamedTuple):
    """Tiles of keys and values in shared memory, with a pair of barriers for each: filled, and free again."""

    tiles: tuple[Ref, Ref]
    filled: tuple[Ref, Ref]
    free: tuple[Ref, Ref]

    def send(self, k: Ref, v: Ref, b: Scalar, head: Scalar, first_key: Scalar, step: Scalar, interpret: bool) -> None:
        """Fetch one tile of each, once its slot is free."""
        slot = lax.rem(step, jnp.int32(STAGES))
        for source, to, filled, free in zip((k, v), *self, strict=True):
            plgpu.barrier_wait(free.at[slot])
            fetch(source, b, first_key, KEYS, head, to.at[slot], filled.at[slot], interpret)


class Queries(NamedTuple):
    """A tile of 64 queries in shared memory for each warpgroup that computes."""

    tiles: Ref
    filled: Ref
    free: Ref

    def send(self, q: Ref, b: Scalar, head: Scalar, first: Scalar, interpret: bool) -> None:
        """Fetch each, once the last job is done with it."""
        for i in range(self.tiles.shape[0]):
            plgpu.barrier_wait(self.free.at[i])
            fetch(q, b, first + i * ROWS, ROWS, head, self.tiles.at[i], self.filled.at[i], interpret)


class Shared(NamedTuple):
    """Memory that the warpgroups of a block share.

    The warpgroup that fetches works ahead, as far as the others have read. At the start these say that all is free.
    """

    queries: Queries
    ring: TileRing
    queue: Queue
    staging: Ref
    """A tile of 64 rows of output for each warpgroup that computes."""

    def specialize(self, jobs: Jobs, compute: Work, fetch: Work, counter: Ref, interpret: bool) -> None:
        """Run all jobs of this block, each warpgroup its part of them."""
        computing, warpgroup = self.queries.tiles.shape[0], lax.axis_index("warpgroup")

        @pl.when(warpgroup < computing)
        def compute_all():
            plgpu.set_max_registers(REGISTERS[computing][0], action="increase")
            for barrier in (self.queries.free.at[warpgroup], *self._read_by_all):
                plgpu.barrier_arrive(barrier)
            jobs.each(compute, self.queue.read)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == computing)
        def fetch_all():
            plgpu.set_max_registers(REGISTERS[computing][1], action="decrease")
            jobs.each(fetch, partial(self.queue.post, counter=counter, interpret=interpret))
            # A block must not end with a phase of a barrier that nobody has seen.
            for barrier in (*(self.queries.free.at[i] for i in range(computing)), *self._read_by_all):
                plgpu.barrier_wait(barrier)

    @property
    def _read_by_all(self) -> Iterator[Ref]:
        """The barriers by which all warpgroups that compute say that they have read something."""
        for free in self.ring.free:
            yield from (free.at[slot] for slot in range(STAGES))
        yield from (self.queue.free.at[slot] for slot in range(SLOTS))


def kernel(
    body: Callable[..., tuple[Jobs, Work, Work]],
    jobs: Jobs,
    dtype: DTypeLike,
    dim: int,
    name: str,
    interpret: bool,
    out_type: Any,
) -> Callable[..., Any]:
    """A call of `body(*refs, shared)` by every warpgroup of every block. It says which jobs there are, and what
    computing and fetching warpgroups do for one. Both get its number and the steps of the ring before it, and return
    those after."""
    columns, computing = dim // COLUMNS, jobs.rows // ROWS

    def tiles(count: int, rows: int) -> Any:
        if interpret:
            return plgpu.SMEM((count, columns, rows, COLUMNS), dtype)
        cut = count, columns, rows // 8, 1, 8, COLUMNS
        return plgpu.SMEM(cut, dtype, transforms=(plgpu.SwizzleTransform(128),))

    def barriers(arrivals: int, count: int) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    def run(counter: Ref, *refs: Ref, shared: Shared) -> None:
        shared.specialize(*body(*refs, shared), counter, interpret)

    def allocate(*refs: Ref) -> None:
        filled, free = barriers(columns, STAGES), barriers(computing, STAGES)
        pl.run_scoped(
            lambda queries, ring, queue, staging: run(
                *refs, shared=Shared(Queries(*queries), TileRing(*ring), Queue(*queue), staging)
            ),
            (tiles(computing, ROWS), barriers(columns, computing), barriers(1, computing)),
            ((tiles(STAGES, KEYS), tiles(STAGES, KEYS)), (filled, filled), (free, free)),
            (plgpu.SMEM((SLOTS,), jnp.int32), barriers(1, SLOTS), barriers(computing, SLOTS)),
            tiles(computing, ROWS),
            collective_axes="warpgroup",
        )

    call = plgpu.kernel(
        allocate,
        out_type=out_type,
        grid=(min(2 if interpret else BLOCKS, int(jobs.count)),),
        grid_names=("blocks",),
        num_threads=computing + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,  # pyright: ignore[reportAttributeAccessIssue] not in 0.10.2
        kernel_name=name,
    )
    return lambda *args: call(jax.new_ref(jnp.zeros(1, jnp.int32)), *args)


def warpgroups(dim: int, interpret: bool) -> int:
    """Number of warpgroups of a block that compute."""
    return INTERPRETED if interpret else COMPUTE[dim]


def flat(tile: Ref, interpret: bool) -> Ref:
    """A tile [R/8, 1, 8, C] as [R, C], for copies."""
    return tile if interpret else tile.reshape(tile.shape[0] * 8, tile.shape[-1])


def matrix(tile: Ref, interpret: bool) -> Ref:
    """A tile [R/8, 1, 8, C] as [R, C], for wgmma."""
    if interpret:
        return tile
    untile = plgpu.TilingTransform((8, tile.shape[-1])).undo(None)  # pyright: ignore[reportArgumentType] it reads no type
    return dataclasses.replace(tile, transforms=(*tile.transforms, untile))


def fetch(
    source: Ref, b: Scalar, first_row: Scalar, rows: int, head: Scalar, to: Ref, barrier: Ref, interpret: bool
) -> None:
    for column in range(to.shape[0]):
        box = source.at[b, pl.ds(first_row, rows), head, pl.ds(column * COLUMNS, COLUMNS)]
        plgpu.copy_gmem_to_smem(box, flat(to.at[column], interpret), barrier)


def store(
    values: list[Array], tile: Ref, target: Ref, b: Scalar, first_row: Scalar, head: Scalar, interpret: bool
) -> None:
    """Write 64 rows of output through shared memory.

    It does not wait for its own copy, but for the last one, which reads the same tile of shared memory.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for column, value in enumerate(values):
        matrix(tile.at[column], interpret)[...] = value.astype(target.dtype)
    plgpu.commit_smem()
    for column in range(len(values)):
        box = target.at[b, pl.ds(first_row, ROWS), head, pl.ds(column * COLUMNS, COLUMNS)]
        plgpu.copy_smem_to_gmem(flat(tile.at[column], interpret), box)


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
    return Running(zeros, constant((ROWS,), UNSEEN, VECTOR), constant((ROWS, 8), 0.0, MATRIX))


def rows_from(first_row: Scalar) -> Int[Array, "64"]:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=VECTOR) + first_row


def key_index() -> Int[Array, "64 128"]:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=MATRIX)


def across(x: Array, size: int) -> Array:
    return lax.broadcast_in_dim(x, (ROWS, size), [0])


def attend_tile(
    running: Running,
    queries: Ref,
    ring: TileRing,
    step: Int[Array, ""],
    interpret: bool,
    kept: Callable[[], Bool[Array, "64 128"]] | None = None,
) -> Running:
    """One more tile of keys, the ring's `step`."""
    columns = queries.shape[0]
    scale = math.log2(math.e) / math.sqrt(columns * COLUMNS)
    slot = lax.rem(step.astype(jnp.uint32), jnp.uint32(STAGES)).astype(jnp.int32)
    k_tile, v_tile = (tile.at[slot] for tile in ring.tiles)
    plgpu.barrier_wait(ring.filled[0].at[slot])

    def scores_of(acc: Ref) -> Array:
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

        def add(acc: Ref) -> None:
            for column in range(columns):
                part = acc.at[:, pl.ds(column * COLUMNS, COLUMNS)]
                plgpu.wgmma(part, weights, matrix(v_tile.at[column], interpret))

        values: Any = pl.run_state(add)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(ring.free[1].at[slot])
    return Running(values, highest, totals)
