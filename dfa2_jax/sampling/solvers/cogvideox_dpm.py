"""SDE-DPM-Solver++(2M) as diffusers' `CogVideoXDPMScheduler` has it, for models that predict v."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.guidance import Round
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.solvers.base import Latents
from dfa2_jax.sampling.solvers.variance_preserving import AlphaSteps


@carrier
class DPMState:
    """What the solver carries.

    clean: clean latents as the last step predicted them.
    noise: what the next step adds; `CogVideoXDPM.with_noise` puts it here.
    """

    clean: Float[Array | np.ndarray, "B V C"]
    noise: Float[Array | np.ndarray, "B V C"]


@carrier
class CogVideoXDPM:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), whose second order extrapolates the clean latents.

    Every step adds noise. The loop on the host draws it, and puts it into the state before the step. So the program of
    a step is the same for all steps, step counts and seeds. Before a step:

        noise = [stream.randn(shape) for _ in range(solver.draws[i])][-1]
        state = replace(state, solver=solver.with_noise(state.solver, tokens.pack(noise)))
    """

    coefficients: Float[Array | np.ndarray, "padded_steps 7"]
    """Coefficients of latents and v in the clean latents. Those of latents, clean latents, the last step's clean
    latents and noise in the next latents. The last column is `draws`, which the program does not read."""

    @classmethod
    def of(cls, steps: AlphaSteps) -> "CogVideoXDPM":
        """The solver of a schedule. The first step, and one beyond the training's timesteps, are of first order."""
        clean, noise = np.sqrt(steps.now), np.sqrt(1 - steps.now)
        clean_after, noise_after = np.sqrt(steps.after), np.sqrt(1 - steps.after)
        kept = clean * noise_after / (noise * clean_after)  # exp(-h): how far the step leads, in log(clean / noise)
        gain = (1 - kept**2) * clean_after
        is_first_order = steps.is_last | (np.arange(len(kept)) == 0)
        # The zero signal of a first step makes an infinite distance, and so a part of 0: diffusers' numbers.
        with np.errstate(divide="ignore"):
            log_ratio, distance = np.log(clean / noise), -np.log(kept)
        part = np.zeros(len(kept))
        second = np.flatnonzero(~is_first_order)
        part[second] = distance[second] / (log_ratio[second] - log_ratio[second - 1]) / 2
        columns = [clean, -noise]
        columns += [noise_after * kept / noise, gain * (1 + part), -gain * part, noise_after * np.sqrt(1 - kept**2)]
        columns += [np.where(is_first_order, 1, 2)]
        return cls(pad_steps(np.stack(columns, axis=1).astype(np.float32)))

    @property
    def draws(self) -> tuple[int, ...]:
        """Draws of noise that torch makes at each step, of which the last is used; 0 at steps of the padding.

        Diffusers draws the noise of a first-order step, then another for the second order. The numbers are read on
        the host, outside of jit.
        """
        return tuple(int(draws) for draws in np.asarray(self.coefficients)[:, 6])

    def init(self, x: Latents) -> DPMState:
        return DPMState(np.zeros_like(x), np.zeros_like(x))

    def with_noise(self, state: DPMState, noise: Latents) -> DPMState:
        """The state before a step that adds this noise."""
        return DPMState(state.clean, noise)

    def step(
        self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: DPMState
    ) -> tuple[Latents, DPMState]:
        return self.rounded_step(x, prediction, i, state, lambda product: product)

    def rounded_step(
        self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: DPMState, rounded: Round
    ) -> tuple[Latents, DPMState]:
        """torch draws noise in the dtype of the latents, and rounds products of latents and of noise."""
        clean_x, clean_v, keep, now, last, added, _ = jnp.asarray(self.coefficients)[i]
        clean = rounded(clean_x * x) + clean_v * prediction
        moved = rounded(keep * x) + now * clean + last * state.clean
        return moved + rounded(added * rounded(jnp.asarray(state.noise))), DPMState(clean, state.noise)
