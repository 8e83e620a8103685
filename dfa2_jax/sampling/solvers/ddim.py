"""DDIM for models that predict v: Euler's steps of flow matching on scaled latents."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.guidance import Round
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.base import Latents


@carrier
class ScaledMultistep:
    """`FlowMultistep` on variance-preserving latents x = c clean + s noise, where c^2 + s^2 = 1.

    With k = c + s and sigma = s / k, x / k is `(1 - sigma) clean + sigma noise`: flow matching's latents. Their
    velocity `noise - clean` is `(s - c) x + k v`, where v = c noise - s clean is the prediction. DDIM (arXiv
    2010.02502, equation 12, without noise) is Euler's step along this velocity. A step plan's coefficients are fitted
    to the same velocities. The last velocity is the solver's state.
    """

    coefficients: Float[Array | np.ndarray, "padded_steps 6"]
    """s - c and k of the velocity; k after the step, and its ratio to k; coefficients of this and the last velocity."""

    @classmethod
    def ddim(cls, now: Float[np.ndarray, " steps"], after: Float[np.ndarray, " steps"]) -> "ScaledMultistep":
        """DDIM by the noise levels sigma where each step begins, and where it leads.

        Diffusers' steps do not always lead to where the next one begins (`variance_preserving.AlphaSteps`).
        """
        moves = np.stack([after - now, np.zeros(len(now))], axis=1)
        return cls._between(now, after, moves)

    @classmethod
    def planned(
        cls, sigmas: Float[np.ndarray, " levels"], coefficients: Float[np.ndarray, "steps 2"]
    ) -> "ScaledMultistep":
        """A solver by noise levels sigma and coefficients of velocities, such as a step plan's.

        Args:
            sigmas: at each node, and after the last.
            coefficients: of this step's velocity and of the last step's, as `FlowMultistep` takes them.

        Raises:
            ValueError: there is not one level more than there are steps.
        """
        if len(sigmas) != len(coefficients) + 1:
            raise ValueError(
                f"{len(sigmas)} noise levels and {len(coefficients)} steps: pass a level for each step, and the last."
            )
        return cls._between(sigmas[:-1], sigmas[1:], coefficients)

    @classmethod
    def _between(cls, now: np.ndarray, after: np.ndarray, moves: np.ndarray) -> "ScaledMultistep":
        scale, scale_after = _scale(now), _scale(after)
        slope = (2 * np.asarray(now, np.float64) - 1) * scale
        columns = [slope, scale, scale_after, scale_after / scale, *np.asarray(moves, np.float64).T]
        return cls(pad_steps(np.stack(columns, axis=1).astype(np.float32)))

    @staticmethod
    def scales(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
        return _scale(sigmas).astype(np.float32)

    def init(self, x: Latents) -> Latents:
        return np.zeros_like(x)

    def step(self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Latents) -> tuple[Latents, Latents]:
        slope, scale, scale_after, ratio, now, last = jnp.asarray(self.coefficients)[i]
        velocity = slope * x + scale * prediction
        return ratio * x + scale_after * (now * velocity + last * state), velocity

    def rounded_step(
        self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Latents, rounded: Round
    ) -> tuple[Latents, Latents]:
        """The same step from latents and clean latents, as diffusers writes it: torch rounds products of latents."""
        slope, scale, scale_after, ratio, now, last = jnp.asarray(self.coefficients)[i]
        clean_part, noise_part = (scale - slope) / 2, (scale + slope) / 2
        clean = rounded(clean_part * x) - noise_part * prediction
        moves = scale_after * now / noise_part  # of x - scale * clean, which is noise_part * velocity
        moved = rounded((ratio + moves) * x) - moves * scale * clean
        return moved + scale_after * last * state, slope * x + scale * prediction


def _scale(sigmas: np.ndarray) -> np.ndarray:
    """k = c + s, of c / s = (1 - sigma) / sigma and c^2 + s^2 = 1."""
    sigmas = np.asarray(sigmas, np.float64)
    return 1 / np.hypot(sigmas, 1 - sigmas)
