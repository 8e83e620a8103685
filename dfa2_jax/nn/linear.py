"""Linear layers, and how XLA multiplies by weights that lie in a stack of layers."""

from collections.abc import Callable
from math import pi, prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.weights import NamedHeads, Plain, Weight, split_heads

XLA_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""Compiler options of the outermost `jax.jit` of sampling and calibration.

Products then read a layer's weights where they lie in the stack of layers. By default XLA copies every weight at every
step: Triton's products need a buffer of their own, and products of one input are merged. The copies take 17 of
FLUX.1-dev's 151 ms at 1024 px on an H100, and 4 of SD3.5-medium's 58 (benchmarks/results/profile_h100.json). A CPU
ignores these options."""


MANY_ROWS = 12_000
"""From this many rows on, a product takes longer to read weights in the stack than to copy them (docs: performance)."""


class Linear(nnx.Module):
    """`x @ weight + bias`, with the bias as an operation of its own.

    XLA would make the bias part of the product, and copy the kernel of such a product out of the stack of layers
    (`XLA_OPTIONS`). The next elementwise operation adds the bias for nothing. XLA cannot autotune a product that reads
    from the stack, and takes cuBLAS's default algorithm: 6 to 12 % slower on an H100. Below `MANY_ROWS` rows the copy
    would cost more.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight: Weight = Plain(in_features, out_features, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims E"]:
        return self._add_bias(self.weight.product(x), None)

    def heads(
        self, x: Float[Array, "B T D"], num_heads: int, which: Int[Array, " n"] | None = None
    ) -> Float[Array, "B T n H"]:
        """The output by heads: all of them, or those that are named, for their share of the work."""
        if which is None:
            return split_heads(self(x), num_heads)
        named = NamedHeads(num_heads, which)
        return split_heads(self._add_bias(self.weight.product(x, named), named), len(which))

    def _add_bias(self, out: Float[Array, "*dims E"], heads: NamedHeads | None) -> Float[Array, "*dims E"]:
        if self.bias is None:
            return out
        if prod(out.shape[:-1]) < MANY_ROWS:
            out = jax.lax.optimization_barrier(out)
        bias = self.bias[...] if heads is None else heads.columns(self.bias[...])
        return out + bias.reshape((1,) * (out.ndim - 1) + (-1,))


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """GELU by tanh (arXiv 1606.08415, section 2).

    `(1 + tanh(y)) / 2` is written as the equal `sigmoid(2 y)`: XLA's tanh is a polynomial, its exp the GPU's own. The
    sigmoid takes 0.88 of the time on an H100, where GELU is 5 % of FLUX.1-dev's step.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(2 * (2 / pi) ** 0.5 * (x32 + 0.044715 * x32**3))).astype(x.dtype)


class MLP(nnx.Module):
    """`down(activation(up(x)))`."""

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int | None = None,
        *,
        activation: Callable[[Any], Any] = gelu_tanh,
        down_bias: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.up = Linear(in_features, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, out_features or in_features, use_bias=down_bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims E"]:
        return self.down(self.activation(self.up(x)))
