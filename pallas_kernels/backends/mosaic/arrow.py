"""Arrow attention as a Pallas kernel on the Mosaic GPU backend, for Hopper: TMA, wgmma and warp specialisation.

The grid is as large as the GPU, and a block takes one job after the other: a tile of queries of one head. Some
warpgroups compute 64 of these queries each; one more fetches keys and values into a ring in shared memory, and those of
the next job, with its queries, while the last one ends. A job walks its keys as in the "triton" kernel: text, the
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
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.mosaic import block as common
from pallas_kernels.backends.mosaic.block import KEYS, ROWS, Running, across
from pallas_kernels.backends.mosaic.jobs import Jobs
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import EVERYTHING, band


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
    jobs = Jobs(layout, common.warpgroups(dim, interpret) * ROWS, heads, batch)
    order = jnp.arange(heads, dtype=jnp.int32) if head_order is None else head_order
    out = jax.new_ref(jnp.full(q.shape, jnp.nan, q.dtype) if cache is None else cache)
    entry = jnp.zeros(1, jnp.int32) if layer is None else layer[None]
    body = partial(_attend, jobs=jobs, stacked=layer is not None, interpret=interpret)
    call = common.kernel(body, jobs, q.dtype, dim, "arrow_attention_mosaic", interpret, out_type=())
    call(entry, order, half_window, q, k, v, out)
    return out[...]


class Walk:
    """The key tiles of one job: `whole` steps of text without masks, masks until `inner_start`, none until
    `inner_stop`, masks until `stop`."""

    def __init__(self, layout: Layout, rows: int, first: Any, window: Any):
        text, visual = layout.text, layout.visual
        last = first + rows - 1
        some = (first < text.stop) & (last >= text.start)
        every = (last < visual.start) | (first >= visual.stop)
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


def _attend(entry, order, half_window, q, k, v, out, shared, *, jobs: Jobs, stacked: bool, interpret: bool):
    target = out.at[entry[0]] if stacked else out

    def unless_cached(body: Callable[..., None]) -> Callable[[Any, Any], Any]:
        def job(number, passed):
            place, b, first = jobs(number)
            head = order[place]
            window = half_window[head]
            width = jnp.where(window == FULL, jnp.int32(EVERYTHING), window)
            walk = Walk(jobs.layout, jobs.rows, first, width)

            @pl.when(window != CACHED)
            def run():
                body(walk, passed, b, head, first, width)

            return passed + jnp.where(window == CACHED, 0, walk.stop)

        return job

    @unless_cached
    def compute(walk, passed, b, head, first, width):
        warpgroup = lax.axis_index("warpgroup")
        row, queries = first + warpgroup * ROWS, shared.queries.tiles.at[warpgroup]
        plgpu.barrier_wait(shared.queries.filled.at[warpgroup])
        attend = partial(common.attend_tile, queries=queries, ring=shared.ring, interpret=interpret)
        running = _softmax(attend, walk, passed, row, width, jobs.layout, common.nothing(queries.shape[0]))
        plgpu.barrier_arrive(shared.queries.free.at[warpgroup])
        common.store(running.output, shared.staging.at[warpgroup], target, b, row, head, interpret)

    @unless_cached
    def fetch(walk, passed, b, head, first, width):
        @pl.loop(jnp.int32(0), walk.stop)
        def ahead(step):
            shared.ring.send(k, v, b, head, walk.first_key(step), passed + step, interpret)

            @pl.when(step == 0)  # not before: the last job still needs its queries, but not all of the ring
            def queries():
                shared.queries.send(q, b, head, first, interpret)

    jobs = dataclasses.replace(jobs, heads=_computed(order, half_window))
    return jobs, compute, fetch


def _computed(order: Any, half_window: Any) -> Any:
    """How many heads there are up to the last, in order, that is not cached."""

    def is_cached(place):
        return (place >= 0) & (half_window[order[jnp.maximum(place, 0)]] == CACHED)

    last = jnp.int32(order.shape[0] - 1)
    state = lax.while_loop(
        lambda state: state[1], lambda state: (state[0] - 1, is_cached(state[0] - 1)), (last, is_cached(last))
    )
    return state[0] + 1


def _softmax(attend: Any, walk: Walk, passed: Any, row: Any, width: Any, layout: Layout, running: Running) -> Running:
    """What 64 queries get."""
    rows = common.rows_from(row)
    is_text = (rows >= layout.text.start) & (rows < layout.text.stop)
    reach = jnp.where(is_text, jnp.int32(EVERYTHING), width)
    least, most = rows - reach, jnp.minimum(rows + reach, layout.visual.stop - 1)

    def clean(at, running):
        return attend(running, step=passed + at)

    def masked(at, running):
        def kept():
            start = walk.visual_start + (at - walk.text_steps + walk.skipped) * KEYS
            low, high = least, most
            if walk.text_steps > walk.whole:
                of_text = at < walk.text_steps
                start = jnp.where(of_text, walk.text_start + at * KEYS, start)
                low = jnp.where(of_text, jnp.int32(0), least)
                high = jnp.where(of_text, jnp.int32(layout.text.stop - 1), most)
            offset = (common.key_index() - across(low - start, KEYS)).astype(jnp.uint32)
            return offset <= across((high - low).astype(jnp.uint32), KEYS)

        return attend(running, step=passed + at, kept=kept)

    def half(of_band, running):
        """Up to the inside of the band, then from there: steps without masks, then with. One loop for both, as four
        in a row take more instructions a step (head_dim 128: 7.7 per score without masks instead of 7.5)."""
        start = jnp.where(of_band == 0, jnp.int32(0), walk.inner_start)
        edge = jnp.where(of_band == 0, jnp.int32(walk.whole), walk.inner_stop)
        stop = jnp.where(of_band == 0, walk.inner_start, walk.stop)
        running = lax.fori_loop(start, edge, clean, running)
        return lax.fori_loop(edge, stop, masked, running)

    return lax.fori_loop(jnp.int32(0), jnp.int32(2), half, running)
