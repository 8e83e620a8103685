"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dfa2_jax.nn.attention import Heads

Rope = tuple[Float[Array, "S half"], Float[Array, "S half"]]
"""(cos, sin) of every position and pair of channels, float32."""


def rotate(x: Heads, rope: Rope) -> Heads:
    """Rotary position embedding on interleaved pairs, in float32 (RoFormer, arXiv 2104.09864, section 3.2)."""
    cos, sin = (table[None, :, None] for table in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
