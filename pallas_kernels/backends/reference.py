"""Arrow attention written down plainly, in float32. Memory is quadratic: for tests and small shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import dense_mask


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    half_window: Int[Array, " N"] | None,
    layout: Layout,
    cache: Float[Array, "B T N H"] | None,
) -> Float[Array, "B T N H"]:
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q32, k32, precision="highest") * q.shape[-1] ** -0.5
    if half_window is not None:
        scores = jnp.where(dense_mask(half_window, layout)[None], scores, -jnp.inf)
    out = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores, axis=-1), v32, precision="highest").astype(q.dtype)
    if half_window is None:
        return out
    return jnp.where((half_window == CACHED)[:, None], jnp.nan if cache is None else cache, out)


def nested_arrow_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    half_windows: Int[Array, " W"],
    layout: Layout,
) -> Float[Array, "W+1 B T N H"]:
    def under(window: Int[Array, ""]) -> Float[Array, "B T N H"]:
        return attention(q, k, v, jnp.broadcast_to(window, q.shape[2]), layout, None)

    return jnp.stack([under(window) for window in jnp.append(half_windows, FULL)])
