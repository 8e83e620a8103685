"""The denoising loop: one jitted program for every prompt, seed, guidance value, plan and step count of a shape."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from dfa2_jax.nn.attention import Attend, Branches, Dense, Memory, Planned, PlanRow, Rows, gpu_kind
from dfa2_jax.nn.layers import XLA_OPTIONS

Array = jax.Array | np.ndarray

STEP_BLOCK = 64
"""Per-step inputs are padded to a multiple of this many steps, so that up to 64 steps share one program."""


class SkipGuidance(NamedTuple):
    """Skip-layer guidance (SD3.5-medium): push away from the model without some of its blocks."""

    layers: Bool[Array, " layers"]
    scale: Float[Array, ""]
    active: Bool[Array, " padded_steps"]


class Inputs(NamedTuple):
    """All that a step needs beside the latents. Every field is data: other values compile nothing.

    `guidance_scale` None: one forward per image. Otherwise the batch of `text` and `pooled` is doubled,
    [unconditional, conditional].
    """

    text: Float[Array, "B T E"]
    pooled: Float[Array, "B P"]
    positions: Any
    sigmas: Float[Array, " padded_steps_plus_1"]
    timesteps: Float[Array, "padded_steps 256"]
    guidance: Float[Array, "1 256"] | None
    guidance_scale: Float[Array, ""] | None
    skip: SkipGuidance | None


def pad_steps(x: np.ndarray, extra: int = 0) -> np.ndarray:
    """Pad the first axis, of `steps + extra` entries, to the next multiple of `STEP_BLOCK` steps (+ extra)."""
    steps = len(x) - extra
    padding = -steps % STEP_BLOCK
    return np.concatenate([x, np.zeros((padding, *x.shape[1:]), x.dtype)])


def euler_step(
    x: Float[Array, "*dims"], velocity: Float[Array, "*dims"], sigma: Float[Array, ""], sigma_next: Float[Array, ""]
) -> Float[Array, "*dims"]:
    """Algorithm 1 of flow matching with an Euler solver (arXiv 2210.02747): dx/dsigma is the velocity."""
    return x + (sigma_next - sigma) * velocity


class PlanRows(NamedTuple):
    """A plan as the loop reads it (`dfa2_jax.plan`): padded like every per-step input."""

    half_window: Int[Array, "padded_steps layers heads"]
    head_order: Int[Array, "padded_steps layers heads"]


@partial(jax.jit, static_argnames=("graph", "unroll", "implementation", "rounding"), compiler_options=XLA_OPTIONS)
def denoise(
    graph: nnx.GraphDef,
    params: Any,
    latents: Float[Array, "B V C"],
    inputs: Inputs,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    *,
    unroll: int | bool = 1,
    implementation: str | None = None,
    rounding: str | None = None,
) -> Float[Array, "B V C"]:
    """Steps `start` to `stop` of the sampling loop on patchified latents, in float32.

    The whole loop and a single step are calls of this same program, so that progress and callbacks change no number.
    Inside another jit, scan or map, where JAX allows no compiler options, call `denoise.__wrapped__` (so too
    `denoise_planned`), and give the outermost jit `models.layers.XLA_OPTIONS`.

    Args:
        unroll: blocks compiled per iteration of a scan over layers.
        implementation: of attention (`pallas_kernels.arrow_attention`).
        rounding: a dtype's name: round to it where torch does between operations, to reproduce diffusers' images in
            that dtype (XLA keeps such values in float32). None keeps float32.
    """
    model = partial(nnx.merge(graph, params).velocity, unroll=unroll)
    step = partial(denoise_step, model, Dense(implementation), inputs, rounding_to(rounding))
    return jax.lax.fori_loop(start, stop, lambda i, latents: step(i, latents, None, None)[0], latents)


@partial(
    jax.jit,
    static_argnames=("graph", "skip", "unroll", "implementation", "rounding"),
    donate_argnames=("latents", "caches"),
    compiler_options=XLA_OPTIONS,
)
def denoise_planned(
    graph: nnx.GraphDef,
    params: Any,
    latents: Float[Array, "B V C"],
    caches: tuple[Memory, ...],
    inputs: Inputs,
    plan: PlanRows,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    *,
    skip: bool = True,
    unroll: int | bool = 1,
    implementation: str | None = None,
    rounding: str | None = None,
) -> tuple[Float[Array, "B V C"], tuple[Memory, ...]]:
    """As `denoise`, with each head's attention by a plan (DiTFastAttnV2, arXiv 2503.22796, section 3).

    Args:
        caches: every attention call's last output, at first from `caches.empty_caches`; given away, and returned.
            Step 0 is dense and fills them.
        plan: data: another plan of the shape compiles nothing.
        skip: cached heads' projections, in steps where that pays. False: with the sums of steps that make all.
    """
    model = nnx.merge(graph, params)
    rows = partial(by_segment, model.attention_rows)
    branches = Branches.of(max(cache.shape[1] * cache.shape[2] for cache in jax.tree.leaves(caches)))

    def step(branch: bool, i: Array | int, row: PlanRows | None, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        velocity, attend = partial(model.velocity, unroll=unroll), Planned(implementation, branch)
        return denoise_step(velocity, attend, inputs, rounding_to(rounding), i, *carry, rows(row))

    def first(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return step(False, 0, None, carry)

    def later(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        row = PlanRows(plan.half_window[i], plan.head_order[i])
        if not skip or gpu_kind() is None:  # a CPU's branches cost next to nothing
            return step(skip, i, row, carry)
        pays = branches.pay(jnp.asarray(row.half_window)).astype(jnp.int32)
        for value, times in ((True, pays), (False, 1 - pays)):  # as loops: a branch would copy the caches
            carry = jax.lax.fori_loop(0, times, lambda _, carry, value=value: step(value, i, row, carry), carry)
        return carry

    is_first = (jnp.asarray(start) == 0) & (stop > 0)
    carry = jax.lax.cond(is_first, first, lambda carry: carry, (latents, caches))
    return jax.lax.fori_loop(jnp.maximum(start, 1), stop, later, carry)


def by_segment(attention_rows: Rows, row: PlanRows | None) -> tuple[Memory, ...]:
    """One step's plan [layers, heads] as each segment's scan over its blocks wants it; None: all of it dense."""

    def of(numbers: tuple[int, ...]) -> PlanRow | None:
        if not numbers:
            return None
        place = jnp.arange(len(numbers))
        if row is None:
            return PlanRow(place, None, None)
        half_window, head_order = (jnp.asarray(data)[np.array(numbers)] for data in row)
        return PlanRow(place, half_window, head_order)

    return tuple((of(first), of(second)) for first, second in attention_rows)


def in_order(attention_rows: Rows, found: tuple[Memory, ...]) -> Any:
    """Arrays that every segment has of its layers, as arrays of all layers in order of execution."""
    parts = [part for pair in found for part in pair if part is not None]
    numbers = np.concatenate([numbers for pair in attention_rows for numbers in pair if numbers])
    return jax.tree.map(lambda *x: jnp.concatenate(x)[np.argsort(numbers)], *parts)


def denoise_step(
    model: Callable[..., tuple[Array, Any]],
    attend: Attend,
    inputs: Inputs,
    rounded: Callable[[Array], Array],
    i: Int[Array, ""] | int,
    latents: Float[Array, "B V C"],
    memory: Any,
    rows: Any,
) -> tuple[Float[Array, "B V C"], Any]:
    """One Euler step, and what attention remembers of it."""
    velocity, memory = guided_velocity(model, attend, inputs, rounded, i, latents, memory, rows)
    return rounded(euler_step(latents, velocity, inputs.sigmas[i], inputs.sigmas[i + 1])), memory


def guided_velocity(
    model: Callable[..., tuple[Array, Any]],
    attend: Attend,
    inputs: Inputs,
    rounded: Callable[[Array], Array],
    i: Int[Array, ""] | int,
    latents: Float[Array, "B V C"],
    memory: Any,
    rows: Any,
) -> tuple[Array, Any]:
    """Velocity under classifier-free (arXiv 2207.12598) and skip-layer guidance, combined as in diffusers.

    Both sides of classifier-free guidance are one batch, with one plan and one memory. The forward without some layers
    is dense and leaves the memory alone.
    """
    text, pooled, timestep = inputs.text, inputs.pooled, inputs.timesteps[i][None]

    def velocity(latents: Array, text: Array, pooled: Array, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        out, memory = model(latents, text, pooled, inputs.positions, timestep, inputs.guidance, *args, **kwargs)
        return out.astype(jnp.float32), memory

    if inputs.guidance_scale is None:
        return velocity(latents, text, pooled, attend, memory, rows)
    both, memory = velocity(jnp.concatenate([latents, latents]), text, pooled, attend, memory, rows)
    uncond, cond = jnp.split(both, 2)
    guided = rounded(uncond + rounded(inputs.guidance_scale * rounded(cond - uncond)))
    if inputs.skip is None:
        return guided, memory
    skip, batch = inputs.skip, latents.shape[0]

    def push(guided: Array) -> Array:
        dense = Dense(attend.implementation)
        without, _ = velocity(latents, text[batch:], pooled[batch:], dense, skip=skip.layers)
        return rounded(guided + rounded(rounded(cond - without) * skip.scale))

    return jax.lax.cond(skip.active[i], push, lambda guided: guided, guided), memory


def rounding_to(dtype: str | None) -> Callable[[Array], Array]:
    """Rounds to a dtype and keeps float32; None: nothing."""
    if dtype is None:
        return lambda x: x
    kind = jnp.finfo(dtype)
    return lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
