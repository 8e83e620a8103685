"""The one place where models call attention kernels."""

from jaxtyping import Array, Float, Int

from pallas_kernels import Layout, arrow_attention
from pallas_kernels import arrow_implementation as arrow_implementation
from pallas_kernels import dense_implementation as dense_implementation


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    layout: Layout,
    *,
    half_window: Int[Array, " N"] | None = None,
    cache: Float[Array, "L B T N H"] | None = None,
    layer: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "L B T N H"] | None]:
    """Attention of one layer: its plan row `half_window`, and the stack of cached outputs that it reads and updates.

    Returns the output and the updated stack (None without one).
    """
    result = arrow_attention(
        q, k, v, half_window, layout=layout, cache=cache, layer=layer, implementation=implementation
    )
    return (result, None) if cache is None else (result[layer], result)
