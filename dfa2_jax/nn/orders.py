"""Visual tokens frame by frame, or place by place over time."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


@partial(jax.jit, static_argnames=("layout", "frames"), donate_argnames=("memory",))
def native_memory(
    memory: Float[Array, "L B T N H"], order: Int[Array | np.ndarray, "L N"], layout: Layout, frames: int
) -> Float[Array, "L B T N H"]:
    """The outputs of a stack of layers in the native order, in the same memory, by the order that each lies in."""

    def turn(layer: Any, memory: Float[Array, "L B T N H"]) -> Float[Array, "L B T N H"]:
        return memory.at[layer].set(to_native(memory[layer], jnp.asarray(order)[layer], layout, frames))

    return jax.lax.fori_loop(0, len(memory), turn, memory)
