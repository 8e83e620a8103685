"""Norms and the modulation that replaces their parameters; computed in float32, rounded once."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.linear import Linear
from dfa2_jax.nn.modulation import Modulation
from pallas_kernels.passes import layer_norm, rms_norm


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        return rms_norm(x, self.scale[...], self.eps)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias, in float32, rounded once."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        ones = (1,) * (x.ndim - 1)
        scale, bias = (p[...].astype(jnp.float32).reshape(*ones, -1) for p in (self.scale, self.bias))
        return (layer_norm(x.astype(jnp.float32), self.eps) * scale + bias).astype(x.dtype)


class AdaLN(nnx.Module):
    """`silu(vector) -> linear -> branches x (shift, scale, gate)`, the adaLN-Zero of every block."""

    def __init__(self, width: int, branches: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(width, 3 * branches * width, dtype=dtype, rngs=rngs)
        self.branches = branches

    def __call__(self, vector: Float[Array, "#B D"]) -> list[Modulation]:
        chunks = jnp.split(self.linear(jax.nn.silu(vector))[:, None], 3 * self.branches, axis=-1)
        return [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


class AdaLNOut(nnx.Module):
    """The last norm of a stream: no gate, and stored as (scale, shift), the reverse of `AdaLN`."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = Linear(width, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], vector: Float[Array, "#B D"]) -> Float[Array, "B T D"]:
        scale, shift = jnp.split(self.linear(jax.nn.silu(vector))[:, None], 2, axis=-1)
        return layer_norm(x) * (1 + scale) + shift
