"""Arrow attention under every window of a list in one pass, as a Pallas kernel on the Mosaic GPU backend.

A job takes one tile of queries of one head. It visits text keys first, then ring after ring of visual keys outwards
from the diagonal. After each ring, what it has so far is the output under that ring's window. A tile that holds text
queries and visual ones walks the rings of the visual ones. Its text queries have seen every key after the last.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends.base import Problem
from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.backends.mosaic import block
from pallas_kernels.backends.mosaic.block import KEYS, ROWS, Running, Work, across
from pallas_kernels.backends.mosaic.jobs import Jobs
from pallas_kernels.layout import Layout
from pallas_kernels.mask import EVERYTHING, Band, IntArray, Segment, band, cut_text, ring, steps, tile_at


def nested_arrow_attention(
    problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
) -> Float[Array, "W+1 B T N H"]:
    q, layout = problem.q, problem.layout
    batch, _, heads, dim = q.shape
    jobs = Jobs(layout, block.warpgroups(dim, interpret) * ROWS, heads, batch)
    windows = jnp.append(half_windows, jnp.int32(EVERYTHING))
    lengths = [] if problem.text_length is None else [problem.text_length]
    body = partial(_attend, jobs=jobs, count=len(windows), is_padded=bool(lengths), interpret=interpret)
    outputs = jax.ShapeDtypeStruct((len(windows), *q.shape), q.dtype)
    name = "nested_arrow_attention_mosaic"
    call = block.kernel(body, jobs, q.dtype, dim, name, interpret, out_type=outputs)
    out = call(windows, *lengths, q, problem.k, problem.v)
    text = layout.text
    mixed = (
        slice(text.stop // jobs.rows * jobs.rows, text.stop)
        if layout.text_first
        else slice(text.start, min(pl.cdiv(text.start, jobs.rows) * jobs.rows, text.stop))
    )
    of_all_keys = jnp.broadcast_to(out[-1, :, mixed], out[:-1, :, mixed].shape)
    return out.at[:-1, :, mixed].set(of_all_keys)


class Edges(NamedTuple):
    """Steps of a ring that need a mask: text at its end, if `text_steps`, then visual keys on the ring's edges."""

    segments: tuple[Segment, ...]
    text_steps: IntArray
    left_steps: IntArray
    """Steps after those of text. They keep the ring's keys on the left of the diagonal, the rest on its right."""
    inner: IntArray
    """The inner window. -1: there is none, and the ring has one side, from edge to edge."""
    outer: IntArray
    text_stop: IntArray
    """Where text ends that is no padding."""


class Rings:
    """The keys of one job, ring after ring; text comes with the first."""

    def __init__(self, layout: Layout, rows: int, first: Scalar, windows: Ref, num_text: Scalar | int):
        last = first + rows - 1
        self.layout, self.windows, self.num_text = layout, windows, num_text
        self.is_text = (last < layout.visual.start) | (first >= layout.visual.stop)
        self.first = first - layout.visual.start
        self.band = partial(band, self.first, last - layout.visual.start, num_visual=layout.num_visual, keys=KEYS)

    def __call__(self, index: Scalar) -> tuple[tuple[Segment, ...], Edges]:
        """Steps without and with masks. Text queries see everything in the first ring and nothing in those after."""
        inner, outer = self.windows[jnp.maximum(index - 1, 0)], self.windows[index]
        inner, outer = (jnp.where(self.is_text, jnp.int32(EVERYTHING), window) for window in (inner, outer))
        kept, before = self.band(half_window=outer), self.band(half_window=inner)
        before = Band(*(jnp.where(index == 0, kept.inner_start, edge) for edge in before))
        here = ring(before, kept)
        # Tiles that both inner edges cut count for both sides: an interval is one comparison, a ring would be two.
        right = jnp.clip((self.first + inner + 1) // KEYS, before.start, before.stop)
        masked = *here.masked[:2], (right, before.stop), here.masked[3]
        whole, ragged = cut_text(self.num_text, KEYS)
        text = self.layout.text.start
        whole_steps, ragged_steps = (jnp.where(index == 0, jnp.int32(n), 0) for n in (whole, ragged))
        clean, masked = (
            (of_text, *(Segment(self.layout.visual.start + start * KEYS, stop - start) for start, stop in ranges))
            for of_text, ranges in (
                (Segment(text, whole_steps), here.clean),
                (Segment(text + whole * KEYS, ragged_steps), masked),
            )
        )
        inner = jnp.where(index == 0, jnp.int32(-1), inner)
        return clean, Edges(masked, ragged_steps, steps(masked[1:3]), inner, outer, text + self.num_text)


def _attend(
    windows: Ref, *refs: Any, jobs: Jobs, count: int, is_padded: bool, interpret: bool
) -> tuple[Jobs, Work, Work]:
    lengths, (q, k, v, out, shared) = refs[:is_padded], refs[is_padded:]
    layout = jobs.layout

    def rings_of(first: Scalar, b: Scalar) -> Rings:
        return Rings(layout, jobs.rows, first, windows, lengths[0][b] if lengths else layout.num_text)

    def compute(number: Scalar, passed: Array) -> Array:
        warpgroup = lax.axis_index("warpgroup")
        head, b, first = jobs(number)
        first_row, queries = first + warpgroup * ROWS, shared.queries.tiles.at[warpgroup]
        plgpu.barrier_wait(shared.queries.filled.at[warpgroup])
        rings = rings_of(first, b)
        attend = partial(block.attend_tile, queries=queries, ring=shared.ring, interpret=interpret)

        def attend_ring(index: Scalar, carry: tuple[Running, Array]) -> tuple[Running, Array]:
            running, passed = carry
            clean, edges = rings(index)

            def masked(step: Scalar, running: Running) -> Running:
                return attend(running, step=passed + step, kept=partial(_kept, layout, first_row, edges, step))

            running = lax.fori_loop(
                jnp.int32(0), steps(clean), lambda step, running: attend(running, step=passed + step), running
            )
            passed = passed + steps(clean)
            running = lax.fori_loop(jnp.int32(0), steps(edges.segments), masked, running)
            block.store(running.output, shared.staging.at[warpgroup], out.at[index], b, first_row, head, interpret)
            return running, passed + steps(edges.segments)

        start = block.nothing(queries.shape[0]), passed
        passed = lax.fori_loop(jnp.int32(0), jnp.int32(count), attend_ring, start)[1]
        plgpu.barrier_arrive(shared.queries.free.at[warpgroup])
        return passed

    def fetch(number: Scalar, passed: Array) -> Array:
        head, b, first = jobs(number)
        rings = rings_of(first, b)

        def fetch_ring(index: Scalar, passed: Array) -> Array:
            clean, edges = rings(index)
            segments = *clean, *edges.segments

            @pl.loop(jnp.int32(0), steps(segments))
            def ahead(step: Scalar) -> None:
                shared.ring.send(k, v, b, head, tile_at(step, segments, KEYS), passed + step, interpret)

                @pl.when((index == 0) & (step == 0))
                def queries():
                    shared.queries.send(q, b, head, first, interpret)

            return passed + steps(segments)

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), fetch_ring, passed)

    return jobs, compute, fetch


def _kept(layout: Layout, first_row: Scalar, edges: Edges, step: Scalar) -> Bool[Array, "64 128"]:
    first_key, inner, outer, stop = tile_at(step, edges.segments, KEYS), edges.inner, edges.outer, layout.visual.stop
    is_left = step < edges.text_steps + edges.left_steps
    low = jnp.where(is_left | (inner < 0), -outer, inner + 1)
    high = jnp.where(is_left & (inner >= 0), -inner - 1, outer)
    if isinstance(edges.text_stop, jax.Array) or layout.num_text % KEYS:
        of_text = step < edges.text_steps
        low, high = jnp.where(of_text, jnp.int32(-EVERYTHING), low), jnp.where(of_text, jnp.int32(EVERYTHING), high)
        stop = jnp.where(of_text, jnp.int32(edges.text_stop), jnp.int32(stop))
    rows = block.rows_from(first_row - first_key)
    least, most = rows + low, jnp.minimum(rows + high, stop - 1 - first_key)
    count = jnp.maximum(most - least + 1, 0).astype(jnp.uint32)
    return (block.key_index() - across(least, KEYS)).astype(jnp.uint32) < across(count, KEYS)
