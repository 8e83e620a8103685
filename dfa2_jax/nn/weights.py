"""What a linear layer multiplies by: one contract, so that a weight may be held in another form."""

from dataclasses import dataclass
from math import pi, prod
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.modulation import Modulation
from dfa2_jax.weights.quantized import Place, Stacked
from pallas_kernels.passes import quantized_rows, weight_only_matmul
from pallas_kernels.products import quantized_matmul

MANY_ROWS = 12_000
"""From this many rows on, a product takes longer to read weights in the stack than to copy them (docs: performance)."""

GELU: dict[str, Any] = {"activation": "gelu_tanh"}

ROUNDED = 1.1
"""What rounding to 8 bits can lengthen a token by, and more."""


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """HIGHEST for float32: JAX's default on NVIDIA is TF32, torch's is IEEE, and no CPU test sees the difference."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """GELU by tanh (arXiv 1606.08415, section 2).

    `(1 + tanh(y)) / 2` is written as the equal `sigmoid(2 y)`: XLA's tanh is a polynomial, its exp the GPU's own. The
    sigmoid takes 0.88 of the time on an H100, where GELU is 5 % of FLUX.1-dev's step.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(2 * (2 / pi) ** 0.5 * (x32 + 0.044715 * x32**3))).astype(x.dtype)


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

    def product(
        self, x: Any, bias: Float[Array, "*L E"] | None, heads: NamedHeads | None = None
    ) -> Float[Array, "*dims columns"]:
        """`x @ matrix + bias` of x [*dims, D], or the columns of some heads at their share of the work."""
        ...

    def modulated(self, x: Float[Array, "B T D"], modulation: Modulation) -> Any:
        """The modulated layer norm of x, as `product` takes it."""
        ...


class Plain(nnx.Module):
    """A matrix as it is, in the dtype that it is multiplied in."""

    def __init__(self, in_features: int, out_features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), dtype))

    def product(
        self,
        x: Float[Array, "*dims D"],
        bias: Float[Array, " E"] | None,
        heads: NamedHeads | None = None,
    ) -> Float[Array, "*dims columns"]:
        """The bias is an operation of its own, which the next elementwise one takes in. XLA would make it part of the
        product, and copy the kernel of such a product out of the stack of layers (`linear.XLA_OPTIONS`)."""
        kernel = self.kernel[...]
        if heads is not None:
            kernel = heads.columns(kernel)
        out = jnp.dot(x.astype(kernel.dtype), kernel, precision=matmul_precision(kernel.dtype))
        if bias is None:
            return out
        if prod(out.shape[:-1]) < MANY_ROWS:
            out = jax.lax.optimization_barrier(out)
        bias = bias if heads is None else heads.columns(bias)
        return out + bias.reshape((1,) * (out.ndim - 1) + (-1,))

    def modulated(self, x: Float[Array, "B T D"], modulation: Modulation) -> Float[Array, "B T D"]:
        return modulation(x)


@carrier
class EightBits:
    """Activations of 8 bits, with a float32 scale for each token.

    length: a bound of the longest token's Euclidean length, of each image, where one is known.
    """

    values: Num[Array, "*dims D"]
    scale: Float[Array, "*dims"]
    length: Float[Array, " B"] | None = None


def reads_in_place(model: nnx.Module) -> bool:
    """Whether products read weights where they lie in the stack of layers: those of 8 bits do."""
    return any(isinstance(module, Quantized) and not module.weights_alone for _, module in nnx.iter_modules(model))


class Quantized(nnx.Module):
    """Matrices of 8 bits, one for each layer of a stack, with a scale for each output channel.

    Activations become 8 bits, too, with a scale for each token. Where `weights_alone`, the product is one of the
    activations' own dtype instead. That serves memory, and products of few rows.

    Attributes:
        length: the largest Euclidean length of a row, of each layer.
        out_dtype: of products.
    """

    def __init__(
        self,
        layers: int,
        in_features: int,
        out_features: int,
        *,
        dtype: DTypeLike,
        out_dtype: DTypeLike,
        weights_alone: bool,
    ):
        self.values = Stacked(jnp.zeros((layers, out_features, in_features), dtype))
        self.scale = Stacked(jnp.ones((layers, out_features), jnp.float32))
        self.length = Stacked(jnp.ones((layers,), jnp.float32))
        self.layer = Place(jnp.arange(layers, dtype=jnp.int32))
        self.out_dtype, self.weights_alone = jnp.dtype(out_dtype), weights_alone

    def product(
        self,
        x: Any,
        bias: Float[Array, "L E"] | None,
        heads: NamedHeads | None = None,
        *,
        out_dtype: DTypeLike | None = None,
        **finish: Any,
    ) -> Num[Array, "*dims columns"]:
        """As `Weight.product`.

        Args:
            x: [*dims, D], or `EightBits`.
            out_dtype: None: that of all products.
            finish: `activation` and `out_scale` of `quantized_matmul`.
        """
        if self.weights_alone:
            return self._widened(x, bias, heads)
        x = x if isinstance(x, EightBits) else EightBits(*quantized_rows(x, self.values.dtype))
        named = {} if heads is None else {"heads": heads.which, "head_dim": self.values.shape[1] // heads.num_heads}
        out = quantized_matmul(
            x.values.reshape(-1, x.values.shape[-1]), self.values[...], x.scale.reshape(-1), self.scale[...], bias,
            layer=self.layer[...], out_dtype=out_dtype or self.out_dtype, **named, **finish,
        )  # fmt: skip
        return out.reshape(*x.scale.shape, -1)

    def modulated(self, x: Float[Array, "B T D"], modulation: Modulation) -> Float[Array, "B T D"] | EightBits:
        if self.weights_alone:
            return modulation(x)
        rows = quantized_rows(x, self.values.dtype, (modulation.scale, modulation.shift))
        return EightBits(*rows, modulation.length)

    def gelu(
        self, x: Float[Array, "B T D"] | EightBits, bias: Float[Array, "L E"] | None, dtype: DTypeLike
    ) -> Float[Array, "B T E"] | EightBits:
        """The activation of the product, float8 at once where that is `dtype` and a bound is known.

        No value exceeds the product of both lengths and the bias (Cauchy and Schwarz), and GELU makes none larger. A
        float8 has nearly the same relative error at every size, so the bound may be loose. To look for the largest
        values takes a pass: 0.17 ms of 0.43 at FLUX.1-dev's 1024 px, on an H200 (docs: quantization).

        Args:
            dtype: that the result is multiplied in.
        """
        if not isinstance(x, EightBits):
            return gelu_tanh(self.product(x, bias)) if self.weights_alone else self.product(x, bias, **GELU)
        if x.length is None or dtype != jnp.float8_e4m3fn:
            return self.product(x, bias, **GELU)
        layer = self.layer[...]
        most = x.length * self.length[...][layer] * ROUNDED
        if bias is not None:
            most = most + jnp.abs(bias[layer].astype(jnp.float32)).max()
        scale = jnp.broadcast_to(most[:, None] / float(jnp.finfo(dtype).max), x.scale.shape)
        float8 = {"out_dtype": dtype, "out_scale": scale.reshape(-1)}
        return EightBits(self.product(x, bias, **GELU, **float8), scale)

    def _widened(
        self, x: Float[Array, "*dims D"], bias: Float[Array, "L E"] | None, heads: NamedHeads | None
    ) -> Float[Array, "*dims columns"]:
        values, scale, layer = self.values[...], self.scale[...], self.layer[...]
        if heads is None:
            out = weight_only_matmul(x.reshape(-1, x.shape[-1]), values, scale, bias, layer=layer)
            return out.reshape(*x.shape[:-1], -1)

        def named(stack: Array) -> Array:
            return heads.columns(stack[layer].astype(x.dtype).T)

        lead = (1,) * (x.ndim - 1)
        out = jnp.dot(x, named(values), precision=matmul_precision(x.dtype)) * named(scale).reshape(*lead, -1)
        return out if bias is None else out + named(bias).reshape(*lead, -1)
