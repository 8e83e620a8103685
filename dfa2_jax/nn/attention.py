"""The one place where models call attention kernels: what a layer's attention does, and what it remembers."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.nn.layers import MANY_ROWS, take_heads
from pallas_kernels import CACHED, Layout
from pallas_kernels import arrow_attention as arrow_attention
from pallas_kernels import arrow_implementation as arrow_implementation
from pallas_kernels import dense_implementation as dense_implementation
from pallas_kernels import gpu_kind as gpu_kind
from pallas_kernels import nested_arrow_attention as nested_arrow_attention

Heads = Float[Array, "B T N H"]


@runtime_checkable
class Project(Protocol):
    """Makes q, k and v of every token, of all heads or of those named, at the price of their projections."""

    def __call__(self, heads: Int[Array, " n"] | None = None, /) -> tuple[Heads, Heads, Heads]: ...


Memory = tuple[Any, Any]
"""Of one segment of equal blocks: for their first attention and for their second, if they have one."""

NOTHING = (None, None)

Rows = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
"""By segment, then for the first and the second attention of its blocks: their numbers in order of execution."""


@runtime_checkable
class Attend(Protocol):
    """Attention of one layer, by a named implementation or the best (`pallas_kernels.arrow_attention`)."""

    @property
    def implementation(self) -> str | None: ...

    def __call__(self, project: Project, layout: Layout, memory: Any, row: Any) -> tuple[Heads, Any]:
        """The output, and what the loop over layers remembers.

        Args:
            memory: state of all layers of this kind in a segment, carried through the loop over them.
            row: this layer's own data.
        """
        ...


@dataclass(frozen=True)
class Dense:
    """Full attention; remembers nothing."""

    implementation: str | None = None

    def __call__(self, project: Project, layout: Layout, memory: None, row: None) -> tuple[Heads, None]:
        return arrow_attention(*project(), layout=layout, implementation=self.implementation), None


class PlanRow(NamedTuple):
    """What a plan says of one layer at one step."""

    layer: Int[Array, ""]
    """Its place in the stack of cached outputs."""
    half_window: Int[Array, " N"] | None
    """As in `arrow_attention`; None at the first step, which is dense."""
    head_order: Int[Array, " N"] | None


class Branches(NamedTuple):
    """Ways to make no more of a layer's queries, keys and values than its plan asks for.

    On an H100 a step of FLUX.1-dev at 2048 px that spares a sixth of its heads is 1 to 3 % faster, one of SD3.5-medium
    as fast as without branches. At 1024 px, where the weights that branches read are first taken out of their stack,
    they pay if whole layers are idle from 0.15 of the layers on; if all layers spare some heads, from 0.3 of the heads
    on for FLUX.1-dev and SD3.5-large, and 0.55 for SD3.5-medium (at 0.5 it loses 1.5 %).
    """

    parts: int
    """A layer makes none, one, ... or all of so many parts of its heads. Each is a branch to compile."""
    worth: float
    """A step takes the branches if they spare more than this share of all heads; at 1024 px a compromise."""

    @classmethod
    def of(cls, num_rows: int) -> "Branches":
        return cls(6, 1 / 8) if num_rows >= MANY_ROWS else cls(2, 1 / 4)

    def counts(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each branch makes."""
        return tuple(sorted({-(-num_heads * part // self.parts) for part in range(self.parts + 1)}))

    def choose(self, half_window: Int[Array, "*layers N"]) -> Int[Array, "*layers"]:
        """The branch that makes no more heads than it must: all that are not cached."""
        counts = jnp.array(self.counts(half_window.shape[-1]))
        needed = jnp.sum(half_window != CACHED, axis=-1)
        return jnp.searchsorted(counts, needed, method="compare_all").astype(jnp.int32)  # by default it is a loop

    def pay(self, half_window: Int[Array, "layers N"]) -> Bool[Array, ""]:
        """Whether a step takes them."""
        num_heads = half_window.shape[-1]
        made = jnp.array(self.counts(num_heads))[self.choose(half_window)]
        return 1 - made.mean() / num_heads > self.worth

    def take(self, project: Project, half_window: Int[Array, " N"]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values, with anything at the places of cached heads."""
        cached = half_window == CACHED

        def first(count: int) -> tuple[Heads, Heads, Heads]:
            if count == len(cached):
                return project()
            if not count:
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(project))
            order = jnp.argsort(cached)  # stable: those that are not cached come first
            # Last: done before norms and rotary embedding, in their fusions, FLUX.1-dev's steps at 2048 px by plans
            # that keep 0.32 took 2 and 3 % longer (mixed, by reuse) than with a pass of its own.
            place = jnp.minimum(jnp.argsort(order), count - 1)
            q, k, v = (take_heads(x, place) for x in project(order[:count]))
            return q, k, v

        return jax.lax.switch(self.choose(half_window), [partial(first, n) for n in self.counts(len(cached))])


@dataclass(frozen=True)
class Planned:
    """Each head in full, inside an arrow or reused (DiTFastAttnV2, section 3). Remembers every layer's output.

    `skip`: a layer takes one of `Branches`, which leaves out cached heads' queries, keys and values.
    """

    implementation: str | None = None
    skip: bool = True

    def __call__(
        self, project: Project, layout: Layout, memory: Float[Array, "L B T N H"], row: PlanRow
    ) -> tuple[Heads, Float[Array, "L B T N H"]]:
        if row.half_window is None or not self.skip:
            qkv = project()
        else:
            _, batch, length, *_ = memory.shape
            qkv = Branches.of(batch * length).take(project, row.half_window)
        memory = arrow_attention(
            *qkv,
            row.half_window,
            layout=layout,
            cache=memory,
            layer=row.layer,
            head_order=row.head_order,
            implementation=self.implementation,
        )
        return memory[row.layer], memory
