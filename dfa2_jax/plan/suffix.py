"""A plan for a run that begins late, as one from a picture does."""

import numpy as np

from dfa2_jax.plan.method import FULL_METHOD, PlanError
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.steps import euler_coefficients


def from_step(plan: Plan, first: int) -> Plan:
    """The plan of the steps from this one on.

    The first step runs in full, whatever the plan says of it: nothing is there to reuse. Where the plan leaves it out,
    it runs all the same. The first move is Euler's, and later ones are the plan's. Moves that were fitted anew by the
    calibration's velocities kept no more (docs/pictures.md).

    Raises:
        PlanError: the plan has no such step.
    """
    if not first:
        return plan
    if first >= (steps := plan.setting.num_inference_steps):
        raise PlanError(f"the plan is of {steps} steps, and the picture starts after {first}: leave steps to the plan.")
    setting = plan.setting.model_copy(update={"sigmas": plan.setting.sigmas[first:]})
    later = [number for number, node in enumerate(plan.nodes) if node > first]
    nodes = (first, *(plan.nodes[number] for number in later))
    methods = plan.methods if FULL_METHOD in plan.methods else (*plan.methods, FULL_METHOD)
    full = np.full_like(plan.choices[:1], methods.index(FULL_METHOD))
    kept = {"methods": methods, "choices": np.concatenate([full, plan.choices[later]])}
    if plan.runs_every_step:
        return Plan(setting, **kept)
    coefficients = np.concatenate([np.zeros((1, 2)), plan.coefficients[later]])
    coefficients[0] = euler_coefficients(np.asarray(plan.setting.sigmas)[[*nodes, -1]])[0]
    return Plan(setting, **kept, nodes=tuple(node - first for node in nodes), coefficients=coefficients)
