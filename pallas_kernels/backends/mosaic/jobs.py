"""Which job a block of a Mosaic GPU kernel takes next."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref
from jaxtyping import Array

from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.layout import Layout


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Tiles of `rows` queries of every head and batch entry, those with text queries first."""

    layout: Layout
    rows: int
    heads: Scalar
    batch: int

    @property
    def tiles(self) -> int:
        return pl.cdiv(self.layout.length, self.rows)

    @property
    def text_tiles(self) -> int:
        text = self.layout.text
        return pl.cdiv(text.stop, self.rows) - text.start // self.rows if self.layout.num_text else 0

    @property
    def count(self) -> Scalar:
        return self.tiles * self.heads * self.batch

    def __call__(self, job: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """Its place in the order of heads, its batch entry and its first query."""
        of_text = self.text_tiles * self.heads * self.batch
        is_text = job < of_text
        rest = jnp.where(is_text, job, job - of_text)
        tiles = jnp.where(is_text, jnp.int32(max(self.text_tiles, 1)), jnp.int32(max(self.tiles - self.text_tiles, 1)))
        tile, pair = lax.rem(rest, tiles), lax.div(rest, tiles)
        text_at, visual_at = (0, self.text_tiles) if self.layout.text_first else (self.tiles - self.text_tiles, 0)
        first = (tile + jnp.where(is_text, jnp.int32(text_at), jnp.int32(visual_at))) * self.rows
        return lax.div(pair, jnp.int32(self.batch)), lax.rem(pair, jnp.int32(self.batch)), first

    def each(self, body: Callable[[Scalar, Array], Array], following: Callable[[Scalar], Scalar]) -> None:
        """Run `body` on each job of this block. It gets the steps of the ring before it, and returns those after.

        The first job is known to all; `following` gives the next, by how many it has given before.
        """

        def run(state: tuple[Scalar, Scalar, Array]) -> tuple[Scalar, Scalar, Array]:
            job, given, passed = state
            passed = body(job, passed)
            return following(given), given + 1, passed

        start = lax.axis_index("blocks"), jnp.int32(0), jnp.int32(0)
        lax.while_loop(lambda state: state[0] < self.count, run, start)


SLOTS = 2
"""Jobs of which a block knows: the one that its warpgroups compute, and the next, whose keys are on their way."""


class Queue(NamedTuple):
    """Numbers of the jobs of a block, from the warpgroup that fetches to those that compute.

    A block draws a number when it has fetched all of its last job, from a counter that all blocks share. Jobs differ in
    length, and blocks with long jobs take fewer. Dealt out in turn, narrow heads took 1.05 to 1.36 times as long
    (benchmarks/results/leave_out_h100.json).
    """

    numbers: Ref
    posted: Ref
    free: Ref

    def post(self, given: Scalar, counter: Ref, interpret: bool) -> Scalar:
        slot = lax.rem(given, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.free.at[slot])
        if interpret:  # has no atomic addition: the numbers are dealt out
            blocks = lax.axis_size("blocks")
            self.numbers[slot] = lax.axis_index("blocks") + (given + 1) * blocks
        else:
            _draw(counter, self.numbers.at[slot], first=lax.axis_size("blocks"))
        plgpu.barrier_arrive(self.posted.at[slot])
        plgpu.barrier_wait(self.posted.at[slot])
        return self.numbers[slot]

    def read(self, given: Scalar) -> Scalar:
        slot = lax.rem(given, jnp.int32(SLOTS))
        plgpu.barrier_wait(self.posted.at[slot])
        number = self.numbers[slot]
        plgpu.barrier_arrive(self.free.at[slot])
        return number


def _draw(counter: Ref, number: Ref, first: int) -> None:
    """`number` becomes the next that no block has, `first` the first of them. Relaxed, as it orders nothing else: with
    the fence of MLIR's own `memref.atomic_rmw`, full heads took 1.03 to 1.05 times as long (H100, FLUX)."""

    def draw(_: object, counter: ir.Value, number: ir.Value) -> None:
        i32 = ir.IntegerType.get_signless(32)
        one, taken = (arith.constant(i32, value) for value in (1, first))
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            relaxed = llvm.AtomicOrdering.monotonic
            pointer = mgpu.utils.memref_ptr(counter)
            drawn = llvm.atomicrmw(llvm.AtomicBinOp.add, pointer, one, relaxed, syncscope="device")
            memref.store(arith.addi(drawn, taken), number, [])

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(draw)(counter, number)
