"""How much of a step is attention, counted in its program: what a plan can save at most."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dfa2_jax.nn.attention import Heads, Project
from dfa2_jax.pipeline.components import Component
from dfa2_jax.sampling.loop import Inputs, denoise_step
from pallas_kernels.layout import Layout


@dataclass(frozen=True)
class Products:
    """Attention's two matrix products alone, or (`kept=False`) neither."""

    kept: bool
    implementation: str | None = None

    def __call__(self, project: Project, layout: Layout, memory: None, row: None) -> tuple[Heads, None]:
        q, k, v = project()
        if not self.kept:
            return q + k + v, None
        return jnp.einsum("BNTS,BSNH->BTNH", jnp.einsum("BTNH,BSNH->BNTS", q, k), v), None


def attention_share(transformer: Component, latents: Float[Array, "B V C"], inputs: Inputs) -> float:
    """Of the multiplications of a dense step's matrix products, those of queries with keys and weights with values."""

    def count(kept: bool) -> int:
        def step(params: Any, latents: Array, inputs: Inputs) -> Any:
            model: Any = nnx.merge(transformer.graph, params)
            return denoise_step(model.velocity, Products(kept), inputs, lambda x: x, 0, latents, None, None)[0]

        return multiplications(jax.make_jaxpr(step)(transformer.params, latents, inputs).jaxpr)

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
        total += times * sum(multiplications(one) for one in inner if hasattr(one, "eqns"))
    return total


def predicted_speedup(share: float, density: float) -> float:
    """Of a step whose attention keeps `density` of its pairs and costs in proportion (Amdahl's law)."""
    return 1 / (1 - share * (1 - density))
