"""What the passes between products and attention are given, and how XLA computes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

EPS = 1e-6
"""Every norm in MMDiT's blocks has it."""

SMALLEST = 1e-12
"""In place of a row's largest magnitude, where all of it is 0."""

Heads = Float[Array, "B S N H"]
Rope = tuple[Float[Array, "S half"], Float[Array, "S half"]]
"""(cos, sin) of every position and pair of channels, float32."""
QKV = tuple[Heads, Heads, Heads]
ScaleAndShift = tuple[Float[Array, "B 1 D"], Float[Array, "B 1 D"]]


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of a stream before their norms, as one product gives them.

    heads: of queries, then as many of keys, then of values.
    norms: scales of the RMS norms of queries and keys, if there are.
    which: the places of these heads among `num_heads`; None: all, in their order.
    """

    heads: Float[Array, "B T three_n H"]
    num_heads: int
    norms: tuple[Float[Array, " H"], Float[Array, " H"]] | None = None
    which: Int[Array, " n"] | None = None


@runtime_checkable
class ComputesPasses(Protocol):
    def quantized_rows(
        self, x: Float[Array, "*dims D"], modulation: ScaleAndShift | None, *, interpret: bool
    ) -> tuple[Int[Array, "*dims D"], Float[Array, "*dims"]]: ...

    def normed_qkv(self, streams: Sequence[Projected], rope: Rope | None, *, interpret: bool) -> QKV: ...

    def few_rows(
        self,
        x: Float[Array, "M K"],
        w: Int[Array, "L E K"],
        column_scale: Float[Array, "L E"],
        bias: Float[Array, "L E"] | None,
        layer: Int[Array, ""],
        *,
        interpret: bool,
    ) -> Float[Array, "M E"]: ...


def largest_of(dtype: DTypeLike) -> float:
    """The largest 8-bit value in use: 127, or 448 of float8_e4m3fn."""
    return 127.0 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)


def layer_norm(x: Float[Array, "*dims D"], eps: float = EPS) -> Float[Array, "*dims D"]:
    """Layer norm without parameters, in float32: in MMDiT, scale and shift come from the modulation."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rms_norm(x: Float[Array, "*dims D"], scale: Float[Array, " D"], eps: float = EPS) -> Float[Array, "*dims D"]:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def rotate(x: Heads, rope: Rope) -> Heads:
    """Rotary position embedding on interleaved pairs, in float32 (RoFormer, arXiv 2104.09864, section 3.2)."""
    cos, sin = (table[None, :, None] for table in rope)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def quantized_rows(x: Float[Array, "*dims D"], dtype: DTypeLike) -> tuple[Num[Array, "*dims D"], Float[Array, "*dims"]]:
    most, x32 = largest_of(dtype), x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x32).max(axis=-1), SMALLEST) / most
    values = jnp.clip(x32 / scale[..., None], -most, most)  # XLA's own cast to float8 makes what is above NaN
    return (jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values).astype(dtype), scale


def normed_qkv(streams: Sequence[Projected], rope: Rope | None) -> QKV:
    def normed(stream: Projected) -> tuple[Array, ...]:
        q, k, v = jnp.split(stream.heads, 3, axis=2)
        return (q, k, v) if stream.norms is None else (rms_norm(q, stream.norms[0]), rms_norm(k, stream.norms[1]), v)

    q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*map(normed, streams), strict=True))
    q, k = (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))
    which, num_heads = streams[0].which, streams[0].num_heads
    if which is None:
        return q, k, v
    q, k, v = (jnp.zeros((*x.shape[:2], num_heads, x.shape[3]), x.dtype).at[:, :, which].set(x) for x in (q, k, v))
    return q, k, v
