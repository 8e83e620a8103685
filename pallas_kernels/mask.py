"""The definition of arrow attention: every implementation equals this mask."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .layout import FULL, Layout


def dense_mask(half_window: Int[Array, " N"], layout: Layout) -> Bool[Array, "N S S"]:
    """Query i attends key j iff i is text, or j is text, or |i - j| <= half_window (DiTFastAttnV2, section 3.1).

    A full head attends to everything. A cached head's rows come out as `|i - j| <= CACHED`, that is text only:
    callers replace its output, they do not read its mask.

        Layout(num_text=1, num_visual=4, text_first=True), half_window=1
        x x x x x
        x x x . .
        x x x x .
        x . x x x
        x . . x x
    """
    position = jnp.arange(layout.length)
    start, stop = layout.text.start, layout.text.stop
    is_text = (position >= start) & (position < stop)
    near = jnp.abs(position[:, None] - position[None, :])[None] <= half_window[:, None, None]
    text = is_text[:, None] | is_text[None, :]
    return near | text[None] | (half_window == FULL)[:, None, None]
