"""Linear layers, and how XLA multiplies by weights that lie in a stack of layers."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.modulation import Modulation
from dfa2_jax.nn.weights import NamedHeads, Plain, Quantized, Weight, gelu_tanh, split_heads

XLA_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""Compiler options of the outermost `jax.jit` of sampling and calibration.

Products then read a layer's weights where they lie in the stack of layers. By default XLA copies every weight at every
step: Triton's products need a buffer of their own, and products of one input are merged. The copies take 17 of
FLUX.1-dev's 151 ms at 1024 px on an H100, and 4 of SD3.5-medium's 58 (benchmarks/results/profile_h100.json). A CPU
ignores these options."""


class Linear(nnx.Module):
    """`x @ weight + bias`.

    XLA cannot autotune a product that reads from the stack, and takes cuBLAS's default algorithm: 6 to 12 % slower on
    an H100. Below `MANY_ROWS` rows the copy would cost more.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight: Weight = Plain(in_features, out_features, dtype=dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if use_bias else None

    @property
    def bias_array(self) -> Float[Array, "*L E"] | None:
        return None if self.bias is None else self.bias[...]

    def __call__(self, x: Any) -> Float[Array, "*dims E"]:
        """x: [*dims, D], or as `modulated` gives it."""
        return self.weight.product(x, self.bias_array)

    def modulated(self, x: Float[Array, "B T D"], modulation: Modulation) -> Any:
        """The modulated layer norm of x, as the weight multiplies it."""
        return self.weight.modulated(x, modulation)

    def heads(self, x: Any, num_heads: int, which: Int[Array, " n"] | None = None) -> Float[Array, "B T n H"]:
        """The output by heads: all of them, or those that are named, for their share of the work."""
        named = None if which is None else NamedHeads(num_heads, which)
        out = self.weight.product(x, self.bias_array, named)
        return split_heads(out, num_heads if which is None else len(which))


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

    def __call__(self, x: Any) -> Float[Array, "*dims E"]:
        """x: [*dims, D], or as `up.modulated` gives it."""
        up, down = self.up.weight, self.down.weight
        if isinstance(up, Quantized) and isinstance(down, Quantized) and self.activation is gelu_tanh:
            return down.product(up.gelu(x, self.up.bias_array, down.values.dtype), self.down.bias_array)
        return self.down(self.activation(self.up(x)))
