"""`arrow_attention`: checks its arguments and picks an implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from . import blockwise, reference
from .layout import Layout

IMPLEMENTATIONS = ("reference", "blockwise", "cudnn")


def arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    half_window: Int[Array, " N"] | None = None,
    *,
    layout: Layout,
    cache: Float[Array, "*L B T N H"] | None = None,
    layer: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "*L B T N H"]:
    """Attention of which each head is full, an arrow (local band, text dense) or cached (DiTFastAttnV2, section 3.1).

    Args:
        q, k, v: heads on the third axis, as in `jax.nn.dot_product_attention`; softmax scale `H ** -0.5`. The queries
            are the whole sequence, or (dense attention only) any rows of it.
        half_window: visual tokens kept on each side of the diagonal, per head; `FULL` (-1), `CACHED` (-2). It is data:
            another plan compiles nothing. None: dense attention, decided at trace time.
        layout: which positions are text.
        cache: the outputs that cached heads return, or a stack of them over layers with `layer`, the one to use.
        implementation: None picks the best for the device: "cudnn" for dense 16-bit attention on NVIDIA, "blockwise"
            for other dense attention, "reference" for arrows.

    Returns:
        The output [B, T, N, H]; with a stack, the stack with this layer's entry replaced by the output.

    Raises:
        ValueError: arguments that contradict each other; the message shows both values.
        NotImplementedError: the named implementation cannot do this.
    """
    _check(q, k, v, half_window, layout, cache, layer)
    if implementation is None:
        implementation = (
            "reference" if half_window is not None else dense_implementation(q.dtype, q.shape[-1]).implementation
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is not one of {IMPLEMENTATIONS}.")
    if half_window is not None and implementation != "reference":
        raise NotImplementedError(f"{implementation=} computes dense attention only; pass 'reference' for arrows.")

    stacked = cache is not None and layer is not None
    entry = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) if stacked else cache
    if implementation == "cudnn":
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    elif implementation == "blockwise":
        out = blockwise.dense_attention(q, k, v)
    else:
        out = reference.attention(q, k, v, half_window, layout, entry)
    return jax.lax.dynamic_update_index_in_dim(cache, out, layer, 0) if stacked else out


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: str
    why: str


def dense_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """What dense attention runs on with the default device."""
    if jax.default_backend() != "gpu" or "NVIDIA" not in jax.devices()[0].device_kind:
        return Choice("blockwise", f"the default device is {jax.devices()[0].device_kind!r}, not an NVIDIA GPU")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return Choice("blockwise", f"cuDNN's fused attention is 16-bit, not {jnp.dtype(dtype).name}")
    if head_dim > 128 or head_dim % 8:
        return Choice("blockwise", f"cuDNN's fused attention needs a head_dim of at most 128, by 8s, not {head_dim}")
    return Choice("cudnn", "the fastest dense attention on NVIDIA GPUs for 16-bit inputs")


def _check(q, k, v, half_window, layout, cache, layer) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, N, H], got {x.shape=}.")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {q.dtype=} and {name}.dtype={x.dtype}.")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q, k and v disagree on batch, heads or head_dim: {q.shape=}, {k.shape=}, {v.shape=}.")
    if k.shape[1] != layout.length:
        raise ValueError(f"{k.shape[1]=} tokens do not match {layout} of {layout.length}.")
    if half_window is not None:
        if half_window.shape != (q.shape[2],) or half_window.dtype != np.int32:
            raise ValueError(f"half_window must be int32 [{q.shape[2]}], got {half_window.dtype} {half_window.shape}.")
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"Arrows need every query: {q.shape[1]=} but {k.shape[1]=}.")
    if layer is not None and cache is None:
        raise ValueError(f"{layer=} names an entry of a cache stack, but cache is None.")
    if cache is not None:
        want = cache.shape if layer is None else cache.shape[1:]
        if want != q.shape or cache.dtype != q.dtype:
            raise ValueError(
                f"cache must hold outputs like q: {cache.dtype} {cache.shape}, {layer=}, {q.dtype} {q.shape}."
            )
        if layer is not None and isinstance(layer, int) and not 0 <= layer < cache.shape[0]:
            raise ValueError(f"{layer=} is outside the cache stack of {cache.shape[0]} layers.")
