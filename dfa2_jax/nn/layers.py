"""Layers that the transformers, encoders and autoencoder share.

Dim letters, everywhere in the project: `B` batch, `T` query tokens, `S` key tokens, `N` heads, `H` head dim, `D` width.
Norms, softmax and position tables are computed in float32 and cast back once; float32 matrix products are IEEE float32.
"""

from collections.abc import Callable
from math import pi, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """HIGHEST for float32: JAX's default on NVIDIA is TF32, torch's is IEEE, and no CPU test sees the difference."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


XLA_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""For the outermost `jax.jit` of sampling and calibration: their products then read a layer's weights where they lie in
the stack of layers. By itself XLA copies every weight at every step: into a buffer of its own, which Triton's products
need, and next to others that multiply the same input, which are merged. On an H100 these copies take 17 of FLUX.1-dev's
151 ms at 1024 px, and 4 of SD3.5-medium's 58 (benchmarks/results/profile_h100.json). Nothing changes on a CPU."""


MANY_ROWS = 12_000
"""From so many rows on a product takes longer to read weights in the stack than to copy them (`Linear`)."""


class Linear(nnx.Linear):
    """`x @ kernel`, and then `+ bias` as an operation of its own: XLA would make the bias part of the product, and of
    such a product it copies the kernel out of the stack of layers first (`XLA_OPTIONS`). The next elementwise operation
    adds the bias for nothing.

    But of a product that reads from the stack XLA takes the algorithm that cuBLAS guesses, not the fastest it timed: 6
    to 12 % more time on an H100. At 4,608 rows (FLUX.1-dev, 1024 px) and 8,192 (SD3.5, guided) that is less than the
    copy takes, at 16,896 (2048 px) it is more.
    """

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims E"]:
        return self._columns(x, lambda parameter: parameter)

    def heads(
        self, x: Float[Array, "B T D"], num_heads: int, which: Int[Array, " n"] | None = None
    ) -> Float[Array, "B T n H"]:
        """The output by heads: all of them, or those that are named, for their share of the work."""
        if which is None:
            return split_heads(self(x), num_heads)
        out = self._columns(x, lambda parameter: merge_heads(take_heads(split_heads(parameter, num_heads), which)))
        return split_heads(out, len(which))

    def _columns(self, x: Float[Array, "*dims D"], of: Callable[[Array], Array]) -> Float[Array, "*dims E"]:
        out = jnp.dot(x.astype(self.dtype), of(self.kernel[...]), precision=self.precision)
        if self.bias is None:
            return out
        if prod(out.shape[:-1]) < MANY_ROWS:
            out = jax.lax.optimization_barrier(out)
        return out + of(self.bias[...]).reshape((1,) * (out.ndim - 1) + (-1,))


def linear(in_features: int, out_features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    return Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


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


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """GELU by tanh (arXiv 1606.08415, section 2), with `(1 + tanh(y)) / 2` as the equal `sigmoid(2 y)`: XLA's tanh is a
    polynomial, its exp the GPU's own. 0.88 of the time on an H100, where it is 5 % of FLUX.1-dev's step."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.nn.sigmoid(2 * (2 / pi) ** 0.5 * (x32 + 0.044715 * x32**3))).astype(x.dtype)


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


class Modulation(NamedTuple):
    """One branch's share of an adaptive layer norm (DiT, arXiv 2212.09748, section 3.2)."""

    shift: Float[Array, "B 1 D"]
    scale: Float[Array, "B 1 D"]
    gate: Float[Array, "B 1 D"]

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * (1 + self.scale) + self.shift


class AdaLN(nnx.Module):
    """`silu(vector) -> linear -> branches x (shift, scale, gate)`, the adaLN-Zero of every block."""

    def __init__(self, width: int, branches: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = linear(width, 3 * branches * width, dtype=dtype, rngs=rngs)
        self.branches = branches

    def __call__(self, vector: Float[Array, "B D"]) -> list[Modulation]:
        chunks = jnp.split(self.linear(jax.nn.silu(vector))[:, None], 3 * self.branches, axis=-1)
        return [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


class AdaLNOut(nnx.Module):
    """The last norm of a stream: no gate, and stored as (scale, shift), the reverse of `AdaLN`."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.linear = linear(width, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], vector: Float[Array, "B D"]) -> Float[Array, "B T D"]:
        scale, shift = jnp.split(self.linear(jax.nn.silu(vector))[:, None], 2, axis=-1)
        return layer_norm(x) * (1 + scale) + shift


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
        self.up = linear(in_features, hidden, dtype=dtype, rngs=rngs)
        self.down = linear(hidden, out_features or in_features, use_bias=down_bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims E"]:
        return self.down(self.activation(self.up(x)))


def sinusoid(x: Float[np.ndarray, " steps"], dim: int = 256) -> Float[np.ndarray, "steps {dim}"]:
    """Sinusoidal embedding of timesteps or guidance, [cos, sin], computed on the host for all steps at once.

    Exponents, frequencies and angles are rounded to float32 where torch rounds them (diffusers `get_timestep_embedding`
    with `flip_sin_to_cos=True, downscale_freq_shift=0`): the model was trained with those frequencies, and 1e-7 of one
    is 3e-4 of an angle of 3500. The rest is float64, so no platform's exp or cosine enters the result.
    """
    half = dim // 2
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (x.astype(np.float32)[:, None] * frequencies[None]).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` equal blocks as one module whose parameters have a leading layer axis, for `run_blocks`."""
    return nnx.vmap(make)(rngs.split(count))


def run_blocks(
    blocks: nnx.Module,
    step: Callable[[Any, Any, Any], Any],
    carry: Any,
    per_layer: Any = None,
    *,
    unroll: int | bool = 1,
) -> Any:
    """Scan `carry = step(block, carry, per_layer[i])` over the layer axis of stacked `blocks`.

    `unroll` is `jax.lax.scan`'s: 1 compiles one block, True all of them, which brings next to nothing (README).
    """
    graph, params = nnx.split(blocks)

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        layer_params, layer_input = xs
        return step(nnx.merge(graph, layer_params), carry, layer_input), None

    return jax.lax.scan(body, carry, (params, per_layer), unroll=unroll)[0]
