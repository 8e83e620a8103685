"""Arrow attention written down plainly, in float32. Memory is quadratic: for tests and small shapes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import dense_mask, seen_keys


class Reference:
    interpretable = False

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        return None

    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        q, k, v, cache, layer = problem.q, problem.k, problem.v, problem.cache, problem.layer
        if cache is None or layer is None:
            return attention(q, k, v, problem.windows, problem.layout, cache, problem.text_length)
        entry = jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        out = attention(q, k, v, problem.windows, problem.layout, entry, problem.text_length)
        return jax.lax.dynamic_update_index_in_dim(cache, out, layer, 0)

    def nested(
        self, problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
    ) -> Float[Array, "W+1 B T N H"]:
        def under(window: Int[Array, ""]) -> Float[Array, "B T N H"]:
            windows = jnp.broadcast_to(window, problem.q.shape[2])
            return attention(problem.q, problem.k, problem.v, windows, problem.layout, None, problem.text_length)

        return jnp.stack([under(window) for window in jnp.append(half_windows, FULL)])

    def dense(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "B T N H"]:
        return attention(problem.q, problem.k, problem.v, None, problem.layout, None, problem.text_length)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    half_window: Int[Array, " N"] | None,
    layout: Layout,
    cache: Float[Array, "B T N H"] | None,
    text_length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q32, k32, precision="highest") * q.shape[-1] ** -0.5
    if half_window is not None:
        scores = jnp.where(dense_mask(half_window, layout)[None], scores, -jnp.inf)
    if text_length is not None:
        scores = jnp.where(seen_keys(text_length, layout)[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v32, precision="highest").astype(q.dtype)
    if half_window is None:
        return out
    return jnp.where((half_window == CACHED)[:, None], jnp.nan if cache is None else cache, out)
