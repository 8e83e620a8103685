"""Steps and heads for one budget: heads are spared where that is nearer to the target than sparing steps."""

from dataclasses import dataclass

import numpy as np

from dfa2_jax.calibration.heads import HeadRuns
from dfa2_jax.calibration.steps import StepPlans, keeps
from dfa2_jax.plan.heads import HeadChoices, HeadTables, Paths
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import MARGIN
from dfa2_jax.plan.steps import Nodes

WORTHWHILE = 0.3
"""The least share of a dense step's time that attention must have, or steps alone are planned. FLUX.1-dev has 0.2 at
1024 px and 0.5 at 2048 px. At 0.2 heads save a fifth at most."""

RUNS = 4
"""Runs of plans with heads, at most: each tells how much of the sum of amplitudes is left at the end."""

LEFT = 0.6
"""The share of the sum of amplitudes that is left, before the first run has shown it: 0.6 for the model in the box."""

COUNTS = 8
"""Numbers of nodes that are tried, at most, evenly spread over all that could do."""


@dataclass
class JointPlans:
    """Plans of steps and heads of one call."""

    steps: StepPlans
    heads: HeadRuns
    tables: HeadTables
    scale: float = 1.0
    """Measured amplitude of a plan of steps alone, for each predicted one."""
    left: float = LEFT

    def paths(self, nodes: Nodes) -> Paths:
        return self.tables.at(nodes, self.steps.search.sigmas, self.steps.search.growth)

    def fitted(self, nodes: Nodes, choices: HeadChoices) -> Plan:
        """The plan of these nodes and heads, after its own run; what it teaches of amplitudes is kept."""
        call = self.steps.runs.call
        table, numbers = np.unique(choices, return_inverse=True)
        methods = tuple(self.heads.methods[number] for number in table)
        plan = Plan(call.setting, methods, numbers.reshape(choices.shape).astype(np.uint8), nodes=nodes.steps)
        plan = self.steps.fitted(
            nodes,
            None if plan.heads_are_full else plan,
            attention_share=self.heads.shares.attention,
            projection_share=self.heads.shares.projections,
            tiles=self.heads.tiles,
        )
        assert plan.step_calibration is not None and plan.step_calibration.measured_error is not None
        of_heads = np.sqrt(plan.step_calibration.measured_error) - self.of_steps(nodes)
        amplitude = self.paths(nodes).amplitude(choices)
        if amplitude > 0:
            self.left = max(float(of_heads) / amplitude, LEFT / 10)
        return plan

    def of_steps(self, nodes: Nodes) -> float:
        """Predicted amplitude of the nodes alone."""
        return self.scale * float(np.sqrt(nodes.predicted_error))

    def for_budget(self, alone: Plan | None, *, speedup: float | None, psnr: float | None) -> Plan:
        """A plan for one budget, as in `StepPlans.for_budget`; `alone`, of steps alone, where heads do not pay.

        Args:
            alone: None: every step runs, and heads alone are spared.
        """
        if alone is not None and (predicted := self.steps.search.nodes(len(alone.nodes)).predicted_error) > 0:
            self.scale = float(np.sqrt(error_of(alone) / predicted))
        if speedup is not None:
            return self.for_speedup(speedup, alone)
        assert psnr is not None
        return self.for_psnr(psnr, alone)

    def for_speedup(self, speedup: float, alone: Plan | None) -> Plan:
        """The nearest to the target that is so fast."""
        best, options = alone, []
        for nodes in self._counts(alone):
            paths = self.paths(nodes)
            if (choices := paths.nearest(self.steps.search.num_steps / speedup)) is None:
                break  # more nodes cost more
            options.append((nodes, choices, paths.amplitude(choices)))
        for _ in range(min(RUNS, len(options))):
            amplitudes = [self.of_steps(nodes) + self.left * amplitude for nodes, _, amplitude in options]
            place = int(np.argmin(amplitudes))
            if best is not None and amplitudes[place] ** 2 >= error_of(best):
                break
            nodes, choices, _ = options.pop(place)
            plan = self.fitted(nodes, choices)
            if best is None or error_of(plan) < error_of(best):
                best = plan
        assert best is not None, "check_speedup let it pass"
        return best

    def for_psnr(self, psnr: float, alone: Plan | None) -> Plan:
        """The fastest that keeps `MARGIN` above what is asked."""
        steps = self.steps.search.num_steps
        best, last = alone, np.zeros(0)
        allowed = 10 ** ((self.steps.psnr_offset - psnr - MARGIN) / 20)
        for _ in range(RUNS):
            options = []
            for nodes in self._counts(alone):
                paths = self.paths(nodes)
                if (spare := allowed - self.of_steps(nodes)) > 0:
                    choices = paths.cheapest(spare / self.left)
                    options.append((paths.cost(choices), nodes, choices))
            cost, nodes, choices = min(options, key=lambda option: option[0], default=(np.inf, None, last))
            dearest = np.inf if best is None else best.cost() * steps
            if nodes is None or cost >= dearest or np.array_equal(last, choices):
                break
            plan, last = self.fitted(nodes, choices), choices
            if keeps(plan, psnr):
                best = plan
        return best or self.steps.of_every_step(psnr)

    def _counts(self, alone: Plan | None) -> list[Nodes]:
        """More nodes than those of steps alone, whose heads have to make up for them; without that, all steps."""
        steps = self.steps.search.num_steps
        if alone is None:
            return [self.steps.search.nodes(steps)]
        fewest = len(alone.nodes)
        most = min(steps, int(fewest / max(1 - self.tables.largest_saving, 1 / steps)))
        counts = np.unique(np.linspace(fewest + 1, most, COUNTS).round().astype(int)) if most > fewest else []
        return [self.steps.search.nodes(int(count)) for count in counts]


def error_of(plan: Plan) -> float:
    """Measured, of the latents."""
    assert plan.step_calibration is not None and plan.step_calibration.measured_error is not None
    return plan.step_calibration.measured_error
