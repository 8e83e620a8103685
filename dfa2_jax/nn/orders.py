"""Visual tokens frame by frame, or place by place over time."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.layout import Layout

Heads = Float[Array, "B T N H"]


def transposed(x: Heads, layout: Layout, first: int) -> Heads:
    """Visual tokens [first, others] as [others, first]; text stays where it is.

    Tokens of `first` frames so run over time. With the number of places as `first`, that is undone.
    """
    visual = x[:, layout.visual]
    batch, count, *heads = visual.shape
    visual = visual.reshape(batch, first, count // first, *heads).swapaxes(1, 2).reshape(visual.shape)
    text = x[:, layout.text]
    return jnp.concatenate([text, visual] if layout.text_first else [visual, text], axis=1)


def to_orders(x: Heads, order: Int[Array, " N"], layout: Layout, frames: int) -> Heads:
    """Each head's tokens in its order, from native ones: a number of `plan.method.ORDERS`."""
    return jnp.where((order == 1)[None, None, :, None], transposed(x, layout, frames), x)


def to_native(x: Heads, order: Int[Array, " N"], layout: Layout, frames: int) -> Heads:
    """The inverse."""
    places = layout.num_visual // frames
    return jnp.where((order == 1)[None, None, :, None], transposed(x, layout, places), x)
