"""The exact choice against HiGHS, and what it promises."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from dfa2_jax.calibration.calibrate import Budget
from dfa2_jax.calibration.search import choose

GRAIN = 2.0**-20
"""Errors and budgets are multiples: exact in float32, in int32 units and in HiGHS' tolerance."""

SHAPES = [(1, 1), (2, 5), (3, 2), (5, 3), (8, 4), (12, 5), (16, 3), (24, 1), (24, 4), (38, 3)]


def instances(heads, methods, count, draw=0):
    """Errors [count, N, M], savings, budgets and bounds: from nothing to everything, with equal and zero ones."""
    generator = np.random.default_rng([heads, methods, draw])
    errors = generator.integers(0, 2**16, (count, heads, methods))
    errors[generator.random(errors.shape) < 0.1] = 0
    errors[::3] = errors[::3] // 2**12 * 2**12  # many equal ones
    saved = tuple(int(x) for x in generator.integers(0, 12, methods) * (generator.random(methods) < 0.9))
    saved = (*saved[:-1], saved[-1] or 7)  # one saves at least
    budgets = (generator.random(count) ** 2 * heads * 2**16).astype(int)
    budgets[:2] = 0, heads * 2**16
    bounds = np.where(generator.random(count) < 0.3, np.inf, np.maximum(budgets, 1) * 1.5 / heads * GRAIN)
    return np.float32(errors * GRAIN), saved, np.float32(budgets * GRAIN), np.float32(bounds)


def best(errors, saved, delta, bound):
    """What HiGHS saves at most."""
    heads, methods = errors.shape
    allowed = errors < bound
    one_each = LinearConstraint(np.kron(np.eye(heads), np.ones(methods)), -np.inf, 1)
    budget = LinearConstraint(np.where(allowed, errors, 0).reshape(1, -1) / GRAIN, -np.inf, delta / GRAIN)
    result = milp(
        -np.tile(np.array(saved, float), heads) * allowed.ravel(),
        constraints=[one_each, budget],
        integrality=np.ones(errors.size),
        bounds=Bounds(0, allowed.ravel().astype(float)),
        options={"mip_rel_gap": 0},
    )
    assert result.success, result.message
    return round(-result.fun)


def spent(picks, errors):
    """Errors of what was picked, in float64."""
    return sum(float(errors[head, pick]) for head, pick in enumerate(picks) if pick >= 0)


def won(picks, saved):
    return sum(saved[pick] for pick in picks if pick >= 0)


@pytest.mark.parametrize(("heads", "methods"), SHAPES)
def test_saves_as_much_as_highs(heads, methods):
    """200 instances of 10 shapes, in four draws of what methods save."""
    for draw in range(4):
        errors, saved, deltas, bounds = instances(heads, methods, 50, draw)
        picks = np.asarray(jax.jit(jax.vmap(partial(choose, saved=saved)))(errors, delta=deltas, bound=bounds))
        for pick, error, delta, bound in zip(picks, errors, deltas, bounds, strict=True):
            assert spent(pick, error) <= delta
            assert all(error[head, one] < bound for head, one in enumerate(pick) if one >= 0)
            assert won(pick, saved) == best(error, saved, delta, bound)


def test_ties_go_to_the_lower_error():
    """Against every choice of 5 heads and 2 methods."""
    errors, saved, deltas, bounds = instances(5, 2, 50)
    every = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    pick_one = jax.jit(partial(choose, saved=(3, 5)))
    for error, delta in zip(errors, deltas, strict=True):
        picks = np.asarray(pick_one(error, delta=delta, bound=np.inf))
        ranked = [(won(x, (3, 5)), -spent(x, error)) for x in every if spent(x, error) <= delta]
        assert (won(picks, (3, 5)), -spent(picks, error)) == max(ranked)


def test_any_floats_stay_within_the_budget():
    generator = np.random.default_rng(0)
    errors = generator.random((300, 24, 3), np.float32) ** 3
    deltas = generator.random(300).astype(np.float32)
    picks = np.asarray(jax.vmap(partial(choose, saved=(3, 2, 1), bound=np.inf))(errors, delta=deltas))
    saved = np.array([3, 2, 1, 0])
    for pick, error, delta in zip(picks, errors, deltas.astype(np.float64), strict=True):
        total = spent(pick, error)
        assert total <= delta
        now = np.append(error.astype(np.float64), np.zeros((24, 1)), 1)[np.arange(24), pick]
        better = saved[None, :3] > saved[pick][:, None]
        assert (total - now[:, None] + error > delta - 24 * 2.0**-24)[better].all()  # no head can do better alone


@pytest.mark.parametrize("delta", [0.2, 0.4, 0.6, 0.7, 0.8, 1.1, 2.3])
def test_a_budget_in_float64_is_kept(delta):
    """The nearest float32 may be above it: float32(0.6) is 0.60000002."""
    budget = Budget.of(delta, None, 1)
    just, above = budget.delta, np.float32(delta)
    assert float(just) <= delta < float(np.nextafter(np.float32(just), np.float32(9)))
    errors = jnp.asarray([[float(just)], [float(above)]], jnp.float32)
    for error in errors:
        picks = np.asarray(choose(error[None], (1,), budget.delta, budget.bound))
        assert spent(picks, np.asarray(error[None])) <= delta
    assert float(Budget.of(delta, 1.5, 24).bound) <= 1.5 * delta / 24


def test_what_is_never_chosen():
    errors = jnp.array([[jnp.nan, 0.1], [jnp.inf, 0.1], [0.0, 0.2]])
    assert choose(errors, (5, 0), 9.0, np.inf).tolist() == [-1, -1, 0]  # NaN, infinity, what saves nothing
    assert choose(errors, (0, 0), 9.0, np.inf).tolist() == [-1, -1, -1]
    assert choose(errors, (5, 4), 9.0, 0.2).tolist() == [1, 1, 0]
    assert choose(errors, (4, 5), 9.0, 0.2).tolist() == [1, 1, 0]  # a head's error must be below the bound
    assert choose(errors, (4, 4), 9.0, np.inf).tolist() == [1, 1, 0]  # of equal savings the lower error
    assert choose(errors, (4, 4), 0.0, np.inf).tolist() == [-1, -1, 0]


def test_heads_are_alike():
    generator = np.random.default_rng(1)
    errors, order = jnp.asarray(generator.random((12, 3), np.float32)), generator.permutation(12)
    pick = partial(choose, saved=(7, 5, 2), delta=1.5, bound=np.inf)
    np.testing.assert_array_equal(pick(errors[order]), np.asarray(pick(errors))[order])


def test_another_budget_compiles_nothing(compilations):
    pick = jax.jit(partial(choose, saved=(3, 1)))
    errors = jnp.ones((4, 2)) * 0.1
    pick(errors, delta=0.1, bound=1.0)
    assert compilations
    compilations.clear()
    kept = [np.asarray(pick(errors, delta=delta, bound=1.0)).tolist().count(-1) for delta in (0.05, 0.15, 0.25, 1.0)]
    assert kept == [4, 3, 2, 0] and compilations == []
