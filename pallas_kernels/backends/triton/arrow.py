"""Arrow attention as a Pallas kernel on the Triton backend: one launch for full, arrow and cached heads.

A program takes one tile of queries of one head. Queries and keys are cut into tiles within text and within visual
tokens, so no tile holds both. Which key tiles a program visits follows from the head's window. One loop without masks
visits text and the inside of the band. A loop with masks visits the band's edges and ragged ends. Text queries see
every key, and their programs would outlast all others. Each takes a part of the keys, and a second kernel merges the
parts.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.backends.base import Problem
from pallas_kernels.backends.kernel_types import Ref, Scalar
from pallas_kernels.backends.triton.softmax import Running, attend_tile, nothing, queries, within
from pallas_kernels.backends.triton.tiles import Tiles
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import EVERYTHING, IntArray, Segment, band, cut_text, steps, tile_at

WHOLE = pl.BlockSpec(memory_space=pl.ANY)


def arrow_attention(problem: Problem[Array], tiles: Tiles, *, interpret: bool) -> Float[Array, "*L B T N H"]:
    q, cache, layer = problem.q, problem.cache, problem.layer
    batch, _, heads, dim = q.shape
    cut = Cut(problem.layout, tiles, is_padded=problem.text_length is not None)
    out = jax.ShapeDtypeStruct(q.shape if cache is None else cache.shape, q.dtype)
    lengths = [] if problem.text_length is None else [problem.text_length]
    scalars = jnp.zeros((), jnp.int32) if layer is None else layer, problem.order, problem.windows, *lengths
    part = batch, heads, cut.parts, cut.text_tiles * tiles.rows
    parts = [jax.ShapeDtypeStruct((*part, dim), jnp.float32), jax.ShapeDtypeStruct(part, jnp.float32)]
    out, *parts = pl.pallas_call(
        partial(_attend, cut=cut, scale=dim**-0.5, stacked=layer is not None, inline_asm=not interpret),
        grid=(cut.programs, batch, heads),
        in_specs=[WHOLE] * (len(scalars) + (3 if cache is None else 4)),
        out_specs=[WHOLE] * (1 + 2 * (cut.parts > 1)),
        out_shape=[out, *(parts if cut.parts > 1 else [])],
        input_output_aliases={} if cache is None else {len(scalars) + 3: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="arrow_attention",
    )(*scalars, q, problem.k, problem.v, *([] if cache is None else [cache]))
    if not parts:
        return out
    return pl.pallas_call(
        partial(_merge, cut=cut, stacked=layer is not None),
        grid=(cut.text_tiles, batch, heads),
        in_specs=[WHOLE] * 5,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={4: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=1),
        interpret=interpret,
        name="arrow_attention_merge",
    )(scalars[0], problem.windows, *parts, out)


@dataclass(frozen=True)
class Cut:
    """A layout cut into tiles. Programs of one head: text tiles, each in parts, then visual tiles.

    is_padded: text ends where data says.
    """

    layout: Layout
    tiles: Tiles
    is_padded: bool = False

    @property
    def text_tiles(self) -> int:
        return -(-self.layout.num_text // self.tiles.rows)

    @property
    def parts(self) -> int:
        """Parts of a text query's keys. Each holds a whole tile at least: the mean of no values is not a number."""
        text = 0 if self.is_padded else self.layout.num_text
        whole = text // self.tiles.keys + self.layout.num_visual // self.tiles.keys
        return max(1, min(-(-self.layout.length // self.tiles.text_keys), whole)) if self.layout.num_text else 1

    @property
    def text_programs(self) -> int:
        return self.text_tiles * self.parts

    @property
    def programs(self) -> int:
        return self.text_programs + -(-self.layout.num_visual // self.tiles.rows)


class Program:
    """The work of one program: its rows, and the key tiles that it visits without and with a mask."""

    def __init__(self, cut: Cut, program: Scalar, window: Scalar, num_text: Scalar | int):
        layout, rows, keys = cut.layout, cut.tiles.rows, cut.tiles.keys
        is_text = program < cut.text_programs
        self.part = program % cut.parts
        tile = jnp.where(is_text, program // cut.parts, program - cut.text_programs)
        self.queries = queries(layout, is_text, tile, rows)
        self.window = jnp.where(is_text | (window == FULL), jnp.int32(EVERYTHING), window)
        visited = band(tile * rows, tile * rows + rows - 1, self.window, layout.num_visual, keys)
        whole, ragged = cut_text(num_text, keys)

        def visual(start: IntArray, stop: IntArray) -> Segment:
            return Segment(layout.visual.start + start * keys, stop - start)

        self.clean = Segment(layout.text.start, whole), visual(visited.inner_start, visited.inner_stop)
        self.masked = (
            Segment(layout.text.start + whole * keys, ragged),
            visual(visited.start, visited.inner_start),
            visual(visited.inner_stop, visited.stop),
        )
        every = steps(self.clean)
        self.clean_start = jnp.where(is_text, self.part * every // cut.parts, 0)
        self.clean_stop = jnp.where(is_text, (self.part + 1) * every // cut.parts, every)
        self.masked_stop = jnp.where(is_text & (self.part < cut.parts - 1), 0, steps(self.masked))


def _store(running: Running, target: Ref, parts: list[Ref], here: Program, rows: int, b: Scalar, head: Scalar) -> None:
    """The output of this program's queries; of text queries whose keys are split, a part of it."""
    mine, result = here.queries, running.values / running.total[:, None]
    if not parts:
        plgpu.store(target, result.astype(target.dtype), mask=mine.exist)
        return

    @pl.when(mine.is_text)
    def store_part():
        places = pl.ds(mine.tile * rows, rows)
        plgpu.store(parts[0].at[b, head, here.part, places, :], result)
        plgpu.store(parts[1].at[b, head, here.part, places], running.highest + jnp.log2(running.total))

    @pl.when(jnp.logical_not(mine.is_text))
    def store_output():
        plgpu.store(target, result.astype(target.dtype), mask=mine.exist)


def _attend(
    layer: Ref,
    order: Ref,
    half_window: Ref,
    *refs: Ref,
    cut: Cut,
    scale: float,
    stacked: bool,
    inline_asm: bool,
) -> None:
    lengths, (q, k, v, *others) = refs[: cut.is_padded], refs[cut.is_padded :]
    has_cache = len(others) in (2, 4)  # it is the output's buffer
    out, *parts = others[has_cache:]
    entry = (layer[...],) if stacked else ()
    program, b = pl.program_id(0), pl.program_id(1)
    head = order[pl.program_id(2)]
    window = half_window[head]
    num_text = lengths[0][b] if lengths else cut.layout.num_text
    here = Program(cut, program, window, num_text)
    mine = here.queries
    target = out.at[(*entry, b, pl.ds(mine.first, cut.tiles.rows), head, slice(None))]

    @pl.when(window != CACHED)
    def compute():
        q_tile = plgpu.load(q.at[b, pl.ds(mine.first, cut.tiles.rows), head, :], mask=mine.exist, other=0.0)
        attend = partial(attend_tile, q=q_tile, scale=scale * math.log2(math.e), inline_asm=inline_asm)

        def tile(ref: Ref, first: Scalar) -> Ref:
            return ref.at[b, pl.ds(first, cut.tiles.keys), head, :]

        def clean(step: Scalar, running: Running) -> Running:
            first = tile_at(step, here.clean, cut.tiles.keys)
            return attend(running, k=plgpu.load(tile(k, first)), v=plgpu.load(tile(v, first)))

        def masked(step: Scalar, running: Running) -> Running:
            first = tile_at(step, here.masked, cut.tiles.keys)
            of_text = step < here.masked[0].tiles
            text_stop = jnp.asarray(cut.layout.text.start + num_text, jnp.int32)
            stop = jnp.where(of_text, text_stop, jnp.int32(cut.layout.visual.stop))
            width = jnp.where(of_text, jnp.int32(EVERYTHING), here.window)
            keys = first + jnp.arange(cut.tiles.keys, dtype=jnp.int32)
            least, most = mine.rows - width, jnp.minimum(mine.rows + width, stop - 1)
            kept = within(keys[None, :] - least[:, None], (most - least)[:, None])
            exist = (keys < stop)[:, None]
            k_tile, v_tile = (plgpu.load(tile(ref, first), mask=exist, other=0.0) for ref in (k, v))
            return attend(running, k=k_tile, v=v_tile, kept=kept)

        running = nothing(cut.tiles.rows, q.shape[-1])
        running = lax.fori_loop(here.clean_start, here.clean_stop, clean, running)
        running = lax.fori_loop(0, here.masked_stop, masked, running)
        _store(running, target, parts, here, cut.tiles.rows, b, head)

    if not has_cache:

        @pl.when(window == CACHED)
        def poison():
            plgpu.store(target, jnp.full((cut.tiles.rows, q.shape[-1]), jnp.nan, out.dtype), mask=mine.exist)


def _merge(
    layer: Ref, half_window: Ref, values: Ref, log_sums: Ref, _: Ref, out: Ref, *, cut: Cut, stacked: bool
) -> None:
    """Text rows of one head from the parts that its programs left, weighted by the sums of their exponentials."""
    entry = (layer[...],) if stacked else ()
    tile, b, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    first = tile * cut.tiles.rows
    rows = pl.ds(first, cut.tiles.rows)

    @pl.when(half_window[head] != CACHED)
    def merge():
        def add(part: Scalar, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            numerator, denominator, highest = sums
            log_sum = plgpu.load(log_sums.at[b, head, part, rows])
            new = jnp.maximum(highest, log_sum)
            decay, weight = jnp.exp2(highest - new), jnp.exp2(log_sum - new)
            numerator = numerator * decay[:, None] + plgpu.load(values.at[b, head, part, rows, :]) * weight[:, None]
            return numerator, denominator * decay + weight, new

        start = nothing(cut.tiles.rows, values.shape[-1])
        numerator, denominator, _ = lax.fori_loop(0, cut.parts, add, (start.values, start.total, start.highest))
        text = cut.layout.text.start + first
        exists = first + jnp.arange(cut.tiles.rows, dtype=jnp.int32) < cut.layout.num_text
        target = out.at[(*entry, b, pl.ds(text, cut.tiles.rows), head, slice(None))]
        plgpu.store(target, (numerator / denominator[:, None]).astype(out.dtype), mask=exists[:, None])
