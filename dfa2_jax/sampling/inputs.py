"""All that a sampling loop needs beside the latents, as data: other values compile nothing."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier

STEP_BLOCK = 64
"""Per-step inputs are padded to a multiple of this many steps, so that up to 64 steps share one program."""


@carrier
class Inputs:
    """What a step needs beside the latents.

    conditions: the family's own pytree (`families.base.Conditions`); with guidance its batch is doubled,
        [unconditional, conditional].
    timesteps: `sinusoid` of what the transformer takes as time.
    guidance: how predictions combine (`sampling.guidance`).
    solver: what a prediction does to the latents (`sampling.solvers`).
    known: what latents keep of a picture (`sampling.known`); None: all are the sampler's.
    beside: what the transformer's tokens hold beside latents, the same at each step.
    """

    conditions: Any
    timesteps: Float[Array | np.ndarray, "padded_steps E"]
    guidance: Any
    solver: Any
    known: Any = None
    beside: Float[Array | np.ndarray, "B V beside"] | None = None

    def at(self, nodes: Int[np.ndarray, " nodes"], solver: Any) -> "Inputs":
        """The inputs of these steps alone, in their order, with the solver that goes from each to the next."""
        timesteps = pad_steps(np.asarray(self.timesteps)[nodes])
        known = None if self.known is None else self.known.at(nodes)
        return Inputs(self.conditions, timesteps, self.guidance.at(nodes), solver, known, self.beside)


def pad_steps(x: np.ndarray) -> np.ndarray:
    """Pad the first axis, of steps, with zeros to the next multiple of `STEP_BLOCK`."""
    padding = -len(x) % STEP_BLOCK
    return np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)])
