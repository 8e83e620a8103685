"""Noise levels and times of variance-preserving diffusion, as diffusers' schedulers of CogVideoX make them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dfa2_jax.sampling.solvers.flow_euler import positive

DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": 3.0,
    "thresholding": False,
}
"""What diffusers takes where a config says nothing. Its own clip_sample is True there, and of no effect."""

ONLY = {"prediction_type": "v_prediction", "trained_betas": None, "thresholding": False}
"""What a config may say."""

CHOICES = {
    "beta_schedule": ("scaled_linear", "linear"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": (True, False),
}
MOST_TIMES = 10_000
"""Training timesteps are a table, whose length a config decides."""


@dataclass(frozen=True)
class AlphaSteps:
    """Steps of a schedule: where each begins, and where it leads.

    diffusers looks for the end of a step at `timestep - 1000 // steps`, not at the next timestep. The two differ where
    the number of steps does not divide 1,000.

    now: the cumulative product of alphas at the timestep. Latents are `sqrt(now) clean + sqrt(1 - now) noise`.
    after: the same, where the step leads.
    is_last: whether a step leads beyond the first training timestep.
    """

    timesteps: Int[np.ndarray, " steps"]
    now: Float[np.ndarray, " steps"]
    after: Float[np.ndarray, " steps"]
    is_last: Bool[np.ndarray, " steps"]


def alpha_steps(config: Mapping[str, Any], steps: int) -> AlphaSteps:
    """Timesteps and alphas of a scheduler_config.json, float64.

    Raises:
        ValueError: the config asks for what is not implemented, or the scheduler has no such number of steps.
    """
    alphas = alphas_cumprod(config)
    timesteps = timesteps_of(config, steps)
    previous = timesteps - len(alphas) // steps
    final = 1.0 if _setting(config, "set_alpha_to_one") else alphas[0]
    after = np.where(previous >= 0, alphas[np.maximum(previous, 0)], final)
    return AlphaSteps(timesteps, alphas[timesteps], after, previous < 0)


def alphas_cumprod(config: Mapping[str, Any]) -> Float[np.ndarray, " train_steps"]:
    """Cumulative products of `1 - beta`, shifted in SNR and rescaled to end at 0 (arXiv 2305.08891).

    diffusers takes linear betas in float32, and all that is made of them; those whose roots are linear in float64.

    Raises:
        ValueError: the config asks for what is not implemented, or lacks a number.
    """
    _check(config)
    train = _train_steps(config)
    start, end = (_beta(config, name) for name in ("beta_start", "beta_end"))
    if _setting(config, "beta_schedule") == "linear":
        betas = np.linspace(start, end, train, dtype=np.float32)
        alphas = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
    else:
        alphas = np.cumprod(1 - np.linspace(start**0.5, end**0.5, train) ** 2)
    shift = positive(config, "snr_shift_scale", DEFAULTS["snr_shift_scale"])
    alphas = alphas / (shift + (1 - shift) * alphas)
    if _setting(config, "rescale_betas_zero_snr"):
        roots = np.sqrt(alphas)
        alphas = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return alphas.astype(np.float64)


def timesteps_of(config: Mapping[str, Any], steps: int) -> Int[np.ndarray, " steps"]:
    """Training timesteps of each step, falling, by `timestep_spacing` (arXiv 2305.08891, table 2).

    Raises:
        ValueError: the spacing is unknown, or makes another number of timesteps or some outside the training's.
    """
    _check(config)
    train, spacing = _train_steps(config), _setting(config, "timestep_spacing")
    if not 0 < steps <= train:
        raise ValueError(f"{steps} steps: scheduler_config.json has num_train_timesteps={train}. Take 1 to {train}.")
    if spacing == "linspace":
        times = np.linspace(0, train - 1, steps).round()[::-1]
    elif spacing == "leading":
        times = np.arange(steps)[::-1] * (train // steps) + _offset(config)
    else:
        times = np.round(np.arange(train, 0, -train / steps)) - 1
    times = times.astype(np.int64)
    if len(times) != steps or times[-1] < 0 or times[0] >= train:  # 61 trailing steps, say: floats do not add up
        raise ValueError(
            f"scheduler_config.json: timestep_spacing={spacing!r} makes {len(times)} timesteps from {times[0]} to "
            f"{times[-1]} of {steps} steps, and training had 0 to {train - 1}. Take another number of steps."
        )
    return times


def noise_levels(alphas: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Noise levels sigma as flow matching has them: latents over `sqrt(a) + sqrt(1 - a)` are
    `(1 - sigma) clean + sigma noise`."""
    clean, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
    return noise / (clean + noise)


def _setting(config: Mapping[str, Any], name: str) -> Any:
    return config.get(name, DEFAULTS[name])


def _check(config: Mapping[str, Any]) -> None:
    for name, wanted in ONLY.items():
        value = _setting(config, name)
        if value != wanted:
            raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not supported: only {wanted!r} is.")
    for name, choices in CHOICES.items():
        value = _setting(config, name)
        if value not in choices or type(value) is not type(choices[0]):
            known = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not supported: only {known} is.")


def _whole(config: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = _setting(config, name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not a whole number from {low} to {high}.")
    return value


def _train_steps(config: Mapping[str, Any]) -> int:
    return _whole(config, "num_train_timesteps", 2, MOST_TIMES)


def _offset(config: Mapping[str, Any]) -> int:
    return _whole(config, "steps_offset", 0, MOST_TIMES)


def _beta(config: Mapping[str, Any], name: str) -> float:
    value = positive(config, name, DEFAULTS[name])
    if value >= 1:
        raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not below 1.")
    return value
