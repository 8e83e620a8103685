"""Which device computes which heads: dealt by what the plan makes each of them cost, without a measurement."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from pallas_kernels import CACHED, Layout
from pallas_kernels.mask import count_tiles

BRANCHES = 6
"""Numbers of heads that a device can have at a step, beside none: each is a branch to compile."""

TILE = 128
"""Queries and keys of a tile, whose visits are a head's cost."""


def hands(most: int) -> tuple[int, ...]:
    """How many heads each device can have, in rising order: none to `most`."""
    parts = min(BRANCHES, most)
    return tuple(sorted({-(-most * part // parts) for part in range(parts + 1)}))


def costs_of(windows: Int[np.ndarray, "*dims N"], layout: Layout) -> Float[np.ndarray, "*dims N"]:
    """Tiles that each head visits; 0 of cached ones."""
    distinct, numbers = np.unique(windows, return_inverse=True)
    visited = np.asarray(count_tiles(distinct, layout, TILE, TILE).visited, np.float64)
    return visited[numbers.reshape(windows.shape)]


def deal(costs: Float[np.ndarray, "*layers N"], devices: int) -> Int[np.ndarray, "*layers padded"]:
    """A layer's heads in the order of the devices that compute them, one device's with the most expensive first.

    The most expensive goes to the device that has the least so far: LPT (Graham, SIAM J. Appl. Math. 17, 1969). Every
    device has equally many, the least of `hands` that suffices. Cached heads fill up, then heads of padding.
    """
    *shape, num_heads = costs.shape
    costs = np.pad(costs.reshape(-1, num_heads), ((0, 0), (0, -num_heads % devices)))
    layers, padded = np.arange(len(costs)), costs.shape[1]
    choices = np.array(hands(padded // devices))
    active = np.count_nonzero(costs, axis=1)
    count = choices[np.searchsorted(choices * devices, active)]
    order = np.full(costs.shape, -1, np.int32)
    sums, held = np.zeros((len(costs), devices)), np.zeros((len(costs), devices), np.int64)
    for place, head in enumerate(np.argsort(-costs, axis=1, kind="stable").T):
        device = np.argmin(np.where(held < count[:, None], sums, np.inf), axis=1)
        dealt = layers[place < active]
        at, head = device[dealt], head[dealt]
        order[dealt, at * count[dealt] + held[dealt, at]] = head
        sums[dealt, at] += costs[dealt, head]
        held[dealt, at] += 1
    rest = np.argsort(costs > 0, axis=1, kind="stable")  # in the model's order, padding last
    order[order < 0] = rest[np.arange(padded) < (padded - active)[:, None]]
    return order.reshape(*shape, padded)


def deal_plan(
    half_windows: Int[np.ndarray, "steps layers N"], layouts: Sequence[Layout], devices: int
) -> tuple[Int[np.ndarray, "steps layers padded"], Int[np.ndarray, "steps layers padded"]]:
    """A plan's windows, and the order that `deal` gives its heads; padded with cached heads that nobody has."""
    padding = (0, 0), (0, 0), (0, -half_windows.shape[2] % devices)
    windows = np.pad(half_windows, padding, constant_values=CACHED)
    costs = np.stack([costs_of(half_windows[:, layer], layout) for layer, layout in enumerate(layouts)], axis=1)
    return windows, deal(costs, devices)
