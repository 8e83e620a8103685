"""Scalars as the transformers take them."""

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float


def sinusoid(x: Float[np.ndarray, " steps"], dim: int = 256) -> Float[np.ndarray, "steps {dim}"]:
    """Sinusoidal embedding of timesteps or guidance, [cos, sin], computed on the host for all steps at once.

    Exponents, frequencies and angles are rounded to float32 where torch rounds them: diffusers'
    `get_timestep_embedding` with `flip_sin_to_cos=True, downscale_freq_shift=0`. The model was trained with those
    frequencies, and 1e-7 of one is 3e-4 of an angle of 3500. The rest is float64, so no platform's exp or cosine enters
    the result.
    """
    half = dim // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (x.astype(np.float32)[:, None] * frequencies[None]).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def embedded_scalar(x: Float[np.ndarray, " steps"], dtype: DTypeLike = np.float32) -> Float[np.ndarray, " steps"]:
    """`x * 1000` as torch rounds it before its sinusoid, in `dtype`.

    torch multiplies in the model's dtype: in bfloat16 guidance 3.5 becomes 3504. XLA drops such roundings inside jit,
    so whoever wants bfloat16 diffusers' numbers asks for them here, on the host.
    """
    return (x.astype(dtype) * np.asarray(1000, dtype)).astype(np.float32)
