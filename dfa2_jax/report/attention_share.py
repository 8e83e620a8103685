"""How much of a step is attention, counted in its program: what a plan can save at most."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dfa2_jax.nn.attention import Heads, LayerPlan, Project
from dfa2_jax.pipeline.call import Call
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.loop import State, denoise_step
from pallas_kernels.layout import Layout


@dataclass(frozen=True)
class Products:
    """Attention's two matrix products alone, or (`kept=False`) neither."""

    kept: bool
    implementation: str | None = None

    def memory(self, stack: jax.ShapeDtypeStruct) -> None:
        return None

    def __call__(self, project: Project, layout: Layout, memory: None, plan: LayerPlan) -> tuple[Heads, None]:
        q, k, v = project()
        if not self.kept:
            return q + k + v, None
        return jnp.einsum("BNTS,BSNH->BTNH", jnp.einsum("BTNH,BSNH->BNTS", q, k), v), None


def attention_share(call: Call) -> float:
    """Of the multiplications of a dense step's matrix products, those of queries with keys and weights with values."""
    transformer = call.pipeline.transformer

    def count(kept: bool) -> int:
        def step(params: Any, state: State, inputs: Inputs) -> State:
            return denoise_step(nnx.merge(transformer.graph, params), Products(kept), inputs, 0, state)

        return multiplications(jax.make_jaxpr(step)(transformer.params, call.start(), call.inputs).jaxpr)

    rest, whole = map(count, (False, True))
    return 1 - rest / whole


def multiplications(jaxpr: Any) -> int:
    """In its matrix products; those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = jax.tree.leaves([*equation.params.values()], is_leaf=lambda x: hasattr(x, "eqns"))
        total += times * sum(multiplications(jaxpr) for jaxpr in inner if hasattr(jaxpr, "eqns"))
    return total
