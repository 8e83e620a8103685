"""The denoising loop: one jitted program for every prompt, seed, guidance value and number of steps of a shape."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

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


@partial(jax.jit, static_argnames=("graph", "unroll", "implementation", "rounding"))
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

    Args:
        unroll: blocks compiled per iteration of a scan over layers.
        implementation: of attention (`pallas_kernels.arrow_attention`).
        rounding: a dtype's name: round to it where torch does between operations, to reproduce diffusers' images in
            that dtype (XLA keeps such values in float32). None keeps float32.
    """
    model = nnx.merge(graph, params)
    model = partial(model, unroll=unroll, implementation=implementation)

    def rounded(x: Array) -> Array:
        if rounding is None:
            return x
        kind = jnp.finfo(rounding)
        return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)

    def step(i: Array, latents: Array) -> Array:
        velocity = guided_velocity(model, latents, i, inputs, rounded)
        return rounded(euler_step(latents, velocity, inputs.sigmas[i], inputs.sigmas[i + 1]))

    return jax.lax.fori_loop(start, stop, step, latents)


def guided_velocity(
    model: Any, latents: Float[Array, "B V C"], i: Int[Array, ""], inputs: Inputs, rounded: Any
) -> Array:
    """Velocity under classifier-free (arXiv 2207.12598) and skip-layer guidance, combined as in diffusers."""
    text, pooled, timestep = inputs.text, inputs.pooled, inputs.timesteps[i][None]

    def velocity(latents: Array, text: Array, pooled: Array, **kwargs: Any) -> Array:
        out = model(latents, text, pooled, inputs.positions, timestep, inputs.guidance, **kwargs)
        return out.astype(jnp.float32)

    if inputs.guidance_scale is None:
        return velocity(latents, text, pooled)
    uncond, cond = jnp.split(velocity(jnp.concatenate([latents, latents]), text, pooled), 2)
    guided = rounded(uncond + rounded(inputs.guidance_scale * rounded(cond - uncond)))
    if inputs.skip is None:
        return guided
    skip, batch = inputs.skip, latents.shape[0]

    def push(guided: Array) -> Array:
        without = velocity(latents, text[batch:], pooled[batch:], skip=skip.layers)
        return rounded(guided + rounded(rounded(cond - without) * skip.scale))

    return jax.lax.cond(skip.active[i], push, lambda guided: guided, guided)
