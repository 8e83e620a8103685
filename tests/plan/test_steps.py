"""The search for the steps that run the network, and what plans of them hold."""

import json
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from mutations import sample_plan, step_plan

from dfa2_jax import Plan, PlanError
from dfa2_jax.plan.setting import UnfittedRun, predicted_psnr
from dfa2_jax.plan.steps import MAX_GAP, StepSearch, count_for, euler_coefficients


def search_of(steps, seed=0, smooth=4):
    """Velocities that turn slowly, as a model's do, and growth that falls."""
    generator, time = np.random.default_rng(seed), np.linspace(0, 1, steps)
    basis = np.stack([np.cos(number * 2 * time) for number in range(smooth)], axis=1)
    velocities = basis @ generator.normal(size=(smooth, 50)) + 0.05 * generator.normal(size=(steps, 50))
    sigmas = np.append(np.linspace(1, 0.1, steps) ** 2, 0)
    return StepSearch(sigmas, velocities @ velocities.T / 50, np.linspace(9, 1, steps + 1) ** 2), velocities


def error_of(search, nodes):
    bounds = zip((None, *nodes), nodes, (*nodes[1:], search.num_steps), strict=False)
    return sum(search.move(*bound)[1] * search.growth[bound[2]] for bound in bounds)


def test_the_search_is_exact():
    """Against every choice of nodes."""
    search, _ = search_of(8)
    for count in range(1, 9):
        every = [(0, *rest) for rest in combinations(range(1, 8), count - 1)]
        best = min(every, key=lambda nodes: error_of(search, nodes))
        nodes = search.nodes(count)
        assert nodes.predicted_error == pytest.approx(error_of(search, best), abs=1e-12)
        assert error_of(search, nodes.steps) == pytest.approx(nodes.predicted_error, abs=1e-12)
    assert search.nodes(8).steps == tuple(range(8)) and search.nodes(8).predicted_error == 0


def test_an_error_is_what_the_velocities_miss():
    search, velocities = search_of(9)
    (now, last), error = search.move(2, 3, 7)
    wanted = np.diff(search.sigmas)[3:7] @ velocities[3:7]
    assert error == pytest.approx(np.mean((now * velocities[3] + last * velocities[2] - wanted) ** 2), rel=1e-4)
    best, *_ = np.linalg.lstsq(velocities[[3, 2]].T, wanted, rcond=None)
    np.testing.assert_allclose([now, last], best, rtol=1e-3)
    (now, last), error = search.move(None, 0, 4)
    assert last == 0 and error > 0
    assert search.move(3, 4, 5) == (pytest.approx([search.sigmas[5] - search.sigmas[4], 0]), 0)


def test_moves_of_a_converged_run_are_the_target():
    """A run whose moves are half as large again: so are the coefficients, and no step is exact by itself."""
    dense, velocities = search_of(9)
    moves = 1.5 * np.diff(dense.sigmas)[:, None] * velocities + 0.01 * np.random.default_rng(1).normal(size=(9, 50))
    vectors = np.concatenate([velocities, moves])
    search = StepSearch(dense.sigmas, vectors @ vectors.T / 50, dense.growth)
    assert search.num_steps == 9 and [*search.paths] == [*dense.paths]
    for bounds in ((None, 0, 1), (1, 2, 3), (2, 3, 7)):
        (now, last), error = search.move(*bounds)
        before, node, following = bounds
        made = now * velocities[node] + (0 if before is None else last * velocities[before])
        assert error == pytest.approx(np.mean((made - moves[node:following].sum(0)) ** 2), rel=1e-3)
    assert search.move(None, 0, 1)[0][0] == pytest.approx(1.5 * np.diff(dense.sigmas)[0], rel=0.05)
    assert search.nodes(9).predicted_error > 0 == dense.nodes(9).predicted_error


def test_gaps_have_an_end():
    search, _ = search_of(40)
    assert min(search.paths) == 3 and max(search.paths) == 40
    for nodes in search.paths.values():
        assert max(b - a for a, b in pairwise((*nodes, 40))) <= MAX_GAP
    with pytest.raises(ValueError, match="2 nodes of 40 steps: there must be 3 to 40"):
        search.nodes(2)


@pytest.mark.parametrize(
    ("speedup", "steps", "count"),
    [(2.0, 20, 10), (2.5, 20, 8), (3.3, 20, 6), (2.0, 28, 14), (2.9, 50, 17), (1.0, 7, 7)],
)
def test_a_plan_is_at_least_as_fast_as_was_asked(speedup, steps, count):
    assert count_for(speedup, steps) == count
    assert steps / count >= speedup > steps / (count + 1)


@pytest.mark.parametrize("speedup", [0.9, 10.1, 0.0, -2.0])
def test_a_speedup_that_no_plan_has(speedup):
    with pytest.raises(ValueError, match="must be from 1 to 10 for 20 steps"):
        count_for(speedup, 20)


def test_a_file_of_version_2_gives_the_plan_back(tmp_path):
    plan, path = step_plan(), tmp_path / "plan.json"
    plan.save(path)
    again, content = Plan.load(path), json.loads(path.read_text())
    assert again == plan and again.nodes == plan.nodes and again.step_calibration == plan.step_calibration
    np.testing.assert_array_equal(again.coefficients, plan.coefficients)
    assert content["version"] == 2 and len(content["steps"]) == len(content["nodes"])
    assert "4 of 9 steps" in repr(plan) and plan.cost() == pytest.approx(4 / 9)
    assert plan.with_method(1, 0, None, "cached").cost(0.5) < plan.cost(0.5) == plan.cost()
    every_other = plan.with_method([1, 3], None, None, "cached")  # half of attention and of projections
    assert every_other.cost(0.5, 0.1) == pytest.approx(4 / 9 * (1 - 0.25 - 0.05))


def test_a_plan_of_every_step_is_one_of_version_1(tmp_path):
    plan = sample_plan(3)
    every = Plan(plan.setting, plan.methods, plan.choices, plan.calibration, nodes=(0, 1, 2))
    assert every == plan and every.runs_every_step
    np.testing.assert_array_equal(every.coefficients, euler_coefficients(np.array(plan.setting.sigmas)))


def test_nodes_are_integers_of_any_sequence(no_shape_checks):
    plan = step_plan()
    nodes = np.array(plan.nodes)
    assert replace(plan, nodes=nodes.tolist()) == plan and replace(plan, nodes=tuple(nodes)).digest == plan.digest
    with pytest.raises(PlanError, match="integers must rise from 0 to at most 8"):
        replace(plan, nodes=(0, 1.5, 3, 5))


FAULTS = {
    "no first": ({"nodes": [1, 2, 3, 4]}, r"nodes are \[1, 2, 3, 4\]: integers must rise from 0 to at most 8"),
    "too late": ({"nodes": [0, 2, 3, 9]}, "integers must rise from 0 to at most 8"),
    "falling": ({"nodes": [0, 3, 2, 4]}, "integers must rise"),
    "fewer": ({"nodes": [0, 2, 3]}, "there are 4, but nodes are 3"),
    "no coefficients": ({"coefficients": None}, "nodes and coefficients: there is one without the other"),
    "other count": ({"coefficients": [[1.0, 0.0]]}, r"coefficients are \[1, 2\]: for 4 nodes, two finite numbers each"),
    "three": ({"coefficients": [[1.0, 0.0, 0.0]] * 4}, "coefficients.0"),
    "before the first": (
        {"coefficients": [[1.0, 0.1]] * 4},
        r"coefficients\[0\]\[1\] is 0.1, but there is no velocity",
    ),
    "growth": (lambda c: c["step_calibration"]["growth"].pop(), r"growth \(9,\) must be of 9 steps"),
    "gram": (lambda c: c["step_calibration"]["gram"][0].__setitem__(0, -1.0), "what no products of velocities are"),
    "asymmetric": (lambda c: c["step_calibration"]["gram"][0].__setitem__(1, 0.0), "gram is not symmetric"),
    "another target": (
        lambda c: c["step_calibration"].update(target="converged"),
        r"gram \(9, 9\) is not of a run with target='converged'",
    ),
    "rising": (lambda c: c["step_calibration"]["growth"].__setitem__(9, 5.0), "(?s)growth is .*: it never rises"),
    "no growth": (lambda c: c["step_calibration"].update(growth=[0.0] * 10), "(?s)from below 1e.12 to above 0"),
    "PSNR": (
        lambda c: c["step_calibration"]["unfitted"][1].update(measured_psnr=1e308),
        "unfitted.1.measured_psnr: Input should be less than or equal to 200",
    ),
    "error": (
        lambda c: c["step_calibration"]["unfitted"][0].update(predicted_error=-1.0),
        "unfitted.0.predicted_error: Input should be greater than or equal to 0",
    ),
    "no unfitted": (lambda c: c["step_calibration"].update(unfitted=[]), "unfitted: Tuple should have at least 1 item"),
    "an older one": (lambda c: c["step_calibration"].pop("unfitted"), "step_calibration.unfitted: Field required"),
    "shares": (
        lambda c: c["step_calibration"].update(attention_share=0.7, projection_share=0.4),
        "attention_share and projection_share are 1.1 of a step together, not 1 at most",
    ),
    "large": (lambda c: c["coefficients"][2].__setitem__(0, 1e300), r"coefficients go to 1e\+300: none .* above 100"),
    "version": ({"version": 1}, "version is 1, but its fields are those of 2"),
    "newer": ({"version": 3}, "version is 3, made by a newer dfa2_jax; this one reads up to 2"),
    "edited": ({"nodes": [0, 2, 3, 7]}, "it was edited or damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault, tmp_path):
    change, message = FAULTS[fault]
    path = tmp_path / "plan.json"
    step_plan().save(path)
    content = json.loads(path.read_text())
    change(content) if callable(change) else content.update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_another_budget_promises_the_same_from_every_plan_of_a_measurement(caplog):
    """Whether a plan ran, and how well, says nothing of others."""
    plan = step_plan()
    ran = plan.step_calibration.model_copy(update={"measured_error": 1e-3, "measured_psnr": 70.0})
    ran = replace(plan, step_calibration=ran)
    assert ran.step_calibration.psnr == 70
    caplog.clear()
    for budget in ({"psnr": 45.0}, {"speedup": 1.0}):
        again = ran.resolve(**budget)
        assert again == plan.resolve(**budget) and again.step_calibration.measured_psnr is None
    assert not caplog.records
    plan.resolve(psnr=30.0)
    assert "below 37 dB other prompts can be worse" in caplog.text


@pytest.mark.parametrize(
    ("runs", "error", "want"),
    [
        ([(1e-2, 30.0), (1e-4, 60.0)], 1e-2, 30.0),
        ([(1e-2, 30.0), (1e-4, 60.0)], 1e-3, 45.0),  # between them, a line
        ([(1e-4, 60.0), (1e-2, 30.0)], 1e-3, 45.0),
        ([(1e-2, 30.0), (1e-4, 60.0)], 1e-1, 15.0),  # below them, the same one
        ([(1e-2, 30.0), (1e-4, 35.0)], 1e-1, 20.0),  # 1 dB for each dB at least
        ([(1e-2, 30.0), (1e-4, 60.0)], 1e-7, 90.0),  # above them, dB for dB
        ([(1e-2, 30.0), (1e-4, 60.0)], 1e-11, 120.0),  # 130 would be more than equal images have
        ([(1e-2, 30.0), (1e-4, 60.0)], 0.0, 120.0),
        ([(1e-2, 30.0)], 1e-3, 40.0),
        ([(1e-2, 30.0)], 1e-1, 20.0),
        ([(1e-2, 33.0), (1e-4, 32.0)], 1e-3, 33.0),  # a smaller error never has less
        ([(1e-2, 33.0), (1e-4, 32.0)], 1e-5, 43.0),
        ([(1e-3, 30.0), (1e-3, 33.0)], 1e-3, 33.0),
        ([(1e-3, 30.0), (1e-3, 33.0)], 1e-2, 20.0),  # from the lower one, as there is no slope
        ([(0.0, 32.0), (1e-2, 30.0)], 1e-3, 40.0),  # one without error is the target's own
        ([(0.0, 32.0)], 0.0, 120.0),
        ([(0.0, 120.0)], 1e-3, 30.0),
    ],
)
def test_runs_say_what_psnr_an_error_comes_to(runs, error, want):
    runs = [UnfittedRun(predicted_error=expected, measured_psnr=measured) for expected, measured in runs]
    assert predicted_psnr(runs, error) == pytest.approx(want)


@pytest.mark.parametrize("seed", range(5))
def test_more_nodes_never_promise_less(seed):
    """Flows are smooth or noise, and the two runs may contradict the search."""
    generator = np.random.default_rng(seed)
    search, _ = search_of(int(generator.integers(2, 14)), seed, smooth=1 + 2 * seed)
    errors = [search.nodes(count).predicted_error for count in sorted(search.paths)]
    assert all(a >= b for a, b in pairwise(errors))
    runs = [UnfittedRun(predicted_error=float(generator.uniform()), measured_psnr=float(x)) for x in (40, 30)]
    kept = [predicted_psnr(runs, error) for error in errors]
    assert all(a <= b for a, b in pairwise(kept))


def test_another_budget_needs_no_model():
    plan = step_plan()
    faster = plan.resolve(speedup=3.0)
    assert len(faster.nodes) == 3 and faster.step_calibration.measured_error is None
    assert faster.step_calibration.psnr < plan.resolve(speedup=1.5).step_calibration.psnr
    assert faster.resolve(speedup=9 / 4).nodes == plan.nodes
    near = plan.resolve(psnr=30.0)
    assert near.step_calibration.psnr >= 33.0 > plan.resolve(speedup=9 / (len(near.nodes) - 1)).step_calibration.psnr
    assert len(plan.resolve(psnr=150.0).nodes) == 9
    every = plan.resolve(speedup=1.0)
    assert every.runs_every_step and every.cost() == 1 and every == every.resolve(psnr=150.0)
    for budget, message in (
        ({}, "one of speedup, psnr must be given, not none"),
        ({"speedup": 2.0, "psnr": 40.0}, "not speedup=2.0 and psnr=40.0"),
        ({"speedup": float("nan")}, "speedup=nan must be a finite number"),
        ({"speedup": 10.0}, "must be from 1 to 9 for 9 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            plan.resolve(**budget)
    with pytest.raises(PlanError, match="has no step_calibration"):
        sample_plan(0).resolve(speedup=2.0)
