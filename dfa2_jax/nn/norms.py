"""Norms and the modulation that replaces their parameters; computed in float32, rounded once."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import Linear


def layer_norm(x: Float[Array, "*dims D"], eps: float = 1e-6) -> Float[Array, "*dims D"]:
    """Layer norm without parameters: in MMDiT, scale and shift come from the modulation."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * scale).astype(x.dtype)


@carrier
class Modulation:
    """One branch's share of an adaptive layer norm (DiT, arXiv 2212.09748, section 3.2)."""

    shift: Float[Array, "B 1 D"]
    scale: Float[Array, "B 1 D"]
    gate: Float[Array, "B 1 D"]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * (1 + self.scale) + self.shift

    @property
    def length(self) -> Float[Array, " B"]:
        """No token of a modulated layer norm is longer: its Euclidean length is sqrt(D) before."""
        scale, shift = (x[:, 0].astype(jnp.float32) for x in (self.scale, self.shift))
        return scale.shape[-1] ** 0.5 * jnp.abs(1 + scale).max(axis=-1) + jnp.linalg.norm(shift, axis=-1)


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
