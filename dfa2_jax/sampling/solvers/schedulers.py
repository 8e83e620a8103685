"""Schedulers of flow matching by diffusers' names: noise levels, times and solver of each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from dfa2_jax.sampling.solvers.base import Solver
from dfa2_jax.sampling.solvers.dpm_multistep import FLOW, FlowDPM, dpm_levels
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep, flow_match_sigmas

Levels = Sequence[float] | np.ndarray
Steps = tuple[Float[np.ndarray, " levels"], Real[np.ndarray, " steps"], Solver]
"""Noise levels, times out of 1,000 as diffusers has them (DPM's are integers), and the solver."""


def _euler(config: Mapping[str, Any], sigmas: Levels | None, default: Levels | int, num_visual: int) -> Steps:
    levels = flow_match_sigmas(config, default if sigmas is None else sigmas, num_visual)
    return levels, levels[:-1] * np.float32(1000), FlowMultistep.euler(levels)


def _dpm(config: Mapping[str, Any], sigmas: Levels | None, default: Levels | int, num_visual: int) -> Steps:
    if sigmas is not None:
        raise ValueError(
            f"sigmas={sigmas!r:.100}: DPMSolverMultistepScheduler makes its own. Pass num_inference_steps."
        )
    levels, times = dpm_levels(config, default if isinstance(default, int) else len(default), num_visual)
    return levels, times, FlowDPM.of(levels)


EULER, DPM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
FLOW_SCHEDULERS: dict[str, Callable[..., Steps]] = {EULER: _euler, DPM: _dpm}
SAMPLERS = {EULER: "Euler", DPM: "DPM++ 2M"}
"""As AUTOMATIC1111's web UI names them."""


def flow_steps(config: Mapping[str, Any], sigmas: Levels | None, default: Levels | int, num_visual: int) -> Steps:
    """The steps of a call.

    Args:
        config: scheduler_config.json.
        sigmas: noise levels before the shift, of a scheduler that takes them.
        default: what the model takes in their place: such levels, or a number of steps for the scheduler's own.
        num_visual: visual tokens, on which a dynamic shift depends.

    Raises:
        ValueError: the config asks for what is not implemented or lacks a number, or the scheduler takes no sigmas.
    """
    return FLOW_SCHEDULERS[config.get("_class_name", EULER)](config, sigmas, default, num_visual)


def check_flow_scheduler(config: Mapping[str, Any]) -> None:
    """Make schedules, so that a scheduler_config.json that cannot is seen before any weight is.

    Raises:
        ValueError: as `flow_steps`, or its sigmas are not finite.
    """
    if (name := config.get("_class_name", EULER)) not in FLOW_SCHEDULERS:
        raise ValueError(f"scheduler {name!r:.100} is not supported: {' and '.join(FLOW_SCHEDULERS)} are.")
    for default in (2, [1.0, 0.5]):
        levels, _, _ = flow_steps(config, None, default, 4096)
        if not np.isfinite(levels).all():
            raise ValueError(f"its sigmas are {levels.tolist()}")


def named_config(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a scheduler that a call gives by its name alone, by the folder's own: diffusers' `from_config`.

    Between the two schedulers here a fixed shift changes its name.
    """
    shift = own.get("flow_shift", own.get("shift", 1.0))
    other = {**FLOW, "flow_shift": shift} if name == DPM else {"shift": shift}
    return {**own, **other, "_class_name": name}
