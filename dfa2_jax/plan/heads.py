"""Which heads run at the nodes of a step plan: one Lagrangian over all heads, layers and nodes, without a model.

An error of a head's output counts by what it does to the latents at the end. That is the layer's sensitivity, times how
far the node's velocity moves x, times how much the sampler makes of it (`plan.steps`). Errors of one node's heads and
layers add up as squares. Those of nodes add up as amplitudes: reused outputs lag, and all lags point the same way. So
it is better that many heads reuse at one node than a few at each. One price of a step's time then decides for every
head, by a shortest path over the nodes at which it runs. Weights of nodes and paths are found in turns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from dfa2_jax.plan.steps import Nodes

FULL_CHOICE, CACHED_CHOICE, FIRST_ARROW = 0, 1, 2
"""Numbers of methods in a choice: full, cached, and then the arrows."""

PRICES = 1e-12, 1e12
BISECTIONS = 16
"""Errors are of the latents' size at most, and a head costs 1e-6 to 1 of a step. So the price is found to 1e-3."""

TURNS = 12
"""Weights and paths are found in turns, at most so often, while the amplitude falls by a hundredth."""

LEAST = 1e-2
"""The least share of the mean error: a node with less counts as if it had that, or full heads would always stay so."""

HeadChoices = UInt8[np.ndarray, "nodes layers heads"]


@dataclass(frozen=True)
class HeadTables:
    """What heads could do without, measured along a dense run.

    reuse: squared error of a head's output of one step in place of another's, relative to the latter's spread:
        `reuse[layer, head, step, source]`.
    arrows: the same of arrows at a step, instead of full attention; not of the first step.
    sensitivity: mean squared error of the velocity per unit of these errors, summed over the heads of a layer.
    costs: share of a dense step's time that a head takes: in full, reused (0), and inside each arrow.
    """

    reuse: Float[np.ndarray, "layers heads steps steps"]
    arrows: Float[np.ndarray, "steps layers heads arrows"]
    sensitivity: Float[np.ndarray, "steps layers"]
    costs: Float[np.ndarray, "layers methods"]

    @property
    def largest_saving(self) -> float:
        """What heads take of a dense step's time, where all are in full."""
        return float(self.costs[:, FULL_CHOICE].sum() * self.reuse.shape[1])

    def at(self, nodes: Nodes, sigmas: Float[np.ndarray, " levels"], growth: Float[np.ndarray, " levels"]) -> "Paths":
        """The heads' paths through these nodes."""
        steps, last = [*nodes.steps], len(sigmas) - 1
        following = [*steps[1:], last]
        moves = (sigmas[following] - sigmas[steps]) ** 2 * growth[following]
        scale = np.sqrt(moves[:, None] * self.sensitivity[steps])
        return Paths(np.sqrt(self.reuse[:, :, steps][..., steps]), np.sqrt(self.arrows[steps]), scale, self.costs)


@dataclass(frozen=True)
class Paths:
    """Heads through the nodes of one step plan. A path is the nodes at which a head runs, in full or inside an arrow.

    An arrow's output is what later nodes reuse, with the arrow's error.

    reuse: amplitude of a node's output in place of another's, `reuse[layer, head, node, source]`; arrows: of arrows.
    scale: what an amplitude of a layer at a node is at the end.
    """

    reuse: Float[np.ndarray, "layers heads nodes nodes"]
    arrows: Float[np.ndarray, "nodes layers heads arrows"]
    scale: Float[np.ndarray, "nodes layers"]
    costs: Float[np.ndarray, "layers methods"]

    def at_price(self, price: float, segments: list[Float[np.ndarray, "layers heads _ _"]]) -> HeadChoices:
        """The choices with the least sum of segments, and of costs at this price."""
        layers, heads, count = self.reuse.shape[:3]
        best, came = np.zeros((layers, heads, count + 1)), np.zeros((layers, heads, count + 1), int)
        paid = price * np.delete(self.costs, CACHED_CHOICE, axis=1)  # of what runs: in full, and inside arrows
        for stop, segment in enumerate(segments, 1):
            options = segment + (best[:, :, :stop, None] + paid[:, None, None, :])
            options = options.reshape(layers, heads, -1)
            came[:, :, stop] = options.argmin(-1)
            best[:, :, stop] = np.take_along_axis(options, came[:, :, stop, None], -1)[..., 0]
        choices = np.full((count, layers, heads), CACHED_CHOICE, np.uint8)
        layer, head = np.indices((layers, heads))
        stop = np.full((layers, heads), count)
        while (running := stop > 0).any():
            source, method = np.divmod(came[layer, head, stop], paid.shape[1])
            choice = np.where(method, method + FIRST_ARROW - 1, FULL_CHOICE)
            choices[source[running], layer[running], head[running]] = choice[running]
            stop = np.where(running, source, 0)
        return choices

    def segments(self, weights: Float[np.ndarray, " nodes"]) -> list[Float[np.ndarray, "layers heads _ _"]]:
        """What running at a source adds, by each method, and reusing that until the node after it.

        They are weighted squared errors, by that node less one: [layers, heads, sources, methods that run].
        """
        count, (layers, heads) = len(self.scale), self.reuse.shape[:2]
        counted = self.scale**2 * weights[:, None]
        own = np.concatenate([np.zeros((count, layers, heads, 1)), self.arrows], axis=-1)  # in full, there is none
        own = own.transpose(1, 2, 0, 3)
        later = np.tril(counted.T[:, None, :, None] * np.ones((count, count)), -1)  # a source serves nodes after it
        squares, products = (np.cumsum(later * x, axis=2) for x in (self.reuse**2, self.reuse))
        reached = np.concatenate([np.zeros((1, layers)), np.cumsum(counted, axis=0)])
        segments = []
        for stop in range(1, count + 1):
            span = (reached[stop] - reached[:stop]).T[:, None, :, None]  # the source's own node, and those after it
            lag, both = (x[:, :, stop - 1, :stop, None] for x in (squares, products))
            segment = own[:, :, :stop] ** 2 * span + 2 * own[:, :, :stop] * both + lag
            segment[:, :, 0, 1:] = np.inf  # the first node is full
            segments.append(segment)
        return segments

    def errors(self, choices: HeadChoices) -> Float[np.ndarray, " nodes"]:
        """Squared error at the end of each node's heads."""
        sources, own = np.zeros(choices.shape[1:], int), np.zeros(choices.shape[1:])
        layer, head = np.indices(sources.shape)
        totals = []
        for node, scale in enumerate(self.scale):
            runs = choices[node] != CACHED_CHOICE
            here = np.insert(self.arrows[node], [0, 0], 0.0, axis=-1)[layer, head, choices[node]]
            own, sources = np.where(runs, here, own), np.where(runs, node, sources)
            lag = np.where(runs, 0.0, self.reuse[layer, head, node, sources])
            totals.append((((own + lag) * scale[:, None]) ** 2).sum())
        return np.array(totals)

    def amplitude(self, choices: HeadChoices) -> float:
        """The amplitude of all errors at the end, added up over nodes."""
        return float(np.sqrt(self.errors(choices)).sum())

    def cost(self, choices: HeadChoices) -> float:
        """The cost of all nodes, in dense steps, with all that is not attention."""
        layers = np.arange(choices.shape[1])[:, None]
        share = self.costs[:, FULL_CHOICE].sum() * choices.shape[2]
        return float(len(choices) * (1 - share) + self.costs[layers, choices].sum())

    def cheapest(self, amplitude: float) -> HeadChoices:
        """The choices with the least cost whose errors stay below an amplitude."""
        return self._in_turns(lambda choices: self.amplitude(choices) <= amplitude, PRICES, self.cost)

    def nearest(self, cost: float) -> HeadChoices | None:
        """The choices with the least errors that cost at most so many dense steps; None: there are none."""
        choices = self._in_turns(lambda choices: self.cost(choices) <= cost, (PRICES[1], PRICES[0]), self.amplitude)
        return choices if self.cost(choices) <= cost else None

    def _in_turns(
        self, allowed: Callable[[HeadChoices], bool], prices: tuple[float, float], goal: Callable[[HeadChoices], float]
    ) -> HeadChoices:
        """The allowed choices with the least goal. The last choices weigh nodes: by the square root's slope there."""
        weights, best = np.ones(len(self.scale)), None
        for _ in range(TURNS):
            choices = self._bisected(self.segments(weights), allowed, *prices)
            if best is not None and goal(choices) > 0.99 * goal(best):
                break
            best, errors = choices, self.errors(choices)
            weights = 1 / np.sqrt(np.maximum(errors, LEAST * errors.mean() + np.finfo(float).tiny))
        assert best is not None
        return best

    def _bisected(
        self,
        segments: list[Float[np.ndarray, "layers heads _ _"]],
        allowed: Callable[[HeadChoices], bool],
        price: float,
        beyond: float,
    ) -> HeadChoices:
        """At the price nearest to `beyond` that is allowed, starting from one that should be."""
        kept = self.at_price(price, segments)
        for _ in range(BISECTIONS):
            middle = float(np.sqrt(price * beyond))
            choices = self.at_price(middle, segments)
            if allowed(choices):
                kept, price = choices, middle
            else:
                beyond = middle
        return kept
