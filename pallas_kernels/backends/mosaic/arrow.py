"""Arrow attention as a Pallas kernel on the Mosaic GPU backend, for Hopper: TMA, wgmma and warp specialisation.

The grid is as large as the GPU, and a block takes one job after the other: a tile of queries of one head. Some
warpgroups compute 64 of these queries each. One more fetches keys and values into a ring in shared memory. While a job
ends, it fetches the next one's, with its queries. A job walks its keys as in the "triton" kernel: text, the
band's left edge, its inside without masks, its right edge. Jobs that hold text queries walk every key; all heads' come
first.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backends.base import Problem
from pallas_kernels.backends.kernel_types import Flag, Ref, Scalar
from pallas_kernels.backends.mosaic import block
from pallas_kernels.backends.mosaic.block import KEYS, ROWS, Running, Work, across
from pallas_kernels.backends.mosaic.jobs import Jobs
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import EVERYTHING, band, cut_text


def arrow_attention(problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
    q, cache, layer = problem.q, problem.cache, problem.layer
    batch, _, heads, dim = q.shape
    jobs = Jobs(problem.layout, block.warpgroups(dim, interpret) * ROWS, heads, batch)
    out = jax.new_ref(jnp.full(q.shape, jnp.nan, q.dtype) if cache is None else cache)
    entry = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    lengths = [] if problem.text_length is None else [problem.text_length]
    body = partial(_attend, jobs=jobs, stacked=layer is not None, is_padded=bool(lengths), interpret=interpret)
    call = block.kernel(body, jobs, q.dtype, dim, "arrow_attention_mosaic", interpret, out_type=())
    call(entry, problem.order, problem.windows, *lengths, q, problem.k, problem.v, out)
    return out[...]


class Walk:
    """The key tiles of one job: `whole` steps of text without masks, masks until `inner_start`, none until
    `inner_stop`, masks until `stop`."""

    def __init__(self, layout: Layout, rows: int, first: Scalar, window: Scalar, num_text: Scalar | int):
        text, visual = layout.text, layout.visual
        last = first + rows - 1
        has_text = (first < text.stop) & (last >= text.start)
        has_only_text = (last < visual.start) | (first >= visual.stop)
        window = jnp.where(has_text, jnp.int32(EVERYTHING), window)
        seen = band(first - visual.start, last - visual.start, window, layout.num_visual, KEYS)
        is_mixed = has_text & jnp.logical_not(has_only_text)
        self.text_start, self.visual_start = text.start, visual.start
        self.text_stop = text.start + num_text
        self.whole, ragged = cut_text(num_text, KEYS)
        self.text_steps = self.whole + ragged
        self.skipped = seen.start
        inner_start, inner_stop = (jnp.where(is_mixed, seen.stop, edge) for edge in (seen.inner_start, seen.inner_stop))
        self.inner_start, self.inner_stop, self.stop = (
            self.text_steps + edge - seen.start for edge in (inner_start, inner_stop, seen.stop)
        )

    def first_key(self, step: Scalar) -> Int[Array, ""]:
        text = self.text_start + step * KEYS
        return jnp.where(
            step < self.text_steps, text, self.visual_start + (step - self.text_steps + self.skipped) * KEYS
        )


def _attend(
    entry: Ref,
    order: Ref,
    half_window: Ref,
    *refs: Any,
    jobs: Jobs,
    stacked: bool,
    is_padded: bool,
    interpret: bool,
) -> tuple[Jobs, Work, Work]:
    lengths, (q, k, v, out, shared) = refs[:is_padded], refs[is_padded:]
    target = out.at[entry[0]] if stacked else out

    def unless_cached(body: Callable[..., None]) -> Work:
        def job(number: Scalar, passed: Array) -> Array:
            place, b, first = jobs(number)
            head = order[place]
            window = half_window[head]
            width = jnp.where(window == FULL, jnp.int32(EVERYTHING), window)
            walk = Walk(jobs.layout, jobs.rows, first, width, lengths[0][b] if lengths else jobs.layout.num_text)

            @pl.when(window != CACHED)
            def run():
                body(walk, passed, b, head, first, width)

            return passed + jnp.where(window == CACHED, 0, walk.stop)

        return job

    @unless_cached
    def compute(walk: Walk, passed: Array, b: Scalar, head: Scalar, first: Scalar, width: Scalar) -> None:
        warpgroup = lax.axis_index("warpgroup")
        first_row, queries = first + warpgroup * ROWS, shared.queries.tiles.at[warpgroup]
        plgpu.barrier_wait(shared.queries.filled.at[warpgroup])
        attend = partial(block.attend_tile, queries=queries, ring=shared.ring, interpret=interpret)
        running = _softmax(attend, walk, passed, first_row, width, jobs.layout, block.nothing(queries.shape[0]))
        plgpu.barrier_arrive(shared.queries.free.at[warpgroup])
        block.store(running.output, shared.staging.at[warpgroup], target, b, first_row, head, interpret)

    @unless_cached
    def fetch(walk: Walk, passed: Array, b: Scalar, head: Scalar, first: Scalar, width: Scalar) -> None:
        @pl.loop(jnp.int32(0), walk.stop)
        def ahead(step: Scalar) -> None:
            shared.ring.send(k, v, b, head, walk.first_key(step), passed + step, interpret)

            @pl.when(step == 0)  # not before: the last job still needs its queries, but not all of the ring
            def queries():
                shared.queries.send(q, b, head, first, interpret)

    jobs = dataclasses.replace(jobs, heads=_computed(order, half_window))
    return jobs, compute, fetch


def _computed(order: Ref, half_window: Ref) -> Int[Array, ""]:
    """How many heads there are up to the last, in order, that is not cached."""

    def is_cached(place: Int[Array, ""]) -> Flag:
        return (place >= 0) & (half_window[order[jnp.maximum(place, 0)]] == CACHED)

    last = jnp.int32(order.shape[0] - 1)
    state = lax.while_loop(
        lambda state: state[1], lambda state: (state[0] - 1, is_cached(state[0] - 1)), (last, is_cached(last))
    )
    return state[0] + 1


def _softmax(
    attend: Callable[..., Running],
    walk: Walk,
    passed: Array,
    first_row: Scalar,
    width: Scalar,
    layout: Layout,
    running: Running,
) -> Running:
    """The softmax of one warpgroup's 64 queries over all key tiles of a walk."""
    rows = block.rows_from(first_row)
    is_text = (rows >= layout.text.start) & (rows < layout.text.stop)
    reach = jnp.where(is_text, jnp.int32(EVERYTHING), width)
    least, most = rows - reach, jnp.minimum(rows + reach, layout.visual.stop - 1)

    def clean(step: Scalar, running: Running) -> Running:
        return attend(running, step=passed + step)

    def masked(step: Scalar, running: Running) -> Running:
        def kept() -> Bool[Array, "64 128"]:
            start = walk.visual_start + (step - walk.text_steps + walk.skipped) * KEYS
            low, high = least, most
            if isinstance(walk.whole, jax.Array) or walk.text_steps > walk.whole:
                of_text = step < walk.text_steps
                start = jnp.where(of_text, walk.text_start + step * KEYS, start)
                low = jnp.where(of_text, jnp.int32(0), least)
                high = jnp.where(of_text, jnp.int32(walk.text_stop - 1), most)
            offset = (block.key_index() - across(low - start, KEYS)).astype(jnp.uint32)
            return offset <= across((high - low).astype(jnp.uint32), KEYS)

        return attend(running, step=passed + step, kept=kept)

    def half(of_band: Scalar, running: Running) -> Running:
        """Up to the inside of the band, then from there: steps without masks, then with. One loop for both, as four
        in a row take more instructions a step (head_dim 128: 7.7 per score without masks instead of 7.5)."""
        start = jnp.where(of_band == 0, jnp.int32(0), walk.inner_start)
        edge = jnp.where(of_band == 0, jnp.int32(walk.whole), walk.inner_stop)
        stop = jnp.where(of_band == 0, walk.inner_start, walk.stop)
        running = lax.fori_loop(start, edge, clean, running)
        return lax.fori_loop(edge, stop, masked, running)

    return lax.fori_loop(jnp.int32(0), jnp.int32(2), half, running)
