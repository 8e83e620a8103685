"""The choice of heads at the nodes of a plan, against every choice there is."""

from itertools import product

import numpy as np
import pytest

from dfa2_jax.plan.heads import CACHED_CHOICE, FIRST_ARROW, FULL_CHOICE, PRICES, HeadTables, Paths
from dfa2_jax.plan.steps import Nodes


def drawn(seed, nodes=4, layers=1, heads=1, arrows=1):
    """Amplitudes, scales and costs of no structure."""
    generator = np.random.default_rng(seed)
    costs = np.tile([1.0, 0.0, *[0.3] * arrows], (layers, 1)) / (layers * heads)
    return Paths(
        reuse=generator.random((layers, heads, nodes, nodes)),
        arrows=generator.random((nodes, layers, heads, arrows)),
        scale=generator.random((nodes, layers)),
        costs=costs,
    )


def errors_by_hand(paths, choices):
    """Node by node, and head by head."""
    totals = np.zeros(len(choices))
    for layer, head in np.ndindex(choices.shape[1:]):
        source, own = 0, 0.0
        for node, choice in enumerate(choices[:, layer, head]):
            if choice == CACHED_CHOICE:
                error = own + paths.reuse[layer, head, node, source]
            else:
                own = 0.0 if choice == FULL_CHOICE else paths.arrows[node, layer, head, choice - FIRST_ARROW]
                source, error = node, own
            totals[node] += (error * paths.scale[node, layer]) ** 2
    return totals


def all_choices(nodes, methods):
    for later in product(range(methods), repeat=nodes - 1):
        yield np.array([FULL_CHOICE, *later], np.uint8)[:, None, None]


def test_errors_are_those_of_what_each_head_returns():
    paths = drawn(0, nodes=6, layers=3, heads=2, arrows=2)
    choices = np.random.default_rng(1).integers(0, 4, (6, 3, 2)).astype(np.uint8)
    choices[0] = FULL_CHOICE
    np.testing.assert_allclose(paths.errors(choices), errors_by_hand(paths, choices))
    assert paths.amplitude(choices) == pytest.approx(np.sqrt(errors_by_hand(paths, choices)).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("price", [0.001, 0.1, 0.5, 10.0])
def test_a_price_decides_as_the_best_of_all_choices(seed, price):
    paths = drawn(seed, arrows=2)
    weights = np.random.default_rng(seed + 50).random(4)

    def price_of(choices):
        return (errors_by_hand(paths, choices) * weights).sum() + price * paths.cost(choices)

    got = paths.at_price(price, paths.segments(weights))
    assert price_of(got) == pytest.approx(min(map(price_of, all_choices(4, 4))))


def test_heads_of_several_layers_are_decided_one_by_one_at_a_price():
    paths = drawn(7, nodes=5, layers=2, heads=3)
    weights = np.ones(5)
    got = paths.at_price(0.05, paths.segments(weights))
    for layer, head in np.ndindex(2, 3):
        alone = Paths(
            paths.reuse[layer, head][None, None],
            paths.arrows[:, layer, head][:, None, None],
            paths.scale[:, [layer]],
            paths.costs[[layer]],
        )
        np.testing.assert_array_equal(got[:, layer, head], alone.at_price(0.05, alone.segments(weights))[:, 0, 0])


def lagging(nodes=8, layers=3, heads=4):
    """Errors that grow with the distance in steps, and cheap arrows."""
    distance = np.abs(np.subtract.outer(np.arange(nodes), np.arange(nodes)))
    generator = np.random.default_rng(3)
    reuse = 0.1 * distance * generator.uniform(0.5, 1, (layers, heads, 1, 1))
    arrows = generator.uniform(0.3, 0.6, (nodes, layers, heads, 1))
    costs = np.tile([1.0, 0.0, 0.3], (layers, 1)) / (layers * heads)
    return Paths(reuse, arrows, np.ones((nodes, layers)), costs)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_cost_is_kept_and_used_up(share):
    paths = lagging()
    choices = paths.nearest(share * 8)
    assert 0.9 * share * 8 <= paths.cost(choices) <= share * 8 and (choices[0] == FULL_CHOICE).all()
    cheapest = paths.cheapest(paths.amplitude(choices))
    assert paths.amplitude(cheapest) <= paths.amplitude(choices) and paths.cost(cheapest) <= 1.05 * share * 8


def test_a_cost_below_that_of_the_first_node_is_none():
    assert lagging().nearest(0.9) is None
    assert (lagging().cheapest(0.0) == FULL_CHOICE).all()


def test_many_heads_reuse_at_one_node_and_not_a_few_at_each():
    """Errors of nodes add up as amplitudes: as many heads at two nodes cost more than all at one."""
    paths = lagging()
    choices = paths.nearest(0.6 * 8)
    reused = (choices == CACHED_CHOICE).mean((1, 2))
    assert ((reused < 0.2) | (reused > 0.8)).mean() > 0.7
    shuffled = choices.copy()
    generator = np.random.default_rng(0)
    for layer, head in np.ndindex(3, 4):
        shuffled[1:, layer, head] = generator.permutation(shuffled[1:, layer, head])
    assert paths.cost(shuffled) == pytest.approx(paths.cost(choices))
    assert paths.amplitude(choices) < 0.8 * paths.amplitude(shuffled)


def test_weights_of_nodes_take_turns_with_paths():
    """The first turn minimises squares, which is another goal: the turns after it take some hundredths off."""
    nodes, layers, heads, ratios = 16, 6, 4, []
    distance = np.abs(np.subtract.outer(np.arange(nodes), np.arange(nodes)))
    costs, weights = np.tile([1.0, 0.0], (layers, 1)) / (layers * heads), np.ones(nodes)
    for seed in range(5):
        generator = np.random.default_rng(seed)
        reuse = 0.1 * distance * 10 ** generator.uniform(-0.5, 0, (layers, heads, nodes, 1))
        scale = 10 ** generator.uniform(-2, 0, (nodes, layers))
        paths = Paths(reuse, np.zeros((nodes, layers, heads, 0)), scale, costs)
        first = paths._bisected(paths.segments(weights), lambda one: paths.cost(one) <= 0.5 * nodes, *PRICES[::-1])  # noqa: B023
        ratios.append(paths.amplitude(paths.nearest(0.5 * nodes)) / paths.amplitude(first))
    assert max(ratios) <= 1 and np.mean(ratios) < 0.985, ratios


def test_tables_are_read_at_the_nodes_and_weighed_by_what_follows():
    generator = np.random.default_rng(0)
    tables = HeadTables(
        reuse=generator.random((2, 3, 5, 5)),
        arrows=generator.random((5, 2, 3, 1)),
        sensitivity=generator.random((5, 2)),
        costs=np.tile([0.1, 0.0, 0.05], (2, 1)),
    )
    sigmas, growth = np.array([1.0, 0.8, 0.5, 0.3, 0.1, 0.0]), np.arange(6.0, 0.0, -1)
    paths = tables.at(Nodes((0, 2, 3), np.zeros((3, 2)), 0.0), sigmas, growth)
    assert tables.largest_saving == pytest.approx(0.6)
    assert paths.reuse[1, 2, 2, 1] == pytest.approx(np.sqrt(tables.reuse[1, 2, 3, 2]))
    assert paths.arrows[1, 0, 1, 0] == pytest.approx(np.sqrt(tables.arrows[2, 0, 1, 0]))
    assert paths.scale[0, 1] == pytest.approx(0.5 * np.sqrt(tables.sensitivity[0, 1] * 4.0))
    assert paths.scale[2, 0] == pytest.approx(0.3 * np.sqrt(tables.sensitivity[3, 0] * 1.0))
