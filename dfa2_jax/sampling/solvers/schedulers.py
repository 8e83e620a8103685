"""Schedulers by diffusers' names: noise levels, times and solver of each."""

import logging
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from jaxtyping import Float, Real

from dfa2_jax.sampling.solvers.base import Solver
from dfa2_jax.sampling.solvers.cogvideox_dpm import CogVideoXDPM
from dfa2_jax.sampling.solvers.ddim import ScaledMultistep
from dfa2_jax.sampling.solvers.dpm_multistep import FLOW, FlowDPM, dpm_levels
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep, flow_match_sigmas
from dfa2_jax.sampling.solvers.unipc import FlowUniPC, unipc_levels
from dfa2_jax.sampling.solvers.variance_preserving import DEFAULTS, AlphaSteps, alpha_steps, noise_levels

logger = logging.getLogger("dfa2_jax")

Levels = Sequence[float] | np.ndarray
Steps = tuple[Float[np.ndarray, " levels"], Real[np.ndarray, " steps"], Solver]
"""Noise levels, times out of 1,000 as diffusers has them (Euler's alone are no integers), and the solver."""


def _euler(config: Mapping[str, Any], sigmas: Levels | None, default: Levels | int, num_visual: int) -> Steps:
    levels = flow_match_sigmas(config, default if sigmas is None else sigmas, num_visual)
    return levels, levels[:-1] * np.float32(1000), FlowMultistep.of(levels)


def _own_levels(
    name: str, levels_of: Callable[..., Any], solver: Callable[[np.ndarray], Solver]
) -> Callable[..., Steps]:
    """The steps of a scheduler that makes its own sigmas."""

    def steps_of(config: Mapping[str, Any], sigmas: Levels | None, default: Levels | int, num_visual: int) -> Steps:
        if sigmas is not None:
            raise ValueError(f"sigmas={sigmas!r:.100}: {name} makes its own. Pass num_inference_steps.")
        levels, times = levels_of(config, default if isinstance(default, int) else len(default), num_visual)
        return levels, times, solver(levels)

    return steps_of


def _ddim(steps: AlphaSteps) -> Solver:
    return ScaledMultistep.ddim(noise_levels(steps.now), noise_levels(steps.after))


EULER, DPM, UNIPC = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
FLOW_SCHEDULERS: dict[str, Callable[..., Steps]] = {
    EULER: _euler,
    DPM: _own_levels(DPM, dpm_levels, FlowDPM.of),
    UNIPC: _own_levels(UNIPC, unipc_levels, FlowUniPC.of),
}
VP_DDIM, VP_DPM = "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"
VP_SCHEDULERS: dict[str, Callable[[AlphaSteps], Solver]] = {VP_DDIM: _ddim, VP_DPM: CogVideoXDPM.of}
FLOW_SETTINGS = (
    *("num_train_timesteps", "shift", "flow_shift", "use_dynamic_shifting", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len", "invert_sigmas", "shift_terminal", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"),
    *("prediction_type", "algorithm_type", "solver_order", "solver_type", "final_sigmas_type", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value", "lower_order_final", "euler_at_final", "lambda_min_clipped"),
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "variance_type", "timestep_spacing", "steps_offset"),
    *("rescale_betas_zero_snr", "time_shift_type", "sigma_min", "sigma_max", "predict_x0"),
    *("disable_corrector", "solver_p"),
)
"""What diffusers' configs of these schedulers hold. One made from another's holds that one's, too."""

VP_SETTINGS = (*DEFAULTS, "clip_sample_range", "sample_max_value")
SETTINGS = dict.fromkeys(FLOW_SCHEDULERS, FLOW_SETTINGS) | dict.fromkeys(VP_SCHEDULERS, VP_SETTINGS)
"""By scheduler."""

SAMPLERS = {EULER: "Euler", DPM: "DPM++ 2M", UNIPC: "UniPC", VP_DDIM: "DDIM", VP_DPM: "DPM++ 2M SDE"}
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


def vp_steps(config: Mapping[str, Any], sigmas: Levels | None, steps: int) -> Steps:
    """The steps of a call to a model that predicts v, of variance-preserving latents.

    Noise levels are those of flow matching after scaling (`variance_preserving.noise_levels`). A warning tells of a
    number of steps after which noise is left: diffusers leaves the same.

    Args:
        config: scheduler_config.json.
        sigmas: None, for these schedulers take none.
        steps: how many.

    Raises:
        ValueError: the config asks for what is not implemented, the scheduler has no such number of steps, or sigmas
            are given.
    """
    name = config.get("_class_name", VP_DDIM)
    if sigmas is not None:
        raise ValueError(f"sigmas={sigmas!r:.100}: {name} makes its own. Pass num_inference_steps.")
    schedule = alpha_steps(config, steps)
    levels = noise_levels(np.append(schedule.now, schedule.after[-1]))
    if not schedule.is_last[-1]:
        fewer = next(number for number in range(steps - 1, 0, -1) if _leads_to_the_end(config, number))
        logger.warning(
            "num_inference_steps=%d: the last step leaves noise of level %.2g, as in diffusers. "
            "%d steps lead to the end.", steps, levels[-1], fewer,
        )  # fmt: skip
    return levels.astype(np.float32), schedule.timesteps, VP_SCHEDULERS[name](schedule)


def _leads_to_the_end(config: Mapping[str, Any], steps: int) -> bool:
    try:
        return bool(alpha_steps(config, steps).is_last[-1])
    except ValueError:  # the scheduler has no such number of steps
        return False


def check_vp_scheduler(config: Mapping[str, Any]) -> None:
    """Make a schedule, so that a scheduler_config.json that cannot is seen before any weight is.

    Raises:
        ValueError: as `vp_steps`, or the scheduler is another.
    """
    if (name := config.get("_class_name", VP_DDIM)) not in VP_SCHEDULERS:
        raise ValueError(f"scheduler {name!r:.100} is not supported: {' and '.join(VP_SCHEDULERS)} are.")
    alpha_steps(config, 2)


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuses names that a scheduler has not: a misspelt one would be of no effect. Private ones begin with "_".

    Settings of a family's own scheduler, which is none of those here, are not checked.

    Raises:
        ValueError: holds the nearest name.
    """
    settings = SETTINGS.get(config.get("_class_name", EULER))
    if settings is None:
        return
    for name in config:
        if name not in settings and not (isinstance(name, str) and name.startswith("_")):
            nearest = get_close_matches(str(name), settings, 1)
            advice = f"did you mean {nearest[0]!r}?" if nearest else "leave it out."
            raise ValueError(f"{name!r:.100} is no setting of a scheduler: {advice}")


def named_config(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a scheduler that a call gives by its name alone, by the folder's own: diffusers' `from_config`.

    Between the schedulers of flow matching a fixed shift changes its name, and a solver its type. Those of CogVideoX
    have the same settings, all of which `from_config` keeps. Published model cards pass `timestep_spacing="trailing"`
    with it, and a name alone means the same here.
    """
    if name in VP_SCHEDULERS:
        return {**own, "timestep_spacing": "trailing", "_class_name": name}
    shift = own.get("flow_shift", own.get("shift", 1.0))
    if name == EULER:
        return {**own, "shift": shift, "_class_name": name}
    kind = "midpoint" if name == DPM else "bh2"
    return {**own, **FLOW, "flow_shift": shift, "solver_type": kind, "_class_name": name}
