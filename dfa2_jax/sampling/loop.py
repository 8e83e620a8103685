"""The denoising loop: one jitted program for every prompt, seed, guidance value, plan and step count of a shape."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.nn.attention import Attend, Dense, LayerPlan, Planned, ProjectionBranches, dense_plans, gpu_kind
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.nn.linear import XLA_OPTIONS
from dfa2_jax.nn.weights import reads_in_place
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.parallel.transformer import ParallelTransformer
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.solvers.base import RoundedSolver


@carrier
class State:
    """What the loop carries from step to step.

    latents: patchified, float32.
    solver: the solver's own state, None where it has none.
    memory: what attention remembers, by stack of layers.
    """

    latents: Float[Array | np.ndarray, "B V C"]
    solver: Any = None
    memory: Any = None


@carrier
class HeadPlans:
    """What a plan says of heads, as the loop reads it: by stack of layers, padded like every per-step input.

    order, lies: as in `nn.attention.LayerPlan`; None: every band runs in the native order.
    first: the step that runs dense and fills the memory, whatever the plan says of it. A loop whose memory is empty
        must start at this step: steps before it do not run, and heads cached before it return zeros.
    """

    half_window: dict[str, Int[Array | np.ndarray, "padded_steps L N"]]
    head_order: dict[str, Int[Array | np.ndarray, "padded_steps L N"]]
    first: Int[Array | np.ndarray, ""]
    order: dict[str, Int[Array | np.ndarray, "padded_steps L N"]] | None = None
    lies: dict[str, Int[Array | np.ndarray, "padded_steps L N"]] | None = None

    def at(self, i: Int[Array, ""] | int) -> dict[str, LayerPlan]:
        """One step's plan of every stack."""
        every = {"half_window": self.half_window, "head_order": self.head_order, "order": self.order, "lies": self.lies}
        given = {name: jax.tree.map(lambda x: jnp.asarray(x)[i], x) for name, x in every.items() if x is not None}
        return {
            stack: LayerPlan.of_stack(half_window.shape[1], i, **{name: x[stack] for name, x in given.items()})
            for stack, half_window in self.half_window.items()
        }


@dataclass(frozen=True)
class StepModel:
    """The transformer at one step, under one kind of attention (`sampling.guidance.Model`).

    transformer: `families.base.Transformer`.
    plans: what each layer knows of itself, by stack.
    beside: as in `Inputs`.
    implementation: of the dense attention that skip-layer guidance runs.
    """

    transformer: Any
    attend: Attend
    conditions: Any
    timestep: Float[Array, "1 E"]
    plans: dict[str, Any]
    beside: Any = None
    implementation: str | None = None
    unroll: int | bool = 1

    def __call__(self, x: Float[Array, "B V C"], memory: Any) -> tuple[Float[Array, "B V C"], Any]:
        options = {"memory": memory, "plans": self.plans, "unroll": self.unroll}
        x = x if self.beside is None else jnp.concatenate([x, self.beside], axis=-1)
        prediction, memory = self.transformer(x, self.timestep, self.conditions, self.attend, **options)
        return prediction.astype(jnp.float32), memory

    def without(self, blocks: Bool[Array, " blocks"], x: Float[Array, "B V C"]) -> Float[Array, "B V C"]:
        conditions, dense = self.conditions.last(x.shape[0]), Dense(self.implementation)
        options = {"plans": self.plans, "skipped_blocks": blocks, "unroll": self.unroll}
        return self.transformer(x, self.timestep, conditions, dense, **options)[0].astype(jnp.float32)


def denoise_step(
    model: Any,
    attend: Attend,
    inputs: Inputs,
    i: Int[Array, ""] | int,
    state: State,
    plans: dict[str, Any] | None = None,
    *,
    rounding: str | None = None,
    **options: Any,
) -> State:
    """One step of the solver.

    Args:
        model: the transformer.
        plans: of every stack; None: all heads dense.
        rounding: as in `denoise`.
        options: of `StepModel`.
    """
    rounded, timestep = rounding_to(rounding), jnp.asarray(inputs.timesteps)[i][None]
    plans = dense_plans(model.config.calls(1, 1), i) if plans is None else plans
    step_model = StepModel(model, attend, inputs.conditions, timestep, plans, inputs.beside, **options)
    prediction, memory = inputs.guidance(step_model, state.latents, i, state.memory or {}, rounded)
    before = state.latents, prediction, i, state.solver
    if rounding is not None and isinstance(inputs.solver, RoundedSolver):
        latents, solver = inputs.solver.rounded_step(*before, rounded)
    else:
        latents, solver = inputs.solver.step(*before)
    if inputs.known is not None:
        latents = inputs.known.kept(latents, i)
    return State(rounded(jnp.asarray(latents)), solver, memory if state.memory is not None else None)


@partial(
    jax.jit,
    static_argnames=("graph", "attend", "unroll", "implementation", "rounding", "mesh"),
    donate_argnames=("state",),
    compiler_options=XLA_OPTIONS,
)
def denoise(
    graph: nnx.GraphDef,
    params: Any,
    state: State,
    inputs: Inputs,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    *,
    attend: Attend | None = None,
    unroll: int | bool = 1,
    implementation: str | None = None,
    rounding: str | None = None,
    mesh: DeviceMesh | None = None,
) -> State:
    """Steps `start` to `stop` of the sampling loop.

    The whole loop and a single step are calls of this same program, so progress and callbacks change no number. Inside
    another jit, scan or map, where JAX allows no compiler options, call `denoise.__wrapped__` (so too
    `denoise_planned`), and give the outermost jit `nn.linear.XLA_OPTIONS`.

    Args:
        state: given away, and returned.
        attend: attention in place of dense attention; its memory is in `state`.
        unroll: blocks compiled per iteration of a scan over layers.
        implementation: of dense attention (`pallas_kernels.arrow_attention`).
        rounding: a dtype's name: round to it where torch does between operations, to reproduce diffusers' images in
            that dtype (XLA keeps such values in float32). None keeps float32.
        mesh: of devices that share the work.
    """
    attend = Dense(implementation) if attend is None else attend
    options = {"rounding": rounding, "implementation": implementation, "unroll": unroll}

    def loop(params: Any, state: State, inputs: Inputs, start: Any, stop: Any) -> State:
        step = partial(denoise_step, merged(graph, params, mesh), attend, inputs, **options)
        return jax.lax.fori_loop(start, stop, step, state)

    return on_devices(loop, mesh)(params, state, inputs, start, stop)


@partial(
    jax.jit,
    static_argnames=("graph", "skip_projections", "frames", "unroll", "implementation", "rounding", "mesh"),
    donate_argnames=("state",),
    compiler_options=XLA_OPTIONS,
)
def denoise_planned(
    graph: nnx.GraphDef,
    params: Any,
    state: State,
    inputs: Inputs,
    plans: HeadPlans,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    *,
    skip_projections: bool = True,
    frames: int = 1,
    unroll: int | bool = 1,
    implementation: str | None = None,
    rounding: str | None = None,
    mesh: DeviceMesh | None = None,
) -> State:
    """As `denoise`, with each head's attention by a plan (DiTFastAttnV2, arXiv 2503.22796, section 3).

    Args:
        state: its memory holds every attention layer's last output (`memory.empty_memory`).
        plans: data: another plan of the shape compiles nothing.
        skip_projections: do not compute q, k, v of cached heads where that is faster. False: keep the summation order
            of a step that computes every head.
        frames: of the visual tokens, where the plan has bands that run over time.
    """
    shares_tokens = mesh is not None and mesh.tokens > 1
    options = {"rounding": rounding, "implementation": implementation, "unroll": unroll}

    def loop(params: Any, state: State, inputs: Inputs, plans: HeadPlans, start: Any, stop: Any) -> State:
        model = merged(graph, params, mesh)
        in_place = reads_in_place(nnx.merge(graph, params))
        num_rows = max(x.shape[1] * x.shape[2] for x in jax.tree.leaves(state.memory))
        branches = ProjectionBranches.best(num_rows, in_place)

        def step(skip: bool, i: Array, plans: dict[str, Any] | None, state: State) -> State:
            attend = Planned(implementation, skip, in_place, frames)
            return denoise_step(model, attend, inputs, i, state, plans, **options)

        def later(i: Array, state: State) -> State:
            at_step = plans.at(i)
            # A CPU's branches cost next to nothing. Where tokens are exchanged, they always pay.
            if not skip_projections or shares_tokens or gpu_kind() is None:
                return step(skip_projections, i, at_step, state)
            half_window = jnp.concatenate([jnp.asarray(plan.half_window) for plan in at_step.values()])
            taken = branches.worthwhile(half_window).astype(jnp.int32)
            for skip, times in ((True, taken), (False, 1 - taken)):  # as loops: a branch would copy the memory
                state = jax.lax.fori_loop(0, times, lambda _, state, skip=skip: step(skip, i, at_step, state), state)
            return state

        first = jnp.asarray(plans.first)
        has_first = (jnp.asarray(start) <= first) & (first < stop)
        state = jax.lax.cond(has_first, lambda state: step(False, first, None, state), lambda state: state, state)
        return jax.lax.fori_loop(jnp.maximum(start, first + 1), stop, later, state)

    return on_devices(loop, mesh)(params, state, inputs, plans, start, stop)


def merged(graph: nnx.GraphDef, params: Any, mesh: DeviceMesh | None) -> Any:
    """The transformer; on a mesh, one whose devices make a share each."""
    model = nnx.merge(graph, params)
    return model if mesh is None else ParallelTransformer(model, mesh)


def on_devices(loop: Callable[..., State], mesh: DeviceMesh | None) -> Callable[..., State]:
    return loop if mesh is None else partial(mesh.run, loop)


def rounding_to(dtype: str | None) -> Callable[[Array], Array]:
    """Rounds to a dtype and keeps float32; None: nothing."""
    if dtype is None:
        return lambda x: x
    kind = jnp.finfo(dtype)
    return lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
