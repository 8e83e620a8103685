"""Whole sampling loops of random weights: a model, its inputs and plans for it, at one size."""

import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dfa2_jax import Method, Plan
from dfa2_jax.calibration.attention_share import StepShares, step_shares
from dfa2_jax.families.cogvideox import positions as videos
from dfa2_jax.families.cogvideox.transformer import CogVideoXConditions
from dfa2_jax.families.flux.positions import rope_table
from dfa2_jax.families.flux.transformer import FluxConditions
from dfa2_jax.families.hunyuanvideo import positions as hunyuanvideo
from dfa2_jax.families.hunyuanvideo.transformer import HunyuanVideoConditions
from dfa2_jax.families.registry import networks
from dfa2_jax.families.sd3.positions import crop_positions
from dfa2_jax.families.sd3.transformer import PositionTable, SD3Conditions
from dfa2_jax.nn.attention import AttentionCall, Planned, by_stack
from dfa2_jax.parallel.dealing import deal_plan
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.plan.method import TIME
from dfa2_jax.plan.orders import lies, orders
from dfa2_jax.plan.plan import FULL_METHOD
from dfa2_jax.plan.setting import AttentionLayer, Setting
from dfa2_jax.sampling.guidance import ClassifierFree, NoGuidance
from dfa2_jax.sampling.inputs import Inputs, pad_steps
from dfa2_jax.sampling.loop import HeadPlans, State, denoise, denoise_planned
from dfa2_jax.sampling.memory import empty_memory, stack_shapes
from dfa2_jax.sampling.sinusoid import sinusoid
from dfa2_jax.sampling.solvers.ddim import ScaledMultistep
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep
from dfa2_jax.sampling.tokens import Grid
from dfa2_jax.weights.quantized import Place, Stacked
from pallas_kernels.mask import density


@dataclass(frozen=True)
class NoAttention:
    """Projections alone, all of them used: what a step costs beside attention."""

    def memory(self, stack: Any) -> None:
        return None

    def __call__(self, project: Any, layout: Any, memory: None, plan: Any) -> tuple[jax.Array, None]:
        return sum(project()), None


class Loop:
    """A transformer of random weights on the default device, and all that its sampling loop is called with.

    Args:
        class_name, config: of diffusers.
        grid: of visual tokens.
        guided: classifier-free guidance, a doubled batch.
        steps: of the schedule.
        precision: of the blocks, where they are quantised.
    """

    def __init__(
        self,
        class_name: str,
        config: dict[str, Any],
        *,
        grid: Grid,
        num_text: int,
        guided: bool,
        steps: int,
        dtype: Any,
        precision: str | None = None,
    ):
        kind = networks()[class_name]
        self.config, self.grid, self.num_text, self.steps = kind.config(config), grid, num_text, steps
        self.num_visual = grid.num_visual
        module = nnx.eval_shape(lambda: kind.build(self.config, dtype=dtype, rngs=nnx.Rngs(0)))
        nnx.pop(module, PositionTable)
        if precision is not None:
            kind.quantize(module, precision)
        self.graph, shapes = nnx.split(module)
        self.mesh: DeviceMesh | None = None
        self.params, self.dtype = random_like(shapes), jnp.dtype(dtype)
        self.batch = 2 if guided else 1
        draw = np.random.default_rng(0).standard_normal
        self.latents = draw((1, self.num_visual, self.config.token_channels)).astype(np.float32)
        sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
        is_video = class_name.startswith("CogVideoX")
        inputs = Inputs(
            conditions=self.conditions(draw, class_name),
            timesteps=pad_steps(sinusoid(1000 * sigmas[:-1], self.config.width if is_video else 256)),
            guidance=ClassifierFree.constant(4.0, steps) if guided else NoGuidance(),
            solver=ScaledMultistep.ddim(sigmas[:-1], sigmas[1:]) if is_video else FlowMultistep.of(sigmas),
        )
        self.inputs = jax.device_put(inputs)
        self.calls = self.config.calls(num_text, self.num_visual)
        self.layers = {layer.name: layer.layout for layer in self.calls}

    def conditions(self, draw: Any, class_name: str) -> Any:
        config, num_text, rows, columns = self.config, self.num_text, self.grid.rows, self.grid.columns
        text = draw((self.batch, num_text, config.joint_attention_dim)).astype(self.dtype)
        if class_name.startswith("CogVideoX"):
            cos, sin = videos.rope_table(config, num_text, self.grid)
            return CogVideoXConditions(text, cos=cos, sin=sin)
        pooled = draw((self.batch, config.pooled_projection_dim)).astype(self.dtype)
        if class_name.startswith("HunyuanVideo"):
            tables = *hunyuanvideo.rope_table(config, self.grid, num_text), sinusoid(np.float32([6000]))
            return HunyuanVideoConditions(text, pooled, *tables, np.full(self.batch, num_text * 3 // 4, np.int32))
        if class_name.startswith("Flux"):
            guidance = sinusoid(np.float32([3500])) if config.guidance_embeds else None
            return FluxConditions(text, pooled, *rope_table(config.axes_dims_rope, num_text, rows, columns), guidance)
        table = np.zeros((config.pos_embed_max_size**2, config.width), np.float32)
        return SD3Conditions(text, pooled, crop_positions(table, rows, columns))

    def on(self, devices: int) -> "Loop":
        """The same on the first of JAX's devices, with the same weights."""
        loop = copy(self)
        loop.mesh = DeviceMesh.of(jax.devices()[:devices], self.batch)
        loop.params, loop.inputs = loop.mesh.put((self.params, self.inputs))
        return loop

    def caches(self) -> dict[str, jax.Array]:
        """What a plan's attention remembers before the first step."""
        heads = self.config.num_attention_heads, self.config.attention_head_dim
        return empty_memory(Planned(), stack_shapes(self.calls, self.batch, heads, self.dtype, self.mesh), images=1)

    def start(self, caches: Any = None) -> State:
        """Before the first step; with what a plan's attention remembers."""
        return State(self.latents, np.zeros_like(self.latents), caches)

    def dense(self, start: int, stop: int, **options: Any) -> jax.Array:
        options |= {"mesh": self.mesh}
        return denoise(self.graph, self.params, self.start(), self.inputs, start, stop, **options).latents

    def shares(self) -> StepShares:
        """What heads could save of a dense step, by its multiplications."""
        return step_shares(self.graph, self.params, self.start(), self.inputs)

    def rest(self, start: int, stop: int) -> jax.Array:
        """Without attention."""
        return self.dense(start, stop, attend=NoAttention())

    def planned(
        self, caches: Any, plan: Plan | HeadPlans, start: int, stop: int, **options: Any
    ) -> tuple[jax.Array, Any]:
        plans = plan if isinstance(plan, HeadPlans) else self.head_plans(plan)
        state, options = self.start(caches), options | {"mesh": self.mesh, "frames": self.grid.frames}
        state = denoise_planned(self.graph, self.params, state, self.inputs, plans, start, stop, **options)
        return state.latents, state.memory

    def head_plans(self, plan: Plan) -> HeadPlans:
        windows, order = plan.half_windows(), plan.head_order()
        if self.mesh is not None and self.mesh.tokens > 1:
            windows, order = deal_plan(windows, [*self.layers.values()], self.mesh.tokens)
        given = [windows, order]
        if (written := orders(plan)).any():
            given += [written, lies(plan)]
        windows, order, *over_time = (by_stack(self.calls, pad_steps(x), axis=1) for x in given)
        return HeadPlans(windows, order, np.zeros((), np.int32), *over_time)

    def plan(self, target: float, *, reuse: float) -> Plan:
        """As `random_plan`; half of a video's arrows run over time."""
        frames = self.grid.frames
        return random_plan(self.config, self.calls, self.steps, self.batch, target, reuse=reuse, frames=frames)


def random_plan(
    config: Any,
    calls: Sequence[AttentionCall],
    steps: int,
    batch: int,
    target: float,
    *,
    reuse: float,
    frames: int = 1,
) -> Plan:
    """A plan that keeps a share of all query-key pairs after the first step, with as many full heads as possible.

    Heads are drawn anew at each step from those of all layers, so that layers differ. At 0.32 by reuse a layer of 24
    caches 9 to 22.

    Args:
        config: of the transformer.
        calls: its attention layers, as `config.calls` has them.
        batch: of the transformer: 2 for a guided image.
        target: the share of pairs that is kept.
        reuse: the share of the saving that is by cached heads; the rest is by arrows.
        frames: of visual tokens. Half of the arrows run over time where there are several.
    """
    layers = tuple(AttentionLayer.of(call.name, call.layout) for call in calls)
    heads = config.num_attention_heads
    setting = Setting(
        pipeline_class="", weights="", scheduler="", sigmas=tuple(np.linspace(1, 0, steps + 1).tolist()),
        height=1, width=1, doubled_batch=batch == 2, num_heads=heads, layers=layers, token_frames=frames,
    )  # fmt: skip
    cached = reuse * (1 - target)
    arrows, shares = zip(*(widest_arrow(x, (1 - reuse) * (1 - target), 1 - cached) for x in layers), strict=True)
    native = list(dict.fromkeys(arrows))
    methods = FULL_METHOD, Method("cached"), *native
    arrow = np.array([methods.index(x) for x in arrows])[:, None]
    if frames > 1:
        methods += tuple(arrow_over_time(x) for x in native)
    choices, generator = np.zeros((steps, len(layers), heads), np.uint8), np.random.default_rng(0)
    for step in range(1, steps):
        rank = generator.permutation(len(layers) * heads).reshape(len(layers), heads) / (len(layers) * heads)
        bounds = cached, cached + np.array(shares)[:, None]
        choices[step] = np.select([rank < bounds[0], rank < bounds[1]], [1, arrow], 0)
        if frames > 1:
            choices[step] += (choices[step] > 1) * generator.integers(0, 2, rank.shape, np.uint8) * len(native)
    return Plan(setting, methods, choices)


def arrow_over_time(arrow: Method) -> Method:
    """The arrow of the same width whose band runs over time."""
    return Method(f"{arrow.name.removesuffix(')')}, {TIME})")


def widest_arrow(layer: AttentionLayer, saving: float, room: float) -> tuple[Method, float]:
    """The widest arrow that saves so much in at most this share of the heads, and that share."""
    for fraction in (8, 16, 32, 64, 128):
        arrow = Method.arrow(fraction)
        kept = density(np.array([arrow.half_window(layer.num_visual)], np.int32), layer.layout)[0]
        if saving <= room * (1 - kept):
            return arrow, float(saving / (1 - kept))
    raise ValueError(f"No arrow saves {saving:.2f} of {layer}: its text is dense.")


def kept(plan: Plan, steps: range) -> float:
    """The share of query-key pairs that a plan keeps in these steps."""
    windows = plan.half_windows()[list(steps)]
    counts = [
        (density(windows[:, number].ravel(), layer.layout).mean(), layer.layout.length**2)
        for number, layer in enumerate(plan.setting.layers)
    ]
    return float(sum(share * size for share, size in counts) / sum(size for _, size in counts))


def random_like(shapes: Any) -> Any:
    """Normal parameters on the default device, scaled by fan-in; made one by one, each in one program of its shape."""

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, size: float) -> jax.Array:
        kind = jnp.bfloat16 if jnp.dtype(dtype).itemsize == 1 else dtype
        return (jax.random.normal(key, shape, kind) * size).astype(dtype)

    flat, filled = nnx.to_flat_state(shapes), []
    depths = {path[:-1]: x.shape[-1] for path, x in flat if path[-1] == "values"}
    for key, (path, x) in zip(jax.random.split(jax.random.key(0), len(flat)), flat, strict=True):
        if isinstance(x, Place):
            array = jnp.arange(x.shape[0], dtype=x.dtype)
        elif isinstance(x, Stacked) and path[-1] in ("scale", "length"):
            array = jnp.full(x.shape, depths[path[:-1]] ** -0.5 / EIGHT if path[-1] == "scale" else 1.2, x.dtype)
        else:
            fan_in = x.shape[-2] if len(x.shape) > 1 else 1
            array = draw(key, x.shape, x.dtype, EIGHT if path[-1] == "values" else fan_in**-0.5)
        filled.append((path, x.replace(array)))
    return nnx.from_flat_state(filled)


EIGHT = 30.0
"""Standard deviation of values of 8 bits, whose scales make up for it."""


REST = 0.5
"""Seconds before each call on a GPU. Without it a step's time is that of the power left by the steps before. On an H100
FLUX.1-dev's at 1024 px took 125 ms rested and 132 in a row. Beside programs that need more power, it took 142."""


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, round by round, after one call of each that is not timed."""
    rest = REST if jax.default_backend() == "gpu" else 0.0
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(rest)
            started = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - started)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the rounds' ratios."""
    return median(a / b for a, b in zip(times[above], times[below], strict=True))
