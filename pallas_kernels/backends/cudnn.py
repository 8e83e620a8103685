"""Dense attention by cuDNN, through `jax.nn`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends.base import Device, Problem


class Cudnn:
    interpretable = False

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        if not device.is_nvidia:
            return f"the default device is {device.name!r}, not an NVIDIA GPU"
        if problem.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN's fused attention is 16-bit, not {jnp.dtype(problem.dtype).name}"
        if problem.head_dim > 128 or problem.head_dim % 8:
            return f"cuDNN's fused attention needs a head_dim of at most 128, by 8s, not {problem.head_dim}"
        return None

    def merit(self, problem: Problem[Any], device: Device) -> str | None:
        return "cuDNN's fused attention, for 16-bit inputs on NVIDIA GPUs; it has gradients"

    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        return jax.nn.dot_product_attention(problem.q, problem.k, problem.v, implementation="cudnn")
