"""Steps of flow matching from one or two velocities, and noise levels as `FlowMatchEulerDiscreteScheduler` has them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import betaincinv  # jax requires scipy

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.plan.steps import euler_coefficients
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.base import Latents

UNSUPPORTED = ("invert_sigmas", "stochastic_sampling")
RESPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@carrier
class FlowMultistep:
    """x moves by a combination of this step's velocity and the last one's.

    Euler's steps (arXiv 2210.02747, algorithm 1) are the difference of two noise levels times the velocity; a step
    plan's coefficients are fitted (`calibration.steps`). The last velocity is the solver's state.
    """

    coefficients: Float[Array | np.ndarray, "padded_steps 2"]
    """Coefficients of this step's velocity and of the last step's."""

    @classmethod
    def of(cls, sigmas: Float[np.ndarray, " levels"]) -> "FlowMultistep":
        """Euler's."""
        return cls.moving(euler_coefficients(sigmas))

    @classmethod
    def moving(cls, coefficients: Float[np.ndarray, "steps 2"]) -> "FlowMultistep":
        return cls(pad_steps(coefficients.astype(np.float32)))

    @staticmethod
    def scales(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
        return np.ones(len(sigmas), np.float32)

    @classmethod
    def planned(
        cls, sigmas: Float[np.ndarray, " levels"], coefficients: Float[np.ndarray, "steps 2"]
    ) -> "FlowMultistep":
        return cls.moving(coefficients)

    def init(self, x: Latents) -> Latents:
        return np.zeros_like(x)

    def step(self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Latents) -> tuple[Latents, Latents]:
        now, last = jnp.asarray(self.coefficients)[i]
        return x + now * prediction + last * state, prediction


def flow_match_sigmas(
    config: Mapping[str, Any], sigmas: Sequence[float] | np.ndarray | int, num_visual: int
) -> Float[np.ndarray, " steps_plus_1"]:
    """Noise levels of every step and a final 0, float32 (diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps`).

    Args:
        config: scheduler_config.json.
        sigmas: unshifted noise levels, or a number of steps for the scheduler's own. Those are evenly spaced between
            its largest and smallest sigma. A static shift has moved these ends once already: it hits SD3's twice.
        num_visual: visual tokens, on which a dynamic shift depends (FLUX.1-dev).

    Raises:
        ValueError: the config asks for what is not implemented or lacks a number, or a sigma is outside (0, 1].
    """
    if asked := [name for name in UNSUPPORTED if config.get(name)]:
        raise ValueError(f"scheduler_config.json sets {asked}, which is not supported: unset it.")
    if len(spacings := [name for name in RESPACINGS if config.get(name)]) > 1:
        raise ValueError(f"scheduler_config.json sets {spacings}, which exclude each other: set one of them.")
    dynamic, shift = config.get("use_dynamic_shifting", False), positive(config, "shift", 1.0)

    if isinstance(sigmas, int):
        steps = positive(config, "num_train_timesteps", 1000)
        ends = np.array([1.0, 1 / steps], np.float32)
        ends = (ends if dynamic else _shift(ends, shift)).astype(np.float64)
        levels = np.linspace(ends[0] * steps, ends[1] * steps, sigmas) / steps
    else:
        levels = np.asarray(sigmas, np.float32)
        if levels.ndim != 1 or levels.size == 0 or not np.all((levels > 0) & (levels <= 1)):
            raise ValueError(f"sigmas must be a list of numbers in (0, 1], got {sigmas}.")

    levels = shifted(config, levels, shift, num_visual)
    if spacings:
        levels = _respaced(config, spacings[0], levels)
    return np.append(levels.astype(np.float32), np.float32(0))


def shifted(
    config: Mapping[str, Any], levels: Float[np.ndarray, " steps"], shift: int | float, num_visual: int
) -> Float[np.ndarray, " steps"]:
    """Noise levels after the config's dynamic shift, or else this static one, and its stretch to a last level.

    Raises:
        ValueError: the config lacks a number, or one is of no use.
    """
    if config.get("use_dynamic_shifting", False):
        mu = dynamic_shift(config, num_visual)
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ValueError(f"scheduler_config.json: time_shift_type={kind!r} is neither 'exponential' nor 'linear'.")
        if kind == "linear" and mu <= 0:
            raise ValueError(
                f"scheduler_config.json: a linear shift of {mu:.3g} at {num_visual} tokens is not positive."
            )
        factor = math.exp(mu) if kind == "exponential" else mu
        levels = factor / (factor + (1 / levels - 1))
    else:
        levels = _shift(levels, shift)
    if config.get("shift_terminal"):
        return _stretched(levels, positive(config, "shift_terminal", 0.0))
    return levels


def _finite(config: Mapping[str, Any], name: str, default: int | float) -> Any:
    value = config.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not a finite number.")
    return value


def positive(config: Mapping[str, Any], name: str, default: int | float) -> Any:
    """A number of a scheduler_config.json; raises ValueError where it is not positive."""
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"scheduler_config.json: {name}={value!r:.100} is not a positive number.")
    return value


def _shift(sigma: np.ndarray, shift: float) -> np.ndarray:
    """Resolution-dependent shift of Stable Diffusion 3 (arXiv 2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _stretched(levels: Float[np.ndarray, " steps"], last: int | float) -> Float[np.ndarray, " steps"]:
    """The distances from 1 times a number, so that the last level is this one, as LTX-Video has it."""
    ratio = (1 - levels[-1]) / (1 - last) if last < 1 else 0.0
    if not ratio > 0 or not ((stretched := 1 - (1 - levels) / ratio) > 0).all():
        raise ValueError(
            f"scheduler_config.json: shift_terminal={last!r:.100} cannot end noise levels {levels!s:.100}: "
            "take one below 1, and 2 steps or more."
        )
    return stretched


def _respaced(config: Mapping[str, Any], name: str, levels: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """As many levels between the same ends, spaced as `name` says.

    Karras: the seventh roots are even (arXiv 2206.00364, equation 5). Exponential: the logarithms are. Beta: quantiles
    of a beta distribution (arXiv 2407.12173), dense at both ends.
    """
    ends = (("sigma_max", levels[0]), ("sigma_min", levels[-1]))
    high, low = (float(end if config.get(key) is None else positive(config, key, 1.0)) for key, end in ends)
    if not low <= high <= 1:
        raise ValueError(f"scheduler_config.json: sigmas from {high:.3g} to {low:.3g} do not fall from 1 or below.")
    count = len(levels)
    if name == "use_karras_sigmas":
        first, last = high ** (1 / 7), low ** (1 / 7)
        return (first + np.linspace(0, 1, count) * (last - first)) ** 7
    if name == "use_exponential_sigmas":
        return np.exp(np.linspace(math.log(high), math.log(low), count))
    return low + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, count)) * (high - low)


def dynamic_shift(config: Mapping[str, Any], num_visual: int) -> float:
    """mu, linear in the number of visual tokens; not clamped (3.23 for 2048 px)."""
    base_tokens, max_tokens = (
        positive(config, f"{end}_image_seq_len", of) for end, of in (("base", 256), ("max", 4096))
    )
    base, top = _finite(config, "base_shift", 0.5), _finite(config, "max_shift", 1.15)
    if base_tokens == max_tokens:
        raise ValueError(f"scheduler_config.json: base_image_seq_len and max_image_seq_len are both {max_tokens}.")
    slope = (top - base) / (max_tokens - base_tokens)
    return num_visual * slope + (base - slope * base_tokens)
