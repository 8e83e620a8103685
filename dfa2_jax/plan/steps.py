"""Which steps run the network: found from products of the dense run's velocities, without a model.

A step plan is a two-step solver on chosen noise levels. From node a to node b, x moves by `c0 v_a + c1 v_p`, where p is
the node before. By the dense run's velocities v_i, the move should have been `sum(h_i v_i)` over the steps from a to b.
The mean square of the difference is a quadratic form of the velocities' Gram matrix, and so are the best coefficients.
A gap's error counts by how much the sampler makes of it until the end (`growth`). Dynamic programming over pairs of
nodes then finds the nodes with the least sum, for every number of nodes at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

MAX_GAP = 16
"""Steps from a node to the next, at most: it bounds the search, which takes 2 s at 50 steps."""

LARGEST = 1e12
"""The largest mean product of velocities, and the largest growth: far above any model's. Beyond it, sums overflow."""

RIDGE = 1e-7
"""The ridge, as a share of the Gram matrix's mean diagonal: late velocities are nearly parallel."""


def euler_coefficients(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, "steps 2"]:
    """Coefficients of Euler's steps: differences of noise levels, float32 as diffusers subtracts; no last velocity."""
    differences = np.diff(np.asarray(sigmas, np.float32))
    return np.stack([differences, np.zeros_like(differences)], axis=1)


def adams_coefficients(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, "steps 2"]:
    """Coefficients of Adams and Bashforth's steps of second order, float32; the first step is Euler's."""
    sizes = np.diff(np.asarray(sigmas, np.float64))
    last = np.zeros_like(sizes)
    last[1:] = sizes[1:] ** 2 / sizes[:-1] / 2
    return np.stack([sizes + last, -last], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Nodes:
    """Steps that run the network, their coefficients, and the squared error of the latents that follows from them."""

    steps: tuple[int, ...]
    coefficients: Float[np.ndarray, "nodes 2"]
    predicted_error: float


@dataclass(frozen=True)
class StepSearch:
    """A search of the nodes for one dense run.

    gram: mean products of its velocities, float64. Of a converged run: of velocities, and after them of the latents'
        moves from level to level, which are no Euler steps.
    growth: by noise level, what a squared error there has grown by at the end.
    """

    sigmas: Float[np.ndarray, " levels"]
    gram: Float[np.ndarray, "_ _"]  # a file's, until they are checked
    growth: Float[np.ndarray, " _"]

    def __post_init__(self) -> None:
        """Raises ValueError where these cannot be of one run."""
        steps, products = len(self.sigmas) - 1, np.diagonal(self.gram)
        if self.gram.shape not in ((steps, steps), (2 * steps, 2 * steps)) or self.growth.shape != (steps + 1,):
            raise ValueError(f"gram {self.gram.shape} and growth {self.growth.shape} must be of {steps} steps.")
        bound = np.sqrt(np.maximum(np.outer(products, products), 0)) * (1 + 1e-6)
        if not ((products > 0) & (products < LARGEST)).all() or not (np.abs(self.gram) <= bound).all():
            raise ValueError("gram holds what no products of velocities are.")
        if not (np.abs(self.gram - self.gram.T) <= 1e-6 * bound).all():
            raise ValueError("gram is not symmetric: no products of velocities are so.")
        if not ((np.diff(self.growth) <= 0).all() and 0 < self.growth[-1] and self.growth[0] < LARGEST):
            raise ValueError(f"growth is {self.growth!s:.200}: it never rises, from below {LARGEST:g} to above 0.")

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def is_moved(self) -> bool:
        """Whether gram holds the latents' moves, too."""
        return len(self.gram) > self.num_steps

    @cached_property
    def _moved(self) -> tuple[Float[np.ndarray, "steps steps"], Float[np.ndarray, "steps steps"]]:
        """Mean products of velocities and moves, and of moves."""
        count, sizes = self.num_steps, np.diff(self.sigmas)
        if not self.is_moved:
            return self.gram * sizes, self.gram * np.outer(sizes, sizes)
        return self.gram[:count, count:], self.gram[count:, count:]

    def move(self, last: int | None, node: int, following: int) -> tuple[Float[np.ndarray, "2"], float]:
        """The best coefficients from a node to the following one, and the mean square of what they miss."""
        if following == node + 1 and not self.is_moved:
            return euler_coefficients(self.sigmas[node : following + 1])[0].astype(np.float64), 0.0
        basis, gap = [node] if last is None else [node, last], slice(node, following)
        with_moves, of_moves = self._moved
        wanted = with_moves[:, gap].sum(axis=1)
        products = self.gram[np.ix_(basis, basis)]
        ridge = RIDGE * np.trace(products) / len(basis) * np.eye(len(basis))
        weights = np.linalg.lstsq(products + ridge, wanted[basis], rcond=None)[0]
        missed = of_moves[gap, gap].sum() - 2 * weights @ wanted[basis] + weights @ products @ weights
        return np.pad(weights, (0, 2 - len(basis))), max(float(missed), 0.0)

    @cached_property
    def paths(self) -> dict[int, tuple[int, ...]]:
        """The best nodes, by their number.

        A state is a node and the gap before it (0: none). `costs[node, gap]` is of `count` nodes up to this one;
        `came[count][following, gap]` is the gap before the node that `following` was reached from.
        """
        steps = self.num_steps
        costs = np.full((steps + 1, MAX_GAP + 1), np.inf)
        costs[0, 0] = 0
        came, paths = [], {}
        for count in range(1, steps + 1):
            reached, arrived = np.full_like(costs, np.inf), np.zeros(costs.shape, int)
            for node in range(count - 1, steps):
                for gap in range(1, min(MAX_GAP, steps - node) + 1):
                    options = costs[node] + self._errors[node, :, gap]
                    before = int(np.argmin(options))
                    reached[node + gap, gap], arrived[node + gap, gap] = options[before], before
            came.append(arrived)
            gap = int(np.argmin(reached[steps]))
            if np.isfinite(reached[steps, gap]):
                node, path = steps, []
                for arrived in reversed(came):
                    node, gap = node - gap, int(arrived[node, gap])
                    path.append(node)
                paths[count] = tuple(reversed(path))
            costs = reached
            costs[steps] = np.inf
        return paths

    @cached_property
    def _errors(self) -> Float[np.ndarray, "steps gaps gaps"]:
        """What going from a node costs, by the gap before it and the one after."""
        errors = np.full((self.num_steps, MAX_GAP + 1, MAX_GAP + 1), np.inf)
        for node in range(self.num_steps):
            for before in range(1 if node else 0, min(node, MAX_GAP) + 1):
                for gap in range(1, min(MAX_GAP, self.num_steps - node) + 1):
                    _, error = self.move(node - before if before else None, node, node + gap)
                    errors[node, before, gap] = error * self.growth[node + gap]
        return errors

    def nodes(self, count: int) -> Nodes:
        """The best of this number.

        Raises:
            ValueError: there are none.
        """
        if count not in self.paths:
            least = min(self.paths)
            raise ValueError(f"{count} nodes of {self.num_steps} steps: there must be {least} to {self.num_steps}.")
        steps = self.paths[count]
        coefficients, total = [], 0.0
        for last, node, following in zip((None, *steps), steps, (*steps[1:], self.num_steps), strict=False):
            weights, error = self.move(last, node, following)
            coefficients.append(weights)
            total += error * float(self.growth[following])
        return Nodes(steps, np.array(coefficients), total)

    def for_psnr(self, psnr: float, predicted: Callable[[float], float]) -> Nodes:
        """The fewest that are predicted to reach `psnr` in dB; all, where none does.

        Args:
            predicted: PSNR of a predicted error.
        """
        for count in sorted(self.paths):
            nodes = self.nodes(count)
            if predicted(nodes.predicted_error) >= psnr:
                return nodes
        return self.nodes(self.num_steps)


def count_for(speedup: float, steps: int) -> int:
    """The most nodes that are at least so much faster than every step.

    Raises:
        ValueError: no plan is.
    """
    least = -(-steps // MAX_GAP)
    if not 1 <= speedup <= steps / least:
        raise ValueError(f"{speedup=} must be from 1 to {steps / least:g} for {steps} steps.")
    return int(steps / speedup + 1e-9)


def check_budget(**budgets: float | None) -> None:
    """One budget, a finite number.

    Raises:
        ValueError: names what was given.
    """
    given: Sequence[str] = [f"{name}={value!r}" for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"one of {', '.join(budgets)} must be given, not {' and '.join(given) or 'none'}.")
    (value,) = (value for value in budgets.values() if value is not None)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise ValueError(f"{given[0]} must be a finite number.")
    if budgets.get("psnr") is not None and value <= 0:
        raise ValueError(f"{given[0]} must be above 0 dB, where nothing is alike.")
