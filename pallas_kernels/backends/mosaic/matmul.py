"""Products of 8-bit operands on Hopper: TMA, wgmma and warp specialisation, with scales and activation in registers.

Both operands have their sums along the last axis. The layer of a stack of weights is read where it lies. The grid is as
large as the GPU, and a block takes one tile of output after the other. One warpgroup fetches both operands' pieces into
a ring in shared memory. The others multiply 64 rows each, and write their tile while the next pieces come. A second
pair of operands goes on with the same sums: a concatenation along the last axis without the copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.backends.mosaic.block import BLOCKS, COLUMNS, REGISTERS, ROWS, VECTOR, flat, matrix
from pallas_kernels.backends.product import Product, finished

DEPTH = 128
"""8-bit values of one swizzled row of shared memory: how far along the sums one piece goes."""

ACROSS = plgpu.Layout.WGMMA.reduce(0)
"""The layout of a vector along the columns of a product."""


class Tiles(NamedTuple):
    """How a block cuts its product.

    warpgroups: that multiply, 64 rows each.
    columns: of a tile of output.
    stages: pieces that the ring holds.
    cluster: neighbouring blocks along the rows, which share the weights' pieces by multicast.
    """

    warpgroups: int
    columns: int
    stages: int
    cluster: int = 1

    @property
    def rows(self) -> int:
        return self.warpgroups * ROWS


TABLE = (Tiles(3, 192, 4, cluster=2), Tiles(2, 128, 6))
"""The first whose columns divide the product's is taken. Of 11 tiles of a sketch on an H200, 192 x 192 were the fastest
at four shapes of FLUX.1-dev, by 2 to 8 %. Tiles of 128 x 128 were 4 to 9 % slower (docs: quantization)."""

INTERPRETED = Tiles(2, 128, 2)
"""In interpret mode, whose warpgroups wait in threads: more starve on two cores."""

WALK = 8
"""Tiles of rows that blocks walk together, so that the weights' pieces stay in the second-level cache."""


def tiles_for(columns: int, interpret: bool = False) -> Tiles:
    return INTERPRETED if interpret else next(tiles for tiles in TABLE if columns % tiles.columns == 0)


class Ring(NamedTuple):
    """Pieces of both operands in shared memory, with a pair of barriers for each: filled, and free again."""

    x: Ref
    w: Ref
    filled: Ref
    free: Ref

    def slot(self, step: Scalar) -> Scalar:
        return lax.rem(step, jnp.int32(self.x.shape[0]))


@dataclass(frozen=True)
class Cut:
    """A product's tiles, and how they are dealt to the blocks: in turn, as all take as long.

    down, across: tiles along rows (by clusters) and along columns.
    steps: pieces along the sums.
    """

    tiles: Tiles
    down: int
    across: int
    blocks: int
    steps: int

    @classmethod
    def of(cls, product: Product[Any], interpret: bool) -> "Cut":
        tiles = tiles_for(product.columns, interpret)
        down, across = pl.cdiv(product.x.shape[0], tiles.rows * tiles.cluster), product.columns // tiles.columns
        blocks = min(2 if interpret else BLOCKS // tiles.cluster, down * across)
        return cls(tiles, down, across, blocks, sum(x.shape[1] for x, _ in product.pairs) // DEPTH)

    @property
    def jobs(self) -> Scalar:
        """How many this block has."""
        return lax.div(self.down * self.across - lax.axis_index("blocks") + self.blocks - 1, jnp.int32(self.blocks))

    def each(self, work: Callable[[Scalar, Scalar, Scalar], None]) -> None:
        """Run `work` on each job of this block: its first row and column, and the steps of the ring before it."""
        peer = lax.axis_index("cluster") if self.tiles.cluster > 1 else jnp.int32(0)

        def job(i: Scalar, passed: Scalar) -> Scalar:
            number = lax.axis_index("blocks") + i * self.blocks
            m, n = plgpu.planar_snake(number, (self.down, self.across), 0, WALK)
            work((m * self.tiles.cluster + peer) * self.tiles.rows, n * self.tiles.columns, passed)
            return passed + self.steps

        lax.fori_loop(jnp.int32(0), self.jobs, job, jnp.int32(0))


def quantized_matmul(product: Product[Array], *, interpret: bool) -> Float[Array, "M E"]:
    cut = Cut.of(product, interpret)
    rows = product.x.shape[0]
    padded = cut.down * cut.tiles.cluster * cut.tiles.rows  # the last tile reads as many scales
    vectors = {"row": jnp.pad(product.row_scale, (0, padded - rows)), "column": product.column_scale}
    vectors |= {} if product.bias is None else {"bias": product.bias}
    vectors |= {} if product.out_scale is None else {"out": jnp.pad(1 / product.out_scale, (0, padded - rows))}
    heads = {} if product.heads is None else {"heads": product.heads}
    return _multiplied(product.layer[None], product.pairs, vectors, heads, cut, product.abstract, interpret)


@partial(jax.jit, static_argnames=("cut", "product", "interpret"))
def _multiplied(
    layer: Int[Array, "1"],
    pairs: tuple[tuple[Array, Array], ...],
    vectors: dict[str, Array],
    heads: dict[str, Array],
    cut: Cut,
    product: Product[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Float[Array, "M E"]:
    """Jitted: a program lowers the kernel once for each shape. FLUX.1-dev's planned loop lowers 31 Mosaic kernels so,
    in place of 55. Under a profiler that took 28 s, in place of 48."""
    tiles = cut.tiles
    call = plgpu.kernel(
        partial(_work, cut=cut, product=product, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((product.x.shape[0], product.columns), product.out_dtype),
        scratch_types=_scratch(cut, product, interpret),
        grid=(cut.blocks,),
        grid_names=("blocks",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,  # pyright: ignore[reportAttributeAccessIssue] not in 0.10.2
        kernel_name="quantized_matmul_mosaic",
        **({"cluster": (tiles.cluster,), "cluster_names": ("cluster",)} if tiles.cluster > 1 else {}),
    )
    return call(layer, pairs, vectors, heads)


def _scratch(cut: Cut, product: Product[Any], interpret: bool) -> dict[str, Any]:
    """Shared memory, by the names of `_work`."""
    tiles = cut.tiles

    def memory(*lead: int, rows: int, columns: int, dtype: DTypeLike) -> Any:
        if interpret:
            return plgpu.SMEM((*lead, rows, columns), dtype)
        swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
        return plgpu.SMEM((*lead, rows // 8, 1, 8, columns), dtype, transforms=(swizzle,))

    free: dict[str, Any] = {"num_arrivals": tiles.warpgroups, "num_barriers": tiles.stages}
    return {
        "ring": Ring(
            memory(tiles.stages, tiles.warpgroups, rows=ROWS, columns=DEPTH, dtype=product.x.dtype),
            memory(tiles.stages, rows=tiles.columns, columns=DEPTH, dtype=product.x.dtype),
            plgpu.Barrier(
                num_arrivals=tiles.warpgroups + tiles.columns // _box(product, tiles), num_barriers=tiles.stages
            ),
            plgpu.ClusterBarrier(collective_axes=("cluster",), **free) if tiles.cluster > 1 else plgpu.Barrier(**free),
        ),
        "staging": memory(tiles.warpgroups, rows=ROWS, columns=COLUMNS, dtype=product.out_dtype),
    }


def _box(product: Product[Any], tiles: Tiles) -> int:
    """Rows of the weights that lie together, and are fetched at once."""
    return tiles.columns if product.heads is None else gcd(product.head_dim, tiles.columns)


def _work(
    layer: Ref,
    pairs: tuple[tuple[Ref, Ref], ...],
    vectors: dict[str, Ref],
    heads: dict[str, Ref],
    out: Ref,
    *,
    ring: Ring,
    staging: Ref,
    cut: Cut,
    product: Product[Any],
    interpret: bool,
) -> None:
    """What every warpgroup of every block does."""
    tiles, warpgroup, entry = cut.tiles, lax.axis_index("warpgroup"), layer[0]
    weight_row = partial(_weight_row, heads=heads, size=product.head_dim)

    @pl.when(warpgroup < tiles.warpgroups)
    def multiply_all():
        plgpu.set_max_registers(REGISTERS[tiles.warpgroups][0], action="increase")

        def job(first_row: Scalar, first_column: Scalar, passed: Scalar) -> None:
            total = _sums(ring, warpgroup, passed, cut, product.x.dtype, interpret)
            row = first_row + warpgroup * ROWS
            for start in range(0, tiles.columns, COLUMNS):
                column = first_column + start
                values = total[:, start : start + COLUMNS]
                values = _finished(values, row, weight_row(column), vectors, entry, product)
                _store(values, staging.at[warpgroup], out, row, column, interpret)

        cut.each(job)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == tiles.warpgroups)
    def fetch_all():
        plgpu.set_max_registers(REGISTERS[tiles.warpgroups][1], action="decrease")
        box = _box(product, tiles)

        def job(first_row: Scalar, first_column: Scalar, passed: Scalar) -> None:
            start = passed
            for x, w in pairs:
                steps = x.shape[1] // DEPTH
                starts = [weight_row(first_column + i) for i in range(0, tiles.columns, box)]
                _fetch(ring, x, w.at[entry], first_row, starts, box, start, steps, cut, interpret)
                start = start + steps

        cut.each(job)
        # A block must not end with a phase of a barrier that nobody has seen.
        done = cut.jobs * cut.steps
        lax.fori_loop(
            jnp.maximum(done - tiles.stages, 0),
            done,
            lambda step, _: plgpu.barrier_wait(ring.free.at[ring.slot(step)]),
            None,
        )


def _weight_row(column: Scalar, *, heads: dict[str, Ref], size: int) -> Scalar:
    """The row of the weights that makes a column of the output: another one where heads are named."""
    if not heads:
        return column
    return heads["heads"][lax.div(column, jnp.int32(size))] * size + lax.rem(column, jnp.int32(size))


def _fetch(
    ring: Ring,
    x: Ref,
    w: Ref,
    first_row: Scalar,
    starts: list[Scalar],
    box: int,
    passed: Scalar,
    steps: int,
    cut: Cut,
    interpret: bool,
) -> None:
    """Fill the ring with the pieces of one pair of operands.

    starts: rows of the weights, at which boxes of `box` rows begin.
    """
    share: dict[str, Any] = {"collective_axes": "cluster"} if cut.tiles.cluster > 1 else {}

    @pl.loop(jnp.int32(0), jnp.int32(steps))
    def ahead(k: Scalar) -> None:
        step, along = passed + k, pl.ds(k * DEPTH, DEPTH)
        slot = ring.slot(step)

        @pl.when(step >= cut.tiles.stages)
        def taken():
            plgpu.barrier_wait(ring.free.at[slot])

        for i in range(cut.tiles.warpgroups):
            rows = x.at[pl.ds(first_row + i * ROWS, ROWS), along]
            plgpu.copy_gmem_to_smem(rows, flat(ring.x.at[slot, i], interpret), ring.filled.at[slot])
        for i, start in enumerate(starts):
            unit = 1 if interpret else 8
            to = ring.w.at[slot, pl.ds(i * box // unit, box // unit)]
            rows = w.at[pl.ds(start, box), along]
            plgpu.copy_gmem_to_smem(rows, flat(to, interpret), ring.filled.at[slot], **share)


def _sums(ring: Ring, warpgroup: Scalar, passed: Scalar, cut: Cut, dtype: DTypeLike, interpret: bool) -> Array:
    """One warpgroup's 64 rows of the tile, without scales: float32, or int32 of integers.

    A slot is given back when the product after it has begun: two are always in flight.
    """

    def multiply(total: Ref) -> Array:
        @pl.loop(jnp.int32(0), jnp.int32(cut.steps))
        def along(k: Scalar) -> None:
            step = passed + k
            slot = ring.slot(step)
            plgpu.barrier_wait(ring.filled.at[slot])
            x, w = matrix(ring.x.at[slot, warpgroup], interpret), matrix(ring.w.at[slot], interpret)
            plgpu.wgmma(total, x, w.transpose((1, 0)))
            plgpu.wgmma_wait(1)

            @pl.when(k >= 1)
            def give_back():
                plgpu.barrier_arrive(ring.free.at[ring.slot(step - 1)])

        return total[...]

    exact = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32
    total = pl.run_scoped(multiply, plgpu.ACC((ROWS, cut.tiles.columns), exact))
    plgpu.barrier_arrive(ring.free.at[ring.slot(passed + cut.steps - 1)])
    return total


def _finished(
    values: Array, row: Scalar, first: Scalar, vectors: dict[str, Ref], entry: Scalar, product: Product[Any]
) -> Array:
    """Scales, bias and activation of 64 rows of some columns. first: the weights' row that made the first column."""
    shape, columns = values.shape, pl.ds(first, values.shape[1])

    def load(part: Ref, layout: Any, axis: int) -> Array:
        vector = plgpu.load(part, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue] 0.10.2 wants an index
        return lax.broadcast_in_dim(vector.astype(jnp.float32), shape, [axis])

    values = values.astype(jnp.float32) * load(vectors["row"].at[pl.ds(row, ROWS)], VECTOR, 0)
    values = values * load(vectors["column"].at[entry, columns], ACROSS, 1)
    if "bias" in vectors:
        values = values + load(vectors["bias"].at[entry, columns], ACROSS, 1)
    return finished(values, product, load(vectors["out"].at[pl.ds(row, ROWS)], VECTOR, 0) if "out" in vectors else None)


def _store(values: Array, tile: Ref, out: Ref, row: Scalar, column: Scalar, interpret: bool) -> None:
    """Write 64 rows of some columns through shared memory, once its last copy has read it."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    matrix(tile, interpret)[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(flat(tile, interpret), out.at[pl.ds(row, ROWS), pl.ds(column, COLUMNS)])
