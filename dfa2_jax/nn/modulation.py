"""The modulation that replaces the parameters of a block's layer norms."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfa2_jax.nn.carrier import carrier
from pallas_kernels.passes import layer_norm


@carrier
class Modulation:
    """One branch's share of an adaptive layer norm (DiT, arXiv 2212.09748, section 3.2)."""

    shift: Float[Array, "B 1 D"]
    scale: Float[Array, "B 1 D"]
    gate: Float[Array, "B 1 D"]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The modulated layer norm."""
        return layer_norm(x) * (1 + self.scale) + self.shift

    @property
    def length(self) -> Float[Array, " B"]:
        """No token of the result is longer: its Euclidean length is sqrt(D) before it is modulated."""
        scale, shift = (x[:, 0].astype(jnp.float32) for x in (self.scale, self.shift))
        return scale.shape[-1] ** 0.5 * jnp.abs(1 + scale).max(axis=-1) + jnp.linalg.norm(shift, axis=-1)
