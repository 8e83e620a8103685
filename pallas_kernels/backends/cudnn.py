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
        if problem.text_length is not None and problem.layout.text_first:
            return "cuDNN's fused attention leaves out the end of a sequence alone, and text's padding is inside it"
        return None

    def merit(self, problem: Problem[Any], device: Device) -> str | None:
        return "cuDNN's fused attention, for 16-bit inputs on NVIDIA GPUs; it has gradients"

    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        options: dict[str, Any] = {"implementation": "cudnn"}
        if problem.text_length is not None:
            batch, queries = problem.q.shape[:2]
            # cuDNN takes lengths of both or of neither
            options["query_seq_lengths"] = jnp.full(batch, queries, jnp.int32)
            options["key_value_seq_lengths"] = problem.layout.num_visual + problem.text_length
        return jax.nn.dot_product_attention(problem.q, problem.k, problem.v, **options)
