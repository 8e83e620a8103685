"""How much of a step is attention, counted in its program: what a plan can save at most."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from dfa2_jax.nn.attention import Heads, LayerPlan, Project
from dfa2_jax.pipeline.call import Call
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.loop import State, denoise_step
from pallas_kernels.layout import Layout

PLAIN = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="none", num_cores=None, platform="cpu"))
"""A device without kernels: there every product is an operation of JAX's own, which can be counted."""


@dataclass(frozen=True)
class Products:
    """Attention's two matrix products alone, the projections before them alone, or neither."""

    kept: Literal["both", "projections", "neither"]

    def memory(self, stack: jax.ShapeDtypeStruct) -> None:
        return None

    def __call__(self, project: Project, layout: Layout, memory: None, plan: LayerPlan) -> tuple[Heads, None]:
        if self.kept == "neither":
            like = jax.eval_shape(project)[0]
            return jnp.zeros(like.shape, like.dtype), None
        q, k, v = project()
        if self.kept == "projections":
            return q + k + v, None
        return jnp.einsum("BNTS,BSNH->BTNH", jnp.einsum("BTNH,BSNH->BNTS", q, k), v), None


class StepShares(NamedTuple):
    """What heads could save of a dense step.

    attention: queries with keys, and weights with values; projections: to queries, keys and values.
    """

    attention: float
    projections: float


def step_shares(graph: nnx.GraphDef, params: Any, state: State, inputs: Inputs) -> StepShares:
    """Shares of the multiplications of a dense step's matrix products.

    Dense attention and matrix products run at about the same rate. So on an H100 and an H200 attention's share of the
    time is within 0.05 of this (benchmarks/results/sampling_h100.json, sampling_gpu.json).
    """

    def count(kept: Literal["both", "projections", "neither"]) -> float:
        def step(params: Any, state: State, inputs: Inputs) -> State:
            return denoise_step(nnx.merge(graph, params), Products(kept), inputs, 0, state)

        with jax.sharding.use_abstract_mesh(PLAIN):
            return multiplications(jax.make_jaxpr(step)(params, state, inputs).jaxpr)

    whole, projected, rest = count("both"), count("projections"), count("neither")
    return StepShares((whole - projected) / whole, (projected - rest) / whole)


def shares_of(call: Call) -> StepShares:
    """The shares of a step of this call."""
    transformer = call.pipeline.transformer
    return step_shares(transformer.graph, transformer.params, call.start(), call.inputs)


def multiplications(jaxpr: Any) -> float:
    """In its matrix products; those in loops as often as they run, those of 8 bits by half."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval
            rate = 0.5 if operand.dtype.itemsize == 1 else 1.0
            total += rate * equation.outvars[0].aval.size * math.prod(operand.shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns"))
        total += times * sum(multiplications(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total
