"""Which device has which heads: each once, equally many, and equally much."""

import numpy as np
import pytest

from dfa2_jax.parallel.dealing import BRANCHES, costs_of, deal, deal_plan, hands
from pallas_kernels import CACHED, FULL, Layout
from pallas_kernels.mask import count_tiles

LAYOUT = Layout(512, 4096, text_first=True)


def random_windows(num_heads, seed):
    return np.random.default_rng(seed).choice(np.int32([FULL, CACHED, CACHED, 64, 256, 512]), num_heads)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_heads", [6, 24, 38])
def test_every_head_is_dealt_once_and_devices_have_equally_many(devices, num_heads):
    for seed in range(20):
        costs = costs_of(random_windows(num_heads, seed), LAYOUT)
        order = deal(costs, devices)
        assert sorted(order) == [*range(num_heads + -num_heads % devices)]
        active = np.flatnonzero(costs)
        count = next(x for x in hands(len(order) // devices) if x * devices >= len(active))
        assert set(active) <= set(order[: count * devices])
        for hand in order[: count * devices].reshape(devices, count):
            of_hand = np.append(costs, np.zeros(len(order) - num_heads))[hand]
            assert (np.diff(of_hand) <= 0).all()  # the kernel starts with the most expensive


@pytest.mark.parametrize("devices", [2, 4])
def test_hands_cost_no_more_than_the_best_and_one_head(devices):
    for seed in range(50):
        costs = costs_of(random_windows(24, seed), LAYOUT)
        order = deal(costs, devices)
        count = next(x for x in hands(24 // devices) if x * devices >= np.count_nonzero(costs))
        sums = costs[order[: count * devices]].reshape(devices, count).sum(1)
        assert sums.max() <= sums.mean() + costs.max()


def test_two_costs_are_paired():
    np.testing.assert_array_equal(deal(np.float64([9, 1, 8, 2]), 2), [0, 1, 2, 3])
    np.testing.assert_array_equal(deal(np.float64([1, 9, 2, 8]), 2), [1, 0, 3, 2])


def test_one_device_starts_with_the_most_expensive():
    windows = np.int32([64, FULL, CACHED, 512])
    np.testing.assert_array_equal(deal(costs_of(windows, LAYOUT), 1), [1, 3, 0, 2])


def test_costs_are_tiles_that_the_kernel_visits():
    costs = costs_of(np.int32([FULL, 256, CACHED]), LAYOUT)
    visited = count_tiles(np.int32([FULL, 256]), LAYOUT, 128, 128).visited
    np.testing.assert_array_equal(costs, [*visited, 0])
    assert costs[0] == 36 * 36


def test_a_plan_is_padded_by_heads_that_nobody_has():
    windows = np.stack([random_windows(6, seed) for seed in range(4)]).reshape(2, 2, 6)
    padded, order = deal_plan(windows, [LAYOUT, LAYOUT], 4)
    assert padded.shape == order.shape == (2, 2, 8)
    np.testing.assert_array_equal(padded[..., :6], windows)
    assert (padded[..., 6:] == CACHED).all()
    for step in range(2):
        for layer in range(2):
            np.testing.assert_array_equal(order[step, layer], deal(costs_of(windows[step, layer], LAYOUT), 4))


@pytest.mark.parametrize("most", [1, 2, 5, 12, 24])
def test_hands_reach_from_none_to_all(most):
    counts = hands(most)
    assert counts[0] == 0 and counts[-1] == most and len(counts) <= BRANCHES + 1
    assert max(np.diff(counts)) <= -(-most // BRANCHES)
