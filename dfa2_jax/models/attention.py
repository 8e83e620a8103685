"""The one place where models call attention kernels: what a layer's attention does, and what it remembers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import CACHED, Layout
from pallas_kernels import arrow_attention as arrow_attention
from pallas_kernels import arrow_implementation as arrow_implementation
from pallas_kernels import dense_implementation as dense_implementation
from pallas_kernels import gpu_kind as gpu_kind
from pallas_kernels import nested_arrow_attention as nested_arrow_attention

Heads = Float[Array, "B T N H"]
Project = Callable[[], tuple[Heads, Heads, Heads]]
"""Makes q, k and v of every token, at the price of their projections."""


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


@dataclass(frozen=True)
class Planned:
    """Each head in full, inside an arrow or reused (DiTFastAttnV2, section 3). Remembers every layer's output.

    `skip`: a layer whose heads are all cached makes no queries, keys and values. It takes a branch around the
    projections of every layer.
    """

    implementation: str | None = None
    skip: bool = True

    def __call__(
        self, project: Project, layout: Layout, memory: Float[Array, "L B T N H"], row: PlanRow
    ) -> tuple[Heads, Float[Array, "L B T N H"]]:
        def compute(project: Project, stack: Float[Array, "L B T N H"]) -> Float[Array, "L B T N H"]:
            return arrow_attention(
                *project(),
                row.half_window,
                layout=layout,
                cache=stack,
                layer=row.layer,
                head_order=row.head_order,
                implementation=self.implementation,
            )

        if row.half_window is None or not self.skip:
            memory = compute(project, memory)
        else:
            idle = jnp.all(row.half_window == CACHED)
            best = arrow_implementation(memory.dtype, memory.shape[-1]).implementation
            if (self.implementation or best) == "triton":
                memory = jax.lax.cond(idle, lambda stack: stack, partial(compute, project), memory)
            else:  # XLA's CPU backend would copy a stack that passes through a cond, all its layers for each of them
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(project))
                memory = compute(lambda: jax.lax.cond(idle, lambda: nothing, project), memory)
        return memory[row.layer], memory
