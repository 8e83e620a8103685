"""UniPC for flow matching, and its noise levels: diffusers' `UniPCMultistepScheduler`."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.base import Latents
from dfa2_jax.sampling.solvers.dpm_multistep import FLOW, check_only
from dfa2_jax.sampling.solvers.flow_euler import positive, shifted

ONLY = {
    "predict_x0": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "solver_p": None,
    "disable_corrector": [],
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""What a config may say: diffusers' defaults."""

BELOW_ONE = 1e-6
"""How far below 1 the first level is kept: its logarithmic signal-to-noise ratio is infinite at 1."""


@carrier
class UniPCState:
    """What the solver carries.

    corrected: latents before the last step, corrected.
    clean, clean_before: clean latents as the last step predicted them, and the step before.
    """

    corrected: Float[Array | np.ndarray, "B V C"]
    clean: Float[Array | np.ndarray, "B V C"]
    clean_before: Float[Array | np.ndarray, "B V C"]


@carrier
class FlowUniPC:
    """UniPC of second order with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 1 and 2), where alpha is 1 - sigma.

    A step predicts clean latents `x - sigma v` at x. By them it makes the last step anew (the corrector), then goes on
    from there (the predictor). So the network runs once a step.
    """

    coefficients: Float[Array | np.ndarray, "padded_steps 9"]
    """The noise level. Corrected latents' coefficients of latents, of corrected latents before the last step, and of
    clean latents: these, the last and those before. Next latents' of corrected ones, these and the last clean ones."""

    @classmethod
    def of(cls, sigmas: Float[np.ndarray, " levels"]) -> "FlowUniPC":
        """The solver for noise levels in (0, 1) and a final 0. The first and the last step are of the first order."""
        sigmas = sigmas.astype(np.float64)
        snr = np.log1p(-sigmas[:-1]) - np.log(sigmas[:-1])
        steps = len(snr)
        table = np.zeros((steps, 9))
        table[:, 0], table[0, 1] = sigmas[:-1], 1
        for i in range(steps - 1):
            ahead, alpha = snr[i + 1] - snr[i], 1 - sigmas[i + 1]
            kept, gain = sigmas[i + 1] / sigmas[i], -alpha * np.expm1(-ahead)
            back = (snr[i - 1] - snr[i]) / ahead if i else None
            change = 0.5 * gain / back if back is not None else 0.0
            table[i, 6:] = kept, gain - change, change
            now, before = _corrector(ahead, back)
            table[i + 1, 2:6] = kept, gain * now, gain * (1 - now - before), gain * before
        table[-1, 7] = 1  # the clean latents
        return cls(pad_steps(table.astype(np.float32)))

    def init(self, x: Latents) -> UniPCState:
        return UniPCState(np.zeros_like(x), np.zeros_like(x), np.zeros_like(x))

    def step(
        self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: UniPCState
    ) -> tuple[Latents, UniPCState]:
        sigma, kept, *corrector, keep, now, last = jnp.asarray(self.coefficients)[i]
        clean = x - sigma * prediction
        terms = (state.corrected, clean, state.clean, state.clean_before)
        corrected = kept * x + sum(part * term for part, term in zip(corrector, terms, strict=True))
        return keep * corrected + now * clean + last * state.clean, UniPCState(corrected, clean, state.clean)


def _corrector(ahead: float, back: float | None) -> tuple[float, float]:
    """Parts of the clean latents after a step, and of those before it; the rest is of those at it.

    Args:
        ahead: how far the step leads in the logarithmic signal-to-noise ratio.
        back: from the step to the one before it, in units of `ahead`; None at the first step.
    """
    if back is None:
        return 0.5, 0.0
    slope = np.expm1(-ahead)
    second = -slope / ahead - 1
    third = -second / ahead - 0.5
    before, now = np.linalg.solve([[1, 1], [back, 1]], [second / slope, 2 * third / slope])
    return now, before / back


def unipc_levels(
    config: Mapping[str, Any], steps: int, num_visual: int
) -> tuple[Float[np.ndarray, " levels"], Int[np.ndarray, " steps"]]:
    """Noise levels and times, as diffusers' `set_timesteps` makes them: times are whole numbers.

    Raises:
        ValueError: the config asks for what is not implemented, or lacks a number.
    """
    check_only(config, FLOW | ONLY)
    train = positive(config, "num_train_timesteps", 1000)
    levels = shifted(config, np.linspace(1, 1 / train, steps + 1)[:-1], positive(config, "flow_shift", 1.0), num_visual)
    if abs(levels[0] - 1) < BELOW_ONE:
        levels[0] -= BELOW_ONE
    times = (levels * train).astype(np.int64)
    levels = np.append(levels, 0).astype(np.float32)
    if not (np.diff(levels) < 0).all() or not levels[0] < 1:
        raise ValueError(f"scheduler_config.json: its {steps} noise levels {levels!s:.100} do not fall from below 1.")
    return levels, times
