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


def costs_of(windows: Int[np.ndarray, " N"], layout: Layout) -> Float[np.ndarray, " N"]:
    """Tiles that each head visits; 0 of cached ones."""
    return np.asarray(count_tiles(windows, layout, TILE, TILE).visited, np.float64)


def deal(costs: Float[np.ndarray, " N"], devices: int) -> Int[np.ndarray, " padded"]:
    """Heads in the order of the devices that compute them, those of one device with the most expensive first.

    The most expensive goes to the device that has the least so far: LPT (Graham, SIAM J. Appl. Math. 17, 1969). Every
    device has equally many, the least of `hands` that suffices. Cached heads fill up, then heads of padding.
    """
    num_heads = len(costs)
    padded = num_heads + -num_heads % devices
    heaviest = [int(head) for head in np.argsort(-costs, kind="stable") if costs[head] > 0]
    count = next(count for count in hands(padded // devices) if count * devices >= len(heaviest))
    dealt: list[list[int]] = [[] for _ in range(devices)]
    sums = np.zeros(devices)
    for head in heaviest:
        device = min((i for i in range(devices) if len(dealt[i]) < count), key=lambda i: sums[i])
        dealt[device].append(head)
        sums[device] += costs[head]
    rest = [*(head for head in range(num_heads) if costs[head] == 0), *range(num_heads, padded)]
    for hand in dealt:
        while len(hand) < count:
            hand.append(rest.pop(0))
    return np.array([*sum(dealt, []), *rest], np.int32)


def deal_plan(
    half_windows: Int[np.ndarray, "steps layers N"], layouts: Sequence[Layout], devices: int
) -> tuple[Int[np.ndarray, "steps layers padded"], Int[np.ndarray, "steps layers padded"]]:
    """A plan's windows, and the order that `deal` gives its heads; padded with cached heads that nobody has."""
    steps, layers, num_heads = half_windows.shape
    padding = (0, 0), (0, 0), (0, -num_heads % devices)
    windows = np.pad(half_windows, padding, constant_values=CACHED)
    order = np.zeros_like(windows)
    for layer, layout in enumerate(layouts):
        distinct, numbers = np.unique(half_windows[:, layer], axis=0, return_inverse=True)
        dealt = np.stack([deal(costs_of(one, layout), devices) for one in distinct])
        order[:, layer] = dealt[numbers.reshape(-1)]
    return windows, order
