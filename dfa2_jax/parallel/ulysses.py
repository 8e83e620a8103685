"""Attention over tokens that devices share. Within it, they share heads (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dfa2_jax.nn.attention import QKV, Heads, LayerPlan, Planned, Project
from dfa2_jax.nn.weights import take_heads
from dfa2_jax.parallel.dealing import hands
from dfa2_jax.parallel.mesh import TOKENS, DeviceMesh
from pallas_kernels import CACHED, Layout, arrow_attention


@dataclass(frozen=True)
class Exchange:
    """Tokens for heads and back, between the devices of a row of the mesh.

    Args:
        whole: the sequence without padding. No padding gets into attention.
        share: what one device has of it.
    """

    parts: int
    whole: Layout
    share: Layout

    def to_heads(self, *arrays: Float[Array, "B own N H"]) -> list[Float[Array, "B T share H"]]:
        """All heads of own tokens become own heads of all tokens: one exchange for all arrays, of equal shapes."""
        *_, length, num_heads, dim = arrays[0].shape
        x = jnp.stack(arrays).reshape(len(arrays), -1, length, self.parts, num_heads // self.parts, dim)
        x = self.swapped(jnp.moveaxis(x, 3, 0))
        x = jnp.moveaxis(x, 0, 2)  # [arrays, B, device, own, heads, H]

        def joined(tokens: slice, count: int) -> Array:
            part = x[:, :, :, tokens]
            return part.reshape(*part.shape[:2], -1, *part.shape[4:])[:, :, :count]

        text = joined(self.share.text, self.whole.num_text)
        visual = joined(self.share.visual, self.whole.num_visual)
        return list(jnp.concatenate(self._in_order(text, visual), axis=2))

    def to_tokens(self, x: Float[Array, "B T share H"]) -> Float[Array, "B own N H"]:
        """The inverse: own heads of all tokens become all heads of own tokens, zero where those are padding."""

        def split(part: Array, each: int) -> Array:
            part = jnp.pad(part, ((0, 0), (0, each * self.parts - part.shape[1]), (0, 0), (0, 0)))
            return part.reshape(len(x), self.parts, each, *x.shape[2:])

        text = split(x[:, self.whole.text], self.share.num_text)
        visual = split(x[:, self.whole.visual], self.share.num_visual)
        x = jnp.concatenate(self._in_order(text, visual), axis=2)  # [B, device, own, heads, H]
        x = self.swapped(jnp.moveaxis(x, 1, 0))
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    def swapped(self, x: Float[Array, "_ ..."]) -> Float[Array, "_ ..."]:
        """Part i of every device, at device i."""
        return lax.all_to_all(x, TOKENS, 0, 0, tiled=True)

    def _in_order(self, text: Array, visual: Array) -> tuple[Array, Array]:
        return (text, visual) if self.whole.text_first else (visual, text)


@dataclass(frozen=True)
class Ulysses:
    """`Dense` or `Planned` where devices share tokens.

    Outputs are remembered where tokens are. So a layer's heads may be dealt to other devices at every step, as the plan
    makes them cost (`parallel.dealing`). Cached heads are neither projected nor exchanged.

    Attributes:
        num_text, num_visual: of the whole sequence.
        planned: what one device would do; None: dense attention.
    """

    mesh: DeviceMesh
    num_text: int
    num_visual: int
    implementation: str | None
    planned: Planned | None

    @property
    def skips_projections(self) -> bool:
        return self.planned is not None and self.planned.skip_projections

    def memory(self, stack: jax.ShapeDtypeStruct) -> Any:
        return None if self.planned is None else self.planned.memory(stack)

    def __call__(
        self, project: Project, layout: Layout, memory: Float[Array, "L B own N H"] | None, plan: LayerPlan
    ) -> tuple[Heads, Float[Array, "L B own N H"] | None]:
        """project, layout: of own tokens."""
        whole = Layout(self.num_text if layout.num_text else 0, self.num_visual, layout.text_first)
        exchange = Exchange(self.mesh.tokens, whole, layout)
        if memory is None or plan.half_window is None or plan.head_order is None:
            out = self._of_all(project(), exchange, plan.text_length)
        else:
            some = self._of_some(project, exchange, plan.half_window, plan.head_order, plan.text_length)
            is_cached = plan.half_window[: some.shape[2], None] == CACHED
            out = jnp.where(is_cached, memory[plan.place], some)
        if memory is None:
            return out, None
        return out, lax.dynamic_update_index_in_dim(memory, out, plan.place, 0)

    def _of_all(self, qkv: QKV, exchange: Exchange, text_length: Int[Array, " B"] | None) -> Heads:
        """Every head in full."""
        num_heads = qkv[0].shape[2]
        padding = (0, 0), (0, 0), (0, -num_heads % exchange.parts), (0, 0)
        q, k, v = exchange.to_heads(*(jnp.pad(x, padding) for x in qkv))
        options = {"layout": exchange.whole, "text_length": text_length, "implementation": self.implementation}
        out = arrow_attention(q, k, v, **options)
        return exchange.to_tokens(out)[:, :, :num_heads]

    def _of_some(
        self,
        project: Project,
        exchange: Exchange,
        half_window: Int[Array, " padded"],
        order: Int[Array, " padded"],
        text_length: Int[Array, " B"] | None,
    ) -> Heads:
        """Heads that are not cached, as `order` deals them; anything at the places of others.

        Args:
            half_window, order: padded to a number that devices divide. Heads of padding are cached, and last in order.
        """
        shapes = jax.eval_shape(project)[0]
        num_heads, counts = shapes.shape[2], hands(len(order) // exchange.parts)
        options = {"layout": exchange.whole, "text_length": text_length, "implementation": self.implementation}

        def made(count: int) -> Heads:
            """As many on every device."""
            if not count:
                return jnp.zeros(shapes.shape, shapes.dtype)
            dealt = order[: count * exchange.parts]
            which = jnp.minimum(dealt, num_heads - 1)
            every = not self.skips_projections or len(which) >= num_heads
            qkv = project() if every else project(which)
            if qkv[0].shape[2] == num_heads:  # in their places among all
                qkv = tuple(take_heads(x, which) for x in qkv)
            q, k, v = exchange.to_heads(*qkv)
            own = lax.dynamic_slice_in_dim(half_window[dealt], lax.axis_index(TOKENS) * count, count)
            out = arrow_attention(q, k, v, own, **options)
            place = jnp.zeros(num_heads, jnp.int32).at[dealt].set(jnp.arange(len(dealt), dtype=jnp.int32), mode="drop")
            return take_heads(exchange.to_tokens(out), place)

        needed = -(-jnp.sum(half_window != CACHED) // exchange.parts)
        branch = jnp.searchsorted(jnp.array(counts), needed, method="compare_all").astype(jnp.int32)
        return lax.switch(branch, [partial(made, count) for count in counts])
