"""DPM-Solver++(2M) for flow matching, and its noise levels: diffusers' `DPMSolverMultistepScheduler`."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.base import Latents
from dfa2_jax.sampling.solvers.flow_euler import dynamic_shift, positive

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""What a config must say: diffusers' defaults are of other models."""

ONLY = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "time_shift_type": "exponential",
}
"""What a config may say: diffusers' defaults. Diffusers' other sigmas are of no flow, and make NaN."""


@carrier
class FlowDPM:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), where alpha is 1 - sigma.

    Its first order is Euler's step. The second adds a part of what the clean latents `x - sigma v` have changed by
    since the last step. They are the solver's state.
    """

    coefficients: Float[Array | np.ndarray, "padded_steps 3"]
    """The noise level, Euler's step, and the part of the change."""

    @classmethod
    def of(cls, sigmas: Float[np.ndarray, " levels"]) -> "FlowDPM":
        """The solver for noise levels in (0, 1) and a final 0. The first and the last step are of the first order."""
        now, after = sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64)
        changes = np.zeros(len(now))
        if len(now) > 2:
            snr = np.log((1 - now) / now)
            last, ahead = np.diff(snr)[:-1], np.diff(snr)[1:]
            scale = (1 - now[1:-1]) * after[1:-1] / now[1:-1] - (1 - after[1:-1])
            changes[1:-1] = -scale * ahead / last / 2
        return cls(pad_steps(np.stack([now, after - now, changes], axis=1).astype(np.float32)))

    def init(self, x: Latents) -> Latents:
        return np.zeros_like(x)

    def step(self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Latents) -> tuple[Latents, Latents]:
        sigma, move, change = jnp.asarray(self.coefficients)[i]
        clean = x - sigma * prediction
        return x + move * prediction + change * (clean - state), clean


def check_only(config: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Refuses what is not implemented: `FLOW` must be said, the rest may be.

    Raises:
        ValueError: names the setting.
    """
    for name, wanted in only.items():
        value = config.get(name, None if name in FLOW else wanted)
        if value != wanted:
            raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not supported: only {wanted!r} is.")


def dpm_levels(
    config: Mapping[str, Any], steps: int, num_visual: int
) -> tuple[Float[np.ndarray, " levels"], Int[np.ndarray, " steps"]]:
    """Noise levels and times, as diffusers' `set_timesteps` makes them: times are whole numbers.

    Raises:
        ValueError: the config asks for what is not implemented, or lacks a number.
    """
    check_only(config, FLOW | ONLY)
    train = positive(config, "num_train_timesteps", 1000)
    if config.get("use_dynamic_shifting", False):
        shift = math.exp(dynamic_shift(config, num_visual))
    else:
        shift = positive(config, "flow_shift", 1.0)
    even = 1 - np.linspace(1, 1 / train, steps + 1)
    levels = np.flip(shift * even / (1 + (shift - 1) * even))
    times = (levels[:-1] * train).astype(np.int64)
    levels = levels.astype(np.float32)
    if not (np.diff(levels) < 0).all() or not levels[0] < 1:
        raise ValueError(f"scheduler_config.json: its {steps} noise levels {levels!s:.100} do not fall from below 1.")
    return levels, times
