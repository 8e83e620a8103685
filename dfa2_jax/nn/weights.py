"""What a linear layer multiplies by: one contract, so that a weight may be held in another form."""

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """HIGHEST for float32: JAX's default on NVIDIA is TF32, torch's is IEEE, and no CPU test sees the difference."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def split_heads(x: Float[Array, "*dims D"], num_heads: int) -> Float[Array, "*dims N H"]:
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Float[Array, "*dims N H"]) -> Float[Array, "*dims D"]:
    return x.reshape(*x.shape[:-2], -1)


def take_heads(x: Float[Array, "*dims N H"], which: Int[Array, " n"]) -> Float[Array, "*dims n H"]:
    """As `x[..., which, :]`, of which XLA makes a gather along a first axis and a transposition; this takes rows."""
    *dims, num_heads, head_dim = x.shape
    row = jnp.arange(prod(dims))[:, None] * num_heads + which[None]
    rows = x.reshape(-1, head_dim).at[row].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return rows.reshape(*dims, -1, head_dim)


@dataclass(frozen=True)
class NamedHeads:
    """Some heads of a layer whose output is `num_heads` heads."""

    num_heads: int
    which: Int[Array, " n"]

    def columns(self, x: Float[Array, "*dims E"]) -> Float[Array, "*dims n_H"]:
        """The columns of these heads."""
        return merge_heads(take_heads(split_heads(x, self.num_heads), self.which))


@runtime_checkable
class Weight(Protocol):
    """A matrix [D, E] that activations are multiplied by, however it is held."""

    def product(self, x: Float[Array, "*dims D"], heads: NamedHeads | None = None) -> Float[Array, "*dims E"]:
        """`x @ matrix`, or the columns of some heads at their share of the work."""
        ...


class Plain(nnx.Module):
    """A matrix as it is, in the dtype that it is multiplied in."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))

    def product(self, x: Float[Array, "*dims D"], heads: NamedHeads | None = None) -> Float[Array, "*dims E"]:
        kernel = self.kernel[...]
        if heads is not None:
            kernel = heads.columns(kernel)
        return jnp.dot(x.astype(kernel.dtype), kernel, precision=matmul_precision(kernel.dtype))
