"""How predictions combine to one: classifier-free and skip-layer guidance, as in diffusers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dfa2_jax.nn.attention import AttentionCall
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.sampling.inputs import pad_steps

Latents = Float[Array, "B V C"]
Round = Callable[[Array], Array]
"""To the dtype that torch rounds to between operations, or to nothing."""


@runtime_checkable
class Model(Protocol):
    """The transformer at one step, under one kind of attention."""

    def __call__(self, x: Float[Array, "B V C"], memory: Any) -> tuple[Float[Array, "B V C"], Any]:
        """Prediction in float32 of every row of the conditions, and what attention remembers."""
        ...

    def without(self, blocks: Bool[Array, " blocks"], x: Float[Array, "B V C"]) -> Float[Array, "B V C"]:
        """Prediction of the conditional side without some blocks; dense, and remembers nothing."""
        ...


@runtime_checkable
class Guidance(Protocol):
    """A pytree. `sides` rows of the transformer's batch make one image."""

    sides: ClassVar[int]

    def at(self, nodes: Int[np.ndarray, " nodes"]) -> "Guidance":
        """The guidance of these steps alone, in their order."""
        ...

    def extra_pairs(self, layers: Sequence[AttentionCall]) -> int:
        """Query-key pairs of an image's further forwards over all steps; these are dense, whatever the plan says."""
        ...

    def __call__(self, model: Model, x: Latents, i: Int[Array, ""] | int, memory: Any, rounded: Round) -> tuple:
        """The prediction that the solver takes at step `i`, and what attention remembers."""
        ...


@carrier
class NoGuidance:
    """One forward per image."""

    sides: ClassVar[int] = 1

    def at(self, nodes: Int[np.ndarray, " nodes"]) -> "NoGuidance":
        return self

    def extra_pairs(self, layers: Sequence[AttentionCall]) -> int:
        return 0

    def __call__(self, model: Model, x: Latents, i: Int[Array, ""] | int, memory: Any, rounded: Round) -> tuple:
        return model(x, memory)


@carrier
class ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598): both sides are one batch, with one plan and one memory."""

    scale: Float[Array | np.ndarray, " padded_steps"]
    sides: ClassVar[int] = 2

    @classmethod
    def constant(cls, scale: float, steps: int) -> "ClassifierFree":
        return cls(pad_steps(np.full(steps, scale, np.float32)))

    @classmethod
    def dynamic(cls, scale: float, timesteps: Int[np.ndarray, " steps"], steps: int) -> "ClassifierFree":
        """A scale for each step between 1 and `1 + scale`, as diffusers' `use_dynamic_cfg` makes it.

        It takes a timestep of up to 1,000 for the number of a step. The cosine's argument is as large as 2.5e6 pi, and
        only the same operations in float64 have the same cosine.

        Args:
            timesteps: the scheduler's own.
            steps: `num_inference_steps`.
        """
        turns = [((steps - int(timestep)) / steps) ** 5.0 for timestep in timesteps]
        scales = [1 + scale * ((1 - math.cos(math.pi * turn)) / 2) for turn in turns]
        return cls(pad_steps(np.array(scales, np.float32)))

    def at(self, nodes: Int[np.ndarray, " nodes"]) -> "ClassifierFree":
        return replace(self, scale=pad_steps(np.asarray(self.scale)[nodes]))

    def extra_pairs(self, layers: Sequence[AttentionCall]) -> int:
        return 0

    def sides_of(self, model: Model, x: Latents, memory: Any) -> tuple[Latents, Latents, Any]:
        both, memory = model(jnp.concatenate([x, x]), memory)
        unconditional, conditional = jnp.split(both, 2)
        return unconditional, conditional, memory

    def combined(self, unconditional: Latents, conditional: Latents, i: Any, rounded: Round) -> Latents:
        scale = jnp.asarray(self.scale)[i]
        return rounded(unconditional + rounded(scale * rounded(conditional - unconditional)))

    def __call__(self, model: Model, x: Latents, i: Int[Array, ""] | int, memory: Any, rounded: Round) -> tuple:
        unconditional, conditional, memory = self.sides_of(model, x, memory)
        return self.combined(unconditional, conditional, i, rounded), memory


@carrier
class Float32ClassifierFree(ClassifierFree):
    """Classifier-free guidance of predictions that diffusers makes float32 before it combines them (CogVideoX)."""

    def combined(self, unconditional: Latents, conditional: Latents, i: Any, rounded: Round) -> Latents:
        return super().combined(unconditional, conditional, i, lambda x: x)


@carrier
class SkipLayer:
    """Skip-layer guidance (SD3.5-medium): pushes away from the model without some of its blocks."""

    base: ClassifierFree
    blocks: Bool[Array | np.ndarray, " blocks"]
    scale: Float[Array | np.ndarray, ""]
    active: Bool[Array | np.ndarray, " padded_steps"]
    sides: ClassVar[int] = 2

    def at(self, nodes: Int[np.ndarray, " nodes"]) -> "SkipLayer":
        return replace(self, base=self.base.at(nodes), active=pad_steps(np.asarray(self.active)[nodes]))

    def extra_pairs(self, layers: Sequence[AttentionCall]) -> int:
        pairs = sum(layer.layout.length**2 for layer in layers if not self.blocks[layer.block])
        return int(np.sum(self.active)) * pairs

    def __call__(self, model: Model, x: Latents, i: Int[Array, ""] | int, memory: Any, rounded: Round) -> tuple:
        unconditional, conditional, memory = self.base.sides_of(model, x, memory)
        guided = self.base.combined(unconditional, conditional, i, rounded)

        def push(guided: Array) -> Array:
            without = model.without(jnp.asarray(self.blocks), x)
            return rounded(guided + rounded(rounded(conditional - without) * jnp.asarray(self.scale)))

        return jax.lax.cond(jnp.asarray(self.active)[i], push, lambda guided: guided, guided), memory
