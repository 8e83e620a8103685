"""What inpainting keeps: after each step, latents outside of the mask are the picture's, with that level's noise."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.inputs import pad_steps

Tokens = Float[np.ndarray, "B V P"]


@carrier
class Known:
    """A picture's latents, of which a mask is painted anew. All are data: another picture or mask compiles nothing.

    mask: 1 where the sampler paints.
    image, noise: patchified, float32.
    levels: of noise, after each step.
    """

    mask: Float[Array | np.ndarray, "B V P"]
    image: Float[Array | np.ndarray, "B V P"]
    noise: Float[Array | np.ndarray, "B V P"]
    levels: Float[Array | np.ndarray, " padded_steps"]

    @classmethod
    def of(cls, mask: Tokens, image: Tokens, noise: Tokens, sigmas: Float[np.ndarray, " levels"]) -> "Known":
        """Args: `sigmas`: noise levels of every step, and the last one's after it."""
        return cls(mask, image, noise, pad_steps(np.asarray(sigmas, np.float32)[1:]))

    def at(self, nodes: Int[np.ndarray, " nodes"]) -> "Known":
        """For steps that go from each of these to the next. The last leaves no noise."""
        levels = np.append(np.asarray(self.levels)[nodes[1:] - 1], np.float32(0))
        return Known(self.mask, self.image, self.noise, pad_steps(levels))

    def kept(self, latents: Float[Array | np.ndarray, "B V P"], i: Int[Array, ""] | int) -> Any:
        """The latents after step `i`."""
        level = jnp.asarray(self.levels)[i]
        known = level * self.noise + (1 - level) * self.image
        return (1 - self.mask) * known + self.mask * latents


def noised(image: Tokens, noise: Tokens, level: float) -> Tokens:
    """Latents of flow matching at a noise level (diffusers' `scale_noise`), float32."""
    return np.float32(level) * noise + np.float32(1 - level) * image
