"""What a solver is: coefficients made on the host, a step, and a state that the loop carries."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.sampling.guidance import Round

Latents = Float[Array | np.ndarray, "B V C"]


@runtime_checkable
class Solver(Protocol):
    """A pytree of coefficients, padded like every per-step input: another schedule compiles nothing."""

    def init(self, x: Latents) -> Any:
        """The state before the first step; None where a solver has none."""
        ...

    def step(self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Any) -> tuple[Latents, Any]:
        """The latents after step `i`, and the state."""
        ...


@runtime_checkable
class Multistep(Solver, Protocol):
    """A solver that moves scaled latents by this velocity and the last one, which is its state: step plans serve it."""

    @staticmethod
    def scales(sigmas: Float[np.ndarray, " levels"]) -> Float[np.ndarray, " levels"]:
        """What flow matching's latents at these noise levels are multiplied by, float32."""
        ...

    @classmethod
    def planned(cls, sigmas: Float[np.ndarray, " levels"], coefficients: Float[np.ndarray, "steps 2"]) -> "Multistep":
        """The solver from each of these noise levels to the next, with coefficients of both velocities."""
        ...


@runtime_checkable
class FlowSolver(Solver, Protocol):
    """A solver that knows of a schedule no more than its noise levels: sampling may begin at any of them."""

    @classmethod
    def of(cls, sigmas: Float[np.ndarray, " levels"]) -> "FlowSolver":
        """The solver from each of these noise levels to the next."""
        ...


@runtime_checkable
class RoundedSolver(Solver, Protocol):
    """A solver that diffusers computes partly in the dtype of the latents; flow matching's are float32 throughout."""

    def rounded_step(
        self, x: Latents, prediction: Latents, i: Int[Array, ""] | int, state: Any, rounded: Round
    ) -> tuple[Latents, Any]:
        """As `step`, with products rounded where torch rounds them. The loop rounds the latents that come back."""
        ...


@runtime_checkable
class NoisySolver(Solver, Protocol):
    """A solver that adds noise at each step. The host draws it, and puts it into the state before the step."""

    @property
    def draws(self) -> tuple[int, ...]:
        """Draws of noise at each step, of which the last is added."""
        ...

    def with_noise(self, state: Any, noise: Latents) -> Any:
        """The state before a step that adds this noise."""
        ...
