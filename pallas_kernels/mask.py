"""The definition of arrow attention, and what it costs: every implementation equals this mask."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.layout import CACHED, FULL, Layout

EVERYTHING = 1 << 29
"""A window wider than any sequence; twice that still is an int32."""

UNSEEN = -(2.0**100)
"""Score of a masked pair. Finite: a row whose first tile is masked as a whole has weights of 1 there. The first true
score scales these by exp2(UNSEEN * scale - score) = 0. A power of two: the product with the scale is exact. So a fused
multiply-add cannot leave a rounding error of 1e22 for exp2 to blow up."""

IntArray = Int[Array, "..."] | Int[np.ndarray, "..."] | int


def dense_mask(half_window: Int[Array, " N"], layout: Layout) -> Bool[Array, "N S S"]:
    """Query i attends key j iff i is text, or j is text, or |i - j| <= half_window (DiTFastAttnV2, section 3.1).

    A full head attends to everything. A cached head's rows come out as `|i - j| <= CACHED`, that is text only:
    callers replace its output, they do not read its mask.

        Layout(num_text=1, num_visual=4, text_first=True), half_window=1
        x x x x x
        x x x . .
        x x x x .
        x . x x x
        x . . x x
    """
    return rows_of_mask(half_window, layout, jnp.arange(layout.length))


def rows_of_mask(half_window: Int[Array, " N"], layout: Layout, query: Int[Array, " T"]) -> Bool[Array, "N T S"]:
    """`dense_mask` of the queries at these positions."""
    key = jnp.arange(layout.length)
    near = jnp.abs(query[:, None] - key[None, :])[None] <= half_window[:, None, None]
    text_query, text_key = ((layout.text.start <= x) & (x < layout.text.stop) for x in (query, key))
    text = text_query[:, None] | text_key[None, :]
    return near | text[None] | (half_window == FULL)[:, None, None]


def seen_keys(text_length: Int[Array, " B"], layout: Layout) -> Bool[Array, "B S"]:
    """All keys but text's padding: text tokens from `text_length` on."""
    of_text = jnp.arange(layout.length) - layout.text.start
    return (of_text[None] < text_length[:, None]) | (of_text < 0)[None] | (of_text >= layout.num_text)[None]


def kept_pairs(half_window: Int[np.ndarray, " N"], layout: Layout) -> Int[np.ndarray, " N"]:
    """Query-key pairs that `dense_mask` keeps, per head; none of a cached head."""
    text, visual = layout.num_text, layout.num_visual
    w = np.where(half_window == FULL, visual, np.minimum(half_window, visual)).astype(np.int64)
    band = np.where(w >= visual, visual**2, visual * (2 * w + 1) - w * (w + 1))
    return np.where(half_window == CACHED, 0, band + text * (text + 2 * visual))


def density(half_window: Int[np.ndarray, " N"], layout: Layout) -> np.ndarray:
    """The kept fraction of all query-key pairs, per head."""
    return kept_pairs(half_window, layout) / layout.length**2


class Band(NamedTuple):
    """Ranges of visual key tiles that a tile of visual queries visits: masked, in full, masked."""

    start: IntArray
    inner_start: IntArray
    inner_stop: IntArray
    stop: IntArray


def _numpy(*values: IntArray) -> ModuleType:
    """NumPy for what is known, JAX for what is traced."""
    return np if all(isinstance(value, int | np.integer | np.ndarray) for value in values) else jnp


def band(first: IntArray, last: IntArray, half_window: IntArray, num_visual: int, keys: int) -> Band:
    """Key tiles of `keys` keys for the visual queries `first` to `last`, counted from the first visual token.

    Inside, every query attends every key. Works on traced values, in kernels, too. `half_window` must not be negative.
    """
    xp = _numpy(first, last, half_window)
    start = xp.maximum(first - half_window, 0) // keys
    stop = -(-xp.minimum(last + half_window + 1, num_visual) // keys)
    inner_start = xp.clip(-(-xp.maximum(last - half_window, 0) // keys), start, stop)
    inner_stop = xp.clip(xp.minimum(first + half_window + 1, num_visual) // keys, inner_start, stop)
    return Band(start, inner_start, inner_stop, stop)


class Ring(NamedTuple):
    """Ranges (start, stop) of visual key tiles between two windows, from left to right of the diagonal."""

    masked: tuple[tuple[IntArray, IntArray], ...]
    clean: tuple[tuple[IntArray, IntArray], ...]
    """Every pair of these lies between the windows."""


def ring(inner: Band, outer: Band) -> Ring:
    """The key tiles that `outer` keeps and `inner` does not; `inner` is a narrower or empty band of the same queries.

    A tile that the edge of the inner window cuts is visited twice: for each of the two rings that share it.
    """
    xp = _numpy(*inner, *outer)
    left, right = xp.minimum(outer.inner_start, inner.start), xp.maximum(outer.inner_stop, inner.stop)
    return Ring(
        (
            (outer.start, left),
            (inner.start, inner.inner_start),
            (inner.inner_stop, inner.stop),
            (right, outer.stop),
        ),
        ((left, inner.start), (inner.stop, right)),
    )


class Segment(NamedTuple):
    """Key tiles that follow one another."""

    first: Any
    """Position of the first key."""
    tiles: Any


def cut_text(num_text: IntArray, keys: int) -> tuple[IntArray, IntArray]:
    """Tiles that are text as a whole, and how many are in part: 0 or 1."""
    whole = num_text // keys
    ragged = num_text > whole * keys
    return whole, int(ragged) if isinstance(ragged, bool) else ragged.astype(np.int32)


def steps(segments: Sequence[Segment]) -> Any:
    return sum(segment.tiles for segment in segments)


def tile_at(step: IntArray, segments: Sequence[Segment], keys: int) -> Any:
    """Position of the first key of a step's tile, in a loop that runs over all segments: one loop is one pipeline."""
    first, passed = segments[0].first + step * keys, segments[0].tiles
    for segment in segments[1:]:
        first = jnp.where(step < passed, first, segment.first + (step - passed) * keys)
        passed = passed + segment.tiles
    return first


class TileCount(NamedTuple):
    """Tiles of one launch, per head."""

    visited: np.ndarray
    masked: np.ndarray
    """Visited tiles that need a mask: they lie on an edge of the band, or are ragged."""
    total: int
    """Tiles that a full head visits."""

    @property
    def density(self) -> np.ndarray:
        return self.visited / self.total


def count_tiles(half_window: Int[np.ndarray, " N"], layout: Layout, rows: int, keys: int) -> TileCount:
    """Tiles of `rows` queries and `keys` keys that arrow attention visits, cut within text and within visual tokens."""
    text, visual = layout.num_text, layout.num_visual
    w = np.where(half_window < 0, visual, half_window).astype(np.int64)
    first = np.arange(0, visual, rows)[:, None]
    ranges = band(first, np.minimum(first + rows, visual) - 1, np.minimum(w, visual)[None], visual, keys)
    of_band = np.asarray(ranges.stop - ranges.start).sum(0)
    inside = np.asarray(ranges.inner_stop - ranges.inner_start).sum(0)
    text_rows, visual_rows = -(-text // rows), -(-visual // rows)
    text_keys, visual_keys = -(-text // keys), -(-visual // keys)
    ragged = text_rows * ((text % keys > 0) + (visual % keys > 0)) + visual_rows * (text % keys > 0)
    computed = half_window != CACHED
    every = (text_rows + visual_rows) * (text_keys + visual_keys)
    visited = text_rows * (text_keys + visual_keys) + visual_rows * text_keys + of_band
    return TileCount(visited * computed, (of_band - inside + ragged) * computed, every)
