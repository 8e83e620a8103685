"""Stacks of equal blocks, run by a scan: one block is compiled, whatever their number."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Int

from dfa2_jax.nn.attention import Attend, BlockAttention
from dfa2_jax.weights.quantized import Stacked


def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` equal blocks as one module whose parameters have a leading layer axis, for `run_blocks`."""
    return nnx.vmap(make)(rngs.split(count))


def run_blocks(
    blocks: nnx.Module,
    step: Callable[[Any, Any, Any], Any],
    carry: Any,
    per_layer: Any = None,
    *,
    unroll: int | bool = 1,
) -> Any:
    """Scan `carry = step(block, carry, per_layer[i])` over the layer axis of stacked `blocks`.

    `unroll` is `jax.lax.scan`'s: 1 compiles one block, True all of them, which brings next to nothing. Parameters that
    are `Stacked` stay whole in every block.
    """
    graph, whole, params = nnx.split(blocks, Stacked, ...)

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        layer_params, layer_input = xs
        return step(nnx.merge(graph, whole, layer_params), carry, layer_input), None

    return jax.lax.scan(body, carry, (params, per_layer), unroll=unroll)[0]


def run_segment(
    name: str,
    blocks: nnx.Module,
    step: Callable[[Any, Any, BlockAttention], Any],
    streams: Any,
    attend: Attend,
    memory: dict[str, Any],
    plans: dict[str, Any],
    *,
    text_length: Int[Array, " B"] | None = None,
    skipped: Bool[Array, " L"] | None = None,
    unroll: int | bool = 1,
) -> tuple[Any, dict[str, Any]]:
    """`streams` after a stack of blocks, and the memory of all stacks after their attention layers.

    Args:
        name: of the stack of blocks; those of its attention layers start with it (`nn.attention.AttentionCall.stack`).
        step: `step(block, streams, attention)` gives the next streams.
        memory, plans: by stack; the entries of this segment's layers are used, a layer at a time.
        text_length: of each sample; None: text has no padding.
        skipped: blocks to leave out; traced, so that another choice compiles nothing.
    """
    ours = name + "."
    kept = {stack: value for stack, value in memory.items() if stack.startswith(ours)}
    xs = {stack: value for stack, value in plans.items() if stack.startswith(ours)}

    def body(block: Any, carry: Any, per_layer: Any) -> Any:
        skip, plan = per_layer

        def run(carry: Any) -> Any:
            streams, memory = carry
            attention = BlockAttention(attend, ours, memory, plan, text_length)
            streams = step(block, streams, attention)
            return streams, attention.memory

        return run(carry) if skip is None else jax.lax.cond(skip, lambda carry: carry, run, carry)

    streams, kept = run_blocks(blocks, body, (streams, kept), (skipped, xs), unroll=unroll)
    return streams, memory | kept
