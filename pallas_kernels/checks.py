"""What `arrow_attention` and `nested_arrow_attention` refuse: each message shows both values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from pallas_kernels.layout import CACHED, Layout


def concrete(x: ArrayLike) -> np.ndarray | None:
    """The values, outside of `jax.jit` and other transformations."""
    return None if isinstance(x, Tracer) else np.asarray(x)


def check_int32(name: str, x: object, shape: tuple[int, ...]) -> None:
    if not isinstance(x, np.ndarray | jax.Array):
        raise ValueError(f"{name} must be an array, int32 {list(shape)}, got {x!r:.100}.")
    if x.shape != shape or x.dtype != np.int32:
        raise ValueError(f"{name} must be int32 {list(shape)}, got {x.dtype} {x.shape}.")


def check_tokens(q: Array, k: Array, v: Array, layout: Layout) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, N, H], got {x.shape=}.")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must have one dtype, got {q.dtype=} and {name}.dtype={x.dtype}.")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q, k and v must be floating-point, got {q.dtype}.")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q, k and v disagree on batch, heads or head_dim: {q.shape=}, {k.shape=}, {v.shape=}.")
    if 0 in q.shape:
        raise ValueError(f"q, k and v hold nothing: {q.shape=}.")
    if not isinstance(layout, Layout):
        raise ValueError(f"layout must be a Layout, got {layout!r:.100}.")
    if k.shape[1] != layout.length:
        raise ValueError(f"{k.shape[1]=} tokens do not match {layout} of {layout.length}.")


def check_heads(q: Array, k: Array, half_window: Array | None, head_order: Array | None) -> None:
    heads = q.shape[2]
    if head_order is not None:
        if half_window is None:
            raise ValueError("head_order orders the heads of a half_window, which is None.")
        check_int32("head_order", head_order, (heads,))
        order = concrete(head_order)
        if order is not None and sorted(order.tolist()) != list(range(heads)):
            raise ValueError(f"head_order must be a permutation of {heads} heads, got {order.tolist()}.")
    if half_window is not None:
        check_int32("half_window", half_window, (heads,))
        values = concrete(half_window)
        if values is not None and values.size and values.min() < CACHED:
            raise ValueError(f"half_window holds {values.min()}: below 0 there are FULL (-1) and CACHED (-2) only.")
        if q.shape[1] != k.shape[1]:
            raise ValueError(f"Arrows need every query: {q.shape[1]=} but {k.shape[1]=}.")


def check_cache(q: Array, half_window: Array | None, cache: Array | None, layer: ArrayLike | None) -> None:
    if cache is None:
        if layer is not None:
            raise ValueError(f"{layer=} names an entry of a cache stack, but cache is None.")
        values = None if half_window is None else concrete(half_window)
        if values is not None and CACHED in values:
            raise ValueError(f"half_window={values.tolist()} has cached heads (-2), but cache is None.")
        return
    want = cache.shape if layer is None else cache.shape[1:]
    if want != q.shape or cache.dtype != q.dtype:
        raise ValueError(f"cache must hold outputs like q: {cache.dtype} {cache.shape}, {layer=}, {q.dtype} {q.shape}.")
    if layer is None:
        return
    if isinstance(layer, bool) or jnp.shape(layer) != () or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise ValueError(f"layer must be one integer, got {jnp.result_type(layer)} {jnp.shape(layer)}: {layer!r:.100}.")
    index = concrete(layer)
    if index is not None and not 0 <= index < cache.shape[0]:
        raise ValueError(f"layer={index.tolist()} is outside the cache stack of {cache.shape[0]} layers.")


def check_text_length(q: Array, layout: Layout, text_length: Array | None) -> None:
    if text_length is None:
        return
    check_int32("text_length", text_length, (q.shape[0],))
    values, least = concrete(text_length), int(not layout.num_visual)
    if values is not None and (values.min() < least or values.max() > layout.num_text):
        raise ValueError(f"text_length must be from {least} to {layout.num_text=}, got {values.tolist()}.")
