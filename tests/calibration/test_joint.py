"""How plans of steps and heads learn from their own runs: without a model."""

from types import SimpleNamespace

import numpy as np
import pytest
from checkout import ROOT

from dfa2_jax import Plan
from dfa2_jax.calibration.attention_share import StepShares
from dfa2_jax.calibration.joint import LEFT, JointPlans
from dfa2_jax.plan.method import CACHED_METHOD, FULL_METHOD

SETTING = Plan.load(ROOT / "dfa2_jax/demo/plan.json").setting


class Paths:
    """Heads that reuse at the last node, and a sum of amplitudes of their errors."""

    def __init__(self, count, amplitude):
        self.count, self.sum = count, amplitude

    def amplitude(self, choices):
        return self.sum

    def nearest(self, cost):
        choices = np.zeros((self.count, len(SETTING.layers), SETTING.num_heads), np.int64)
        choices[-1] = 1
        return choices


def joint(amplitudes, predicted, measured):
    """By number of nodes, the sum of heads' amplitudes, and the errors of steps as predicted and as a run measures."""
    ran = []

    def fitted(nodes, plan, **shares):
        assert plan.nodes == nodes.steps and (plan.choices[-1] == 1).all()
        ran.append(len(nodes.steps))
        record = SimpleNamespace(measured_error=measured[len(nodes.steps)])
        return SimpleNamespace(nodes=nodes.steps, step_calibration=record)

    def nodes_of(count):
        return SimpleNamespace(steps=tuple(range(count)), predicted_error=predicted[count])

    search = SimpleNamespace(sigmas=None, growth=None, num_steps=SETTING.num_inference_steps, nodes=nodes_of)
    steps = SimpleNamespace(search=search, fitted=fitted, runs=SimpleNamespace(call=SimpleNamespace(setting=SETTING)))
    heads = SimpleNamespace(methods=(FULL_METHOD, CACHED_METHOD), shares=StepShares(1.0, 0.0), tiles=(16, 16))
    plans = JointPlans(steps, heads, tables=None)
    plans.paths = lambda nodes: Paths(len(nodes.steps), amplitudes[len(nodes.steps)])
    plans._counts = lambda alone: [nodes_of(count) for count in amplitudes]
    return plans, ran


@pytest.mark.parametrize(("measured", "left"), [(0.49, 0.3), (0.0001, LEFT / 10)])
def test_a_run_shows_how_much_of_the_sum_of_amplitudes_is_left(measured, left, no_shape_checks):
    plans, _ = joint({3: 2.0}, {3: 0.01}, {3: measured})
    assert plans.left == LEFT
    plans.for_speedup(2.0, None)
    assert plans.left == pytest.approx(left)  # (0.7 - 0.1) / 2, or the least


@pytest.mark.parametrize(("measured", "runs"), [(0.62**2, [3, 5]), (0.9**2, [3])])
def test_plans_run_while_one_is_nearer_by_what_is_left(measured, runs, no_shape_checks):
    # Steps and heads are 0.6 + 0.1, 0.5 + 0.3 and 0.2 + 0.9. With 0.6 of heads, the first has least: 0.66. It shows
    # that 0.2 is left, and the third has 0.38; or 3, and none has less than 0.9.
    plans, ran = joint({3: 0.1, 4: 0.3, 5: 0.9}, {3: 0.36, 4: 0.25, 5: 0.04}, {3: measured, 4: 0.01, 5: 0.01})
    best = plans.for_speedup(2.0, None)
    assert ran == runs and len(best.nodes) == runs[-1]
