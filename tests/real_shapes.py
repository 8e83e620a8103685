"""The published models at their true shapes, as abstract arrays: no weights exist."""

from dataclasses import MISSING, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dfa2_jax.families.cogvideox.transformer import CogVideoXConditions
from dfa2_jax.families.flux.transformer import FluxConditions
from dfa2_jax.families.hunyuanvideo.transformer import HunyuanVideoConditions
from dfa2_jax.families.registry import networks
from dfa2_jax.families.sd3.transformer import PositionTable, SD3Conditions
from dfa2_jax.nn.quantize import quantize
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.sampling.guidance import ClassifierFree, NoGuidance
from dfa2_jax.sampling.inputs import STEP_BLOCK, Inputs
from dfa2_jax.sampling.loop import HeadPlans, State, denoise_planned
from dfa2_jax.sampling.memory import stack_shapes
from dfa2_jax.sampling.solvers.ddim import ScaledMultistep
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep
from dfa2_jax.sampling.tokens import Grid
from pallas_kernels.inspect import aot


class Published(NamedTuple):
    """A transformer's config.json, and what its pipeline usually hands it."""

    class_name: str
    config: dict[str, Any]
    num_text: int
    guided: bool
    """Classifier-free guidance: the text's batch is doubled."""


def sd3(layers: int, heads: int, table: int, qk_norm: str | None, dual: tuple[int, ...] = ()) -> Published:
    config = {
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": table,
        "dual_attention_layers": dual,
        "qk_norm": qk_norm,
    }
    return Published("SD3Transformer2DModel", config, num_text=77 + 256, guided=True)


def flux(guidance_embeds: bool, num_text: int) -> Published:
    return Published("FluxTransformer2DModel", {"guidance_embeds": guidance_embeds}, num_text, guided=False)


PUBLISHED = {
    "SD3-medium": sd3(24, 24, 192, None),
    "SD3.5-medium": sd3(24, 24, 384, "rms_norm", dual=tuple(range(13))),
    "SD3.5-large": sd3(38, 38, 192, "rms_norm"),
    "FLUX.1-dev": flux(guidance_embeds=True, num_text=512),
    "FLUX.1-schnell": flux(guidance_embeds=False, num_text=256),
}
"""Sizes from diffusers' conversion scripts, checked against the size of the published files."""


def cogvideox(layers: int, heads: int, sample: tuple[int, int, int], **config: Any) -> Published:
    names = "sample_frames", "sample_height", "sample_width"
    sizes = {"num_layers": layers, "num_attention_heads": heads} | dict(zip(names, sample, strict=True))
    return Published("CogVideoXTransformer3DModel", sizes | config, num_text=226, guided=True)


HUNYUAN = Published("HunyuanVideoTransformer3DModel", {}, num_text=256, guided=False)
ROTARY = {"use_rotary_positional_embeddings": True}
VIDEOS = {
    "CogVideoX-2B": cogvideox(30, 30, (49, 60, 90)),
    "CogVideoX-5B": cogvideox(42, 48, (49, 60, 90), **ROTARY),
    "CogVideoX1.5-5B": cogvideox(42, 48, (81, 96, 170), **ROTARY, patch_size_t=2, patch_bias=False),
    "HunyuanVideo 544p": HUNYUAN,
    "HunyuanVideo 720p": HUNYUAN,
}
"""Sizes from the config.json of the published folders."""

VIDEO_GRIDS = {
    "CogVideoX-2B": Grid(13, 30, 45),
    "CogVideoX-5B": Grid(13, 30, 45),
    "CogVideoX1.5-5B": Grid(11, 48, 85),
    "HunyuanVideo 544p": Grid(33, 34, 60),
    "HunyuanVideo 720p": Grid(33, 45, 80),
}
"""Tokens of 49 x 480 x 720, 81 x 768 x 1360, 129 x 544 x 960 and 129 x 720 x 1280."""


def denoise_arguments(name: str, pixels: int | Grid, precision: str | None = None) -> tuple[Any, ...]:
    """(graph, params, state, inputs, start, stop) of `sampling.loop.denoise`, in bfloat16.

    Args:
        pixels: along a side of one square image, or the grid of one video.
    """
    published, bf16, f32 = (PUBLISHED | VIDEOS)[name], jnp.bfloat16, jnp.float32
    kind = networks()[published.class_name]
    config = kind.config(published.config)
    module = nnx.eval_shape(lambda: kind.build(config, dtype=bf16, rngs=nnx.Rngs(0)))
    nnx.pop(module, PositionTable)  # stays on the host
    if precision is not None:
        quantize(module, precision)
    graph, params = nnx.split(module)

    visual = pixels.num_visual if isinstance(pixels, Grid) else (pixels // 16) ** 2
    text, shape, features = published.num_text, jax.ShapeDtypeStruct, 256
    solver = abstract(FlowMultistep, shape((STEP_BLOCK, 2), f32))
    batch = 2 if published.guided else 1
    states = shape((batch, text, config.joint_attention_dim), bf16)
    if published.class_name.startswith("CogVideoX"):
        features, solver = config.width, abstract(ScaledMultistep, shape((STEP_BLOCK, 6), f32))
        table, rope = shape((visual, config.width), f32), shape((text + visual, config.attention_head_dim // 2), f32)
        is_rotary = config.use_rotary_positional_embeddings
        positions = (None, rope, rope) if is_rotary else (table, None, None)
        conditions = abstract(CogVideoXConditions, states, *positions)
    elif published.class_name.startswith("HunyuanVideo"):
        rope = shape((visual + text, config.attention_head_dim // 2), f32)
        pooled, length = shape((batch, config.pooled_projection_dim), bf16), shape((batch,), jnp.int32)
        conditions = abstract(HunyuanVideoConditions, states, pooled, rope, rope, shape((1, 256), f32), length, None)
    elif published.class_name.startswith("Flux"):
        rope = shape((text + visual, config.attention_head_dim // 2), f32)
        guidance = shape((1, 256), f32) if published.config.get("guidance_embeds") else None
        pooled = shape((batch, config.pooled_projection_dim), bf16)
        conditions = abstract(FluxConditions, states, pooled, rope, rope, guidance)
    else:
        pooled = shape((batch, config.pooled_projection_dim), bf16)
        conditions = abstract(SD3Conditions, states, pooled, shape((1, visual, config.width), bf16))
    per_step = shape((STEP_BLOCK,), f32)
    guided = abstract(ClassifierFree, per_step) if published.guided else NoGuidance()
    inputs = abstract(Inputs, conditions, shape((STEP_BLOCK, features), f32), guided, solver)
    latents, step = shape((1, visual, config.token_channels), f32), shape((), jnp.int32)
    return graph, params, abstract(State, latents, latents, None), inputs, step, step


def planned_arguments(
    name: str,
    pixels: int | Grid,
    precision: str | None = None,
    mesh: DeviceMesh | None = None,
    *,
    over_time: bool = False,
) -> tuple[Any, ...]:
    """(graph, params, state, inputs, plans, start, stop) of `sampling.loop.denoise_planned`.

    Args:
        over_time: the plan says of each head in which order its band runs.
    """
    graph, params, state, inputs, start, stop = denoise_arguments(name, pixels, precision)
    published = (PUBLISHED | VIDEOS)[name]
    config = networks()[published.class_name].config(published.config)
    batch, num_text = inputs.conditions.text.shape[:2]
    heads = config.num_attention_heads, config.attention_head_dim
    memory = stack_shapes(config.calls(num_text, state.latents.shape[1]), batch, heads, jnp.bfloat16, mesh)
    dealt = heads[0] + (0 if mesh is None else -heads[0] % mesh.tokens)
    half_window = {
        name: jax.ShapeDtypeStruct((STEP_BLOCK, stack.shape[0], dealt), jnp.int32) for name, stack in memory.items()
    }
    order = half_window if over_time else None
    plans = abstract(HeadPlans, half_window, half_window, start, order, order)
    return graph, params, abstract(State, state.latents, state.latents, memory), inputs, plans, start, stop


def compile_planned(name: str, pixels: int, devices: int, gpu: str = "h200") -> tuple[DeviceMesh, Any, aot.Compiled]:
    """The mesh of so many GPUs, the memory's shapes on it, and `denoise_planned` compiled for it."""
    target = aot.target(gpu, devices)
    mesh = DeviceMesh.of([*target.mesh.devices.flat], 2 if PUBLISHED[name].guided else 1)
    target = aot.Target(gpu, mesh.devices)
    graph, *rest = planned_arguments(name, pixels, mesh=mesh)
    compiled = aot.compile_for(target, denoise_planned, graph, *target.abstract(tuple(rest)), mesh=mesh)
    return mesh, rest[1].memory, compiled


def abstract(cls: Any, *leaves: Any) -> Any:
    """A carrier of shapes: made as JAX makes it, without the check of arrays. Fields left out have their defaults."""
    made, absent = object.__new__(cls), [one.default for one in fields(cls)[len(leaves) :]]
    assert MISSING not in absent
    for one, leaf in zip(fields(cls), (*leaves, *absent), strict=True):
        object.__setattr__(made, one.name, leaf)
    return made
