"""The exact choice: which heads of a layer take which method, under an error budget (DiTFastAttnV2, section 3.3).

What a method saves does not depend on the head, so the savings of a choice follow from how many heads take each method.
Dynamic programming over heads finds, for all such counts, the least sum of errors (24 heads and 4 methods: 20,475).
"""

from functools import lru_cache
from itertools import chain, combinations
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

UNIT = 2.0**-24
"""Errors are added as multiples of it, rounded up, and the budget is rounded down: no sum in float64 is above it."""

NEVER = 2**29
"""Above every budget; twice that still is an int32."""

MAX_DELTA = 31.0
"""Largest budget that int32 multiples of `UNIT` hold below `NEVER`; the paper's are up to 1."""


def choose(
    errors: Float[Array, "N M"],
    saved: tuple[int, ...],
    delta: Float[Array, ""] | float,
    bound: Float[Array, ""] | float,
) -> Int[Array, " N"]:
    """The method of each head that saves most in all; among equal savings, with the least sum of errors.

    Args:
        errors: of each head under each of M methods. Neither NaN nor infinite ones are taken.
        saved: what each method saves, 0 or more. A method that saves nothing is never chosen. Among methods that save
            the same, a head considers only the one with the smaller error.
        delta: what the errors taken may add up to, at most `MAX_DELTA`.
        bound: what each stays below.

    Returns:
        Numbers of methods; -1 for full attention.
    """
    levels = sorted({saving for saving in saved if saving > 0})
    if not levels:
        return jnp.full(len(errors), -1, jnp.int32)
    usable = jnp.where((errors < bound) & (errors < MAX_DELTA), errors, jnp.inf)
    groups = [np.flatnonzero(np.array(saved) == level) for level in levels]
    least = jnp.stack([usable[:, group].min(1) for group in groups], axis=1)
    which = jnp.stack([jnp.asarray(group)[usable[:, group].argmin(1)] for group in groups], axis=1)
    cost = jnp.where(jnp.isfinite(least), jnp.ceil(least / UNIT), NEVER).astype(jnp.int32)
    budget = jnp.floor(jnp.minimum(delta, MAX_DELTA) / UNIT).astype(jnp.int32)

    counts, before = _states(len(errors), len(levels))
    start = jnp.full(len(counts), NEVER, jnp.int32).at[0].set(0)

    def add_head(sums: Int[Array, " S"], cost: Int[Array, " G"]) -> tuple[Int[Array, " S"], Array]:
        known = jnp.append(sums, NEVER)
        options = jnp.stack([*(known[state] + cost[group] for group, state in enumerate(before)), sums])
        return jnp.minimum(options.min(0), NEVER), options.argmin(0).astype(jnp.uint8)

    sums, taken = jax.lax.scan(add_head, start, cost)
    total = jnp.asarray((counts * np.array(levels)).sum(1), jnp.int32)
    most = jnp.where(sums <= budget, total, -1).max()
    state = jnp.where((sums <= budget) & (total == most), sums, NEVER).argmin()

    def take_back(state: Int[Array, ""], head: tuple[Array, Array]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        taken, which = head
        group = taken[state].astype(jnp.int32)
        came_from = jnp.append(jnp.asarray(before)[:, state], state.astype(jnp.int32))[group]
        return came_from, jnp.append(which, -1)[group]

    return jax.lax.scan(take_back, state.astype(jnp.int32), (taken, which.astype(jnp.int32)), reverse=True)[1]


@lru_cache
def _states(heads: int, groups: int) -> tuple[Int[np.ndarray, "S G"], Int[np.ndarray, "G S"]]:
    """Every way to give at most `heads` heads to groups, and the number of that with one head fewer in each group.

    Counts (c0, c1, ...) are the combination (c0, c0 + c1 + 1, ...) of groups out of heads + groups numbers, whose place
    among all, by their last numbers, is the sum of binomial coefficients (combinatorial number system).
    """
    size = comb(heads + groups, groups)
    flat = chain.from_iterable(combinations(range(heads + groups), groups))
    chosen = np.fromiter(flat, np.int64, size * groups).reshape(size, groups)
    binomial = np.array([[comb(n, g + 1) for g in range(groups)] for n in range(heads + groups)])
    place = binomial[chosen, np.arange(groups)]
    chosen = chosen[place.sum(1).argsort()]
    counts = np.diff(chosen, axis=1, prepend=-1) - 1
    before = []
    for group in range(groups):
        fewer = chosen - (np.arange(groups) >= group)
        number = binomial[np.maximum(fewer, 0), np.arange(groups)].sum(1)
        before.append(np.where(counts[:, group] > 0, number, size))
    return counts, np.array(before, np.int32)
