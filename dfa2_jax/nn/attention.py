"""The one place where models call attention kernels: what a layer's attention does, and what it remembers."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.orders import to_native, to_orders
from dfa2_jax.nn.weights import MANY_ROWS, take_heads
from pallas_kernels import CACHED, Layout
from pallas_kernels import arrow_attention as arrow_attention
from pallas_kernels import arrow_implementation as arrow_implementation
from pallas_kernels import dense_implementation as dense_implementation
from pallas_kernels import gpu_kind as gpu_kind
from pallas_kernels import nested_arrow_attention as nested_arrow_attention

Heads = Float[Array, "B T N H"]
QKV = tuple[Heads, Heads, Heads]


@dataclass(frozen=True)
class AttentionCall:
    """One attention layer of a network, which a forward calls once. A plan has the layers in order of execution."""

    name: str
    """The plan's key: "attn2.7"."""
    block: int
    """The block's number in the network: 7."""
    stack: str
    """Whose blocks it is stacked with: "segments.0.attn2"; memory and plans of the layer lie under this name."""
    place: int
    """In the stack's leading axis."""
    layout: Layout


@runtime_checkable
class Project(Protocol):
    """Makes q, k and v of every token, of all heads or of those named, at the price of their projections.

    Named heads come alone, in the order of their names; or in their places among all, where others hold anything.
    """

    def __call__(self, heads: Int[Array, " n"] | None = None, /) -> QKV: ...


@carrier
class LayerPlan:
    """What a layer knows of itself at a step; with a leading axis, a stack of layers."""

    place: Int[Array, "*layers"]
    """In its stack: the index of its entry in the stack's memory."""
    step: Int[Array, "*layers"]
    """Number of the sampling step."""
    half_window: Int[Array, "*layers N"] | None = None
    """As in `arrow_attention`; None: all heads are dense."""
    head_order: Int[Array, "*layers N"] | None = None
    order: Int[Array, "*layers N"] | None = None
    """In which each band runs over the tokens (`nn.orders`); None: all in the native one."""
    lies: Int[Array, "*layers N"] | None = None
    """In which each output is remembered after the step, where `order` is given."""
    text_length: Int[Array, " B"] | None = None
    """As in `arrow_attention`; None: text has no padding. `BlockAttention` says it to layers that see text."""

    @classmethod
    def of_stack(cls, count: int, step: Int[Array, ""] | int, **heads: Int[Array, "L N"] | None) -> "LayerPlan":
        """Args: `heads`: fields of every layer's heads."""
        return cls(jnp.arange(count, dtype=jnp.int32), jnp.full(count, step, jnp.int32), **heads)


@runtime_checkable
class Attend(Protocol):
    """Attention of one layer. An own class is a frozen dataclass: `jax.jit` takes it as a static argument."""

    def memory(self, stack: jax.ShapeDtypeStruct) -> Any:
        """What it remembers of a stack of layers before the first step; None: nothing.

        Args:
            stack: shape [L, B, T, N, H] and dtype of the outputs of L layers.
        """
        ...

    def __call__(self, project: Project, layout: Layout, memory: Any, plan: Any) -> tuple[Heads, Any]:
        """The output [B, T, N, H], and what is remembered from now on.

        Args:
            project: `project()` gives q, k and v [B, T, N, H].
            layout: which tokens are text.
            memory: of all layers of the stack, in the form that `Attend.memory` gave it.
            plan: a `LayerPlan`: this layer's place in the stack, and the step.
        """
        ...


class BlockAttention:
    """The attention layers of one block: hands each its memory and its plan, and keeps what it remembers.

    Args:
        prefix: of the block's stacks ("segments.0."); a layer's name in the block follows it.
        text_length: of each sample; None: text has no padding.
    """

    def __init__(
        self,
        attend: Attend,
        prefix: str,
        memory: dict[str, Any],
        plans: dict[str, Any],
        text_length: Int[Array, " B"] | None = None,
    ):
        self.attend, self.prefix, self.memory, self.plans = attend, prefix, dict(memory), plans
        self.text_length = text_length

    def __call__(self, name: str, project: Project, layout: Layout) -> Heads:
        stack = self.prefix + name
        out, remembered = self.attend(project, layout, self.memory.get(stack), self._plan(stack, layout))
        if stack in self.memory:
            self.memory[stack] = remembered
        return out

    def _plan(self, stack: str, layout: Layout) -> Any:
        plan = self.plans[stack]
        if self.text_length is None or not layout.num_text:
            return plan
        if not isinstance(plan, LayerPlan):
            raise NotImplementedError(f"{type(self.attend).__name__} sees all text, and this text is padded.")
        return replace(plan, text_length=self.text_length)


@dataclass(frozen=True)
class Dense:
    """Full attention; remembers nothing."""

    implementation: str | None = None

    def memory(self, stack: jax.ShapeDtypeStruct) -> None:
        return None

    def __call__(self, project: Project, layout: Layout, memory: None, plan: LayerPlan) -> tuple[Heads, None]:
        options = {"layout": layout, "text_length": plan.text_length, "implementation": self.implementation}
        return arrow_attention(*project(), **options), None


@dataclass(frozen=True)
class ProjectionBranches:
    """Ways to make no more of a layer's queries, keys and values than its plan asks for.

    On an H100 a step of FLUX.1-dev at 2048 px that spares a sixth of its heads is 1 to 3 % faster. One of SD3.5-medium
    is as fast as without branches. At 1024 px branches first copy their weights out of the stack of layers. There they
    pay off above 0.15 of the layers, if whole layers are idle. If all layers spare some heads, they pay off above 0.3
    of the heads for FLUX.1-dev and SD3.5-large, and above 0.55 for SD3.5-medium.
    """

    parts: int
    """A layer makes none, one, ... or all of this many parts of its heads. Each is a branch to compile."""
    threshold: float
    """A step takes the branches if they spare more than this share of all heads; at 1024 px a compromise."""

    @classmethod
    def best(cls, num_rows: int, reads_in_place: bool) -> "ProjectionBranches":
        """reads_in_place: products read weights in the stack of layers, so that no branch copies its own."""
        return cls(6, 1 / 8) if reads_in_place or num_rows >= MANY_ROWS else cls(2, 1 / 4)

    def counts(self, num_heads: int) -> tuple[int, ...]:
        """How many heads each branch makes."""
        return tuple(sorted({-(-num_heads * part // self.parts) for part in range(self.parts + 1)}))

    def branch(self, half_window: Int[Array, "*layers N"]) -> Int[Array, "*layers"]:
        """The branch that makes no more heads than it must: all that are not cached."""
        counts = jnp.array(self.counts(half_window.shape[-1]))
        needed = jnp.sum(half_window != CACHED, axis=-1)
        return jnp.searchsorted(counts, needed, method="compare_all").astype(jnp.int32)  # by default it is a loop

    def worthwhile(self, half_window: Int[Array, "layers N"]) -> Bool[Array, ""]:
        """Whether a step takes them."""
        num_heads = half_window.shape[-1]
        made = jnp.array(self.counts(num_heads))[self.branch(half_window)]
        return 1 - made.mean() / num_heads > self.threshold

    def qkv(self, project: Project, half_window: Int[Array, " N"]) -> QKV:
        """Queries, keys and values, with anything at the places of cached heads."""
        cached = half_window == CACHED

        def first(count: int) -> QKV:
            if count == len(cached):
                return project()
            if not count:
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(project))
            order = jnp.argsort(cached)  # stable: those that are not cached come first
            some = project(order[:count])
            if some[0].shape[2] == len(cached):
                return some
            # Gather heads in a separate last pass. Fused into the norms and RoPE, the gather made FLUX.1-dev's steps at
            # 2048 px 2 to 3 % slower.
            place = jnp.minimum(jnp.argsort(order), count - 1)
            q, k, v = (take_heads(x, place) for x in some)
            return q, k, v

        return jax.lax.switch(self.branch(half_window), [partial(first, n) for n in self.counts(len(cached))])


@dataclass(frozen=True)
class Planned:
    """Each head in full, inside an arrow or reused (DiTFastAttnV2, section 3). Remembers every layer's output.

    skip_projections: leave out cached heads' queries, keys and values (`ProjectionBranches`).
    reads_in_place: as in `ProjectionBranches.best`.
    frames: of the visual tokens, whose order over time a plan may name. Queries, keys and values of such heads are
        transposed; their outputs are remembered as they come, and transposed where they are read.
    """

    implementation: str | None = None
    skip_projections: bool = True
    reads_in_place: bool = False
    frames: int = 1

    def memory(self, stack: jax.ShapeDtypeStruct) -> Float[Array, "L B T N H"]:
        return jnp.zeros(stack.shape, stack.dtype, device=stack.sharding)

    def __call__(
        self, project: Project, layout: Layout, memory: Float[Array, "L B T N H"], plan: LayerPlan
    ) -> tuple[Heads, Float[Array, "L B T N H"]]:
        if plan.half_window is None or not self.skip_projections:
            qkv = project()
        else:
            _, batch, length, *_ = memory.shape
            branches = ProjectionBranches.best(batch * length, self.reads_in_place)
            qkv = branches.qkv(project, plan.half_window)
        if plan.order is not None:
            q, k, v = (to_orders(x, plan.order, layout, self.frames) for x in qkv)
            qkv = q, k, v
        memory = arrow_attention(
            *qkv,
            plan.half_window,
            layout=layout,
            cache=memory,
            layer=plan.place,
            head_order=plan.head_order,
            text_length=plan.text_length,
            implementation=self.implementation,
        )
        out = memory[plan.place]
        return out if plan.lies is None else to_native(out, plan.lies, layout, self.frames), memory


def double_and_single(layout: Layout, num_double: int, num_single: int) -> tuple[AttentionCall, ...]:
    """The layers of FLUX's arrangement in order of execution: double-stream blocks, then single-stream ones."""
    stacks = (
        ("double", "transformer_blocks.attn", num_double),
        ("single", "single_transformer_blocks.attn", num_single),
    )
    return tuple(
        AttentionCall(f"{name}.{place}", place + (name == "single") * num_double, stack, place, layout)
        for name, stack, count in stacks
        for place in range(count)
    )


def stacks(layers: tuple[AttentionCall, ...]) -> dict[str, np.ndarray]:
    """By stack, the numbers of its layers in order of execution."""
    names = dict.fromkeys(layer.stack for layer in layers)
    return {name: np.array([i for i, layer in enumerate(layers) if layer.stack == name]) for name in names}


def by_stack(layers: tuple[AttentionCall, ...], x: Any, axis: int = 0) -> dict[str, Any]:
    """An array of all layers, cut along `axis` into one for each stack."""
    return {name: np.take(np.asarray(x), numbers, axis) for name, numbers in stacks(layers).items()}


def in_order(layers: tuple[AttentionCall, ...], x: dict[str, Any]) -> np.ndarray:
    """The inverse of `by_stack`, along the first axis."""
    numbers = stacks(layers)
    return np.concatenate([np.asarray(x[name]) for name in numbers])[np.argsort(np.concatenate([*numbers.values()]))]


def dense_plans(layers: tuple[AttentionCall, ...], step: Int[Array, ""] | int = 0) -> dict[str, LayerPlan]:
    """The plan of every stack: its layers' places and the step; all heads dense."""
    return {name: LayerPlan.of_stack(len(numbers), step) for name, numbers in stacks(layers).items()}
