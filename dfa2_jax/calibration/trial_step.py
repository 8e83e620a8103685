"""One step of the sampling loop in which every head tries every method."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from dfa2_jax.calibration.attends import Budget, Trials, TryEverything
from dfa2_jax.nn.linear import XLA_OPTIONS
from dfa2_jax.parallel.mesh import ROWS, DeviceMesh
from dfa2_jax.plan.method import Method
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.loop import State, denoise_step, merged


def planning_tiles(head_dim: int) -> tuple[int, int]:
    """Queries and keys of the tiles whose savings count where a call names none: those of the paper's kernel."""
    return (128, 64) if head_dim == 128 else (128, 128)


@partial(
    jax.jit,
    static_argnames=("graph", "candidates", "tiles", "chunk", "implementation", "rounding", "mesh", "frames"),
    donate_argnames=("state",),
    compiler_options=XLA_OPTIONS,
)
def calibrate_step(
    graph: nnx.GraphDef,
    params: Any,
    state: State,
    inputs: Inputs,
    i: Int[Any, ""] | int,
    budget: Budget,
    *,
    candidates: tuple[Method, ...],
    tiles: tuple[int, int],
    chunk: int | None = None,
    implementation: str | None = None,
    rounding: str | None = None,
    mesh: DeviceMesh | None = None,
    frames: int = 1,
) -> tuple[State, dict[str, tuple[Any, Any]]]:
    """Step `i`, not the first, and what it chose in every stack of layers: picks and errors (`Trials`).

    Args:
        state: given away; its memory holds every attention call's last output, as `denoise_planned` leaves it.
        mesh: of devices that share the batch alone (`Call.over_batch`).
        frames: of the visual tokens, where candidates run over time.
    """

    def step(params: Any, state: State, inputs: Inputs, i: Any, budget: Budget) -> tuple[State, Any]:
        memory = {stack: Trials.of_caches(caches, len(candidates)) for stack, caches in state.memory.items()}
        before = State(state.latents, state.solver, memory)
        attend = TryEverything(candidates, budget, tiles, chunk, implementation, None if mesh is None else ROWS, frames)
        after = denoise_step(merged(graph, params, mesh), attend, inputs, i, before, rounding=rounding)
        caches = {stack: trials.caches for stack, trials in after.memory.items()}
        chosen = {stack: (trials.picks, trials.errors) for stack, trials in after.memory.items()}
        return State(after.latents, after.solver, caches), chosen

    run = step if mesh is None else partial(mesh.run, step, returns=lambda of_state: (of_state, P()))
    return run(params, state, inputs, i, budget)
