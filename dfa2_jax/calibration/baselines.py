"""Other ways to share attention, to compare plans with: DiTFastAttn (arXiv 2406.08552), caching alone, CFG sharing.

For quality, not for speed: every step computes all that its scheme may choose from, and takes what was chosen.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import trange

from dfa2_jax.calibration.attends import Budget, moments, relative_errors
from dfa2_jax.calibration.search import choose
from dfa2_jax.io.names import of_names
from dfa2_jax.nn.attention import Heads, Project, arrow_attention, by_stack, in_order
from dfa2_jax.nn.carrier import carrier
from dfa2_jax.options import Options
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.method import CACHED_METHOD, FULL_METHOD, Method
from dfa2_jax.sampling.inputs import Inputs
from dfa2_jax.sampling.loop import State, denoise_step
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import kept_pairs


@dataclass(frozen=True)
class Option:
    """What heads may do beside full attention.

    band: the window is one over the whole sequence, text included (DiTFastAttn's), not an arrow.
    residual: what the window left out at the last full step is added.
    share_guidance: the conditional half of the batch takes the unconditional half's output.
    """

    method: Method
    band: bool = False
    residual: bool = False
    share_guidance: bool = False

    def window(self, layout: Layout) -> tuple[int, Layout]:
        """Half-window and layout, as `arrow_attention` takes them."""
        seen = Layout(0, layout.length, layout.text_first) if self.band else layout
        return self.method.half_window(seen.num_visual), seen

    def pairs(self, layout: Layout) -> float:
        """Query-key pairs that it computes, as a share of all."""
        half_window, seen = self.window(layout)
        share = float(kept_pairs(np.array([half_window], np.int32), seen)[0]) / layout.length**2
        return share / 2 if self.share_guidance else share


@dataclass(frozen=True)
class Scheme:
    """Options, in the order in which they are tried.

    per_head: heads choose for themselves, as plans do (`search.choose`). Otherwise layers do, one after
        another, as in DiTFastAttn. A layer takes the first option that moves the model's output by less than the
        layer's share of the threshold.
    """

    options: tuple[Option, ...]
    per_head: bool = False


CACHE = Option(CACHED_METHOD)
SHARE_CFG = Option(FULL_METHOD, share_guidance=True)
BAND, ARROW = (Option(Method.arrow(8), band=band, residual=True) for band in (True, False))
SCHEMES = {
    "arrows, caching, CFG sharing": Scheme(
        (
            CACHE,
            *(Option(Method.arrow(f), share_guidance=share) for share in (False, True) for f in (8, 16, 32)),
            SHARE_CFG,
        ),
        per_head=True,
    ),
    "attention caching": Scheme((CACHE,)),
    "DiTFastAttn": Scheme((CACHE, replace(BAND, share_guidance=True), BAND, SHARE_CFG)),
    "DiTFastAttn, arrows": Scheme((CACHE, replace(ARROW, share_guidance=True), ARROW, SHARE_CFG)),
}
"""By the names of the paper's tables. Without a guided batch, options that share it are left out."""

FREE, IN_FULL = -2, -1
"""In the place of an option's number: to be chosen; full attention."""


@carrier
class SchemeMemory:
    """What a scheme remembers of one stack of layers."""

    outputs: Float[Array, "L B T N H"]
    residuals: Float[Array, "L B T N H"] | None
    """Full less windowed attention, of each head's last full step."""
    picks: Int[Array, "L N"]


@carrier
class SchemePlan:
    """What a layer takes at a step; with a leading axis, a stack of layers."""

    place: Int[Array, "*layers"]
    picks: Int[Array, "*layers N"]


@dataclass(frozen=True)
class FollowScheme:
    """Attention under a scheme; what `SchemePlan.picks` leaves free is chosen head by head."""

    options: tuple[Option, ...]
    budget: Budget
    implementation: str | None = None

    def memory(self, stack: jax.ShapeDtypeStruct) -> SchemeMemory:
        outputs = jnp.zeros(stack.shape, stack.dtype)
        residuals = jnp.zeros_like(outputs) if any(option.residual for option in self.options) else None
        return SchemeMemory(outputs, residuals, jnp.zeros((len(outputs), outputs.shape[3]), jnp.int32))

    def __call__(
        self, project: Project, layout: Layout, memory: SchemeMemory, plan: SchemePlan
    ) -> tuple[Heads, SchemeMemory]:
        q, k, v = project()
        dense = arrow_attention(q, k, v, layout=layout, implementation=self.implementation)
        outputs, residuals = [], memory.residuals
        for option in self.options:
            half_window, seen = option.window(layout)
            if half_window == CACHED:
                out = memory.outputs[plan.place]
            elif half_window == FULL:
                out = dense
            else:
                every_head = jnp.full(q.shape[2], half_window, jnp.int32)
                out = window = arrow_attention(q, k, v, every_head, layout=seen, implementation=self.implementation)
                if option.residual and memory.residuals is not None:
                    out = window + memory.residuals[plan.place]
                    residuals = memory.residuals.at[plan.place].set(dense - window)
            half = len(out) // 2
            outputs.append(jnp.concatenate([out[:half]] * 2) if option.share_guidance else out)
        units = 16  # coarse, so that like savings are one: eight different ones of 24 heads are 10 million states
        saved = tuple(round(units * (1 - option.pairs(layout))) for option in self.options)
        errors = relative_errors(jax.tree.map(lambda x: x[None], moments(outputs, dense)))
        picks = jnp.where(plan.picks == FREE, choose(errors, saved, self.budget.delta, self.budget.bound), plan.picks)
        full, out = picks == IN_FULL, dense
        for number, option_out in enumerate(outputs):
            out = jnp.where((picks == number)[:, None], option_out, out)
        if residuals is not None and memory.residuals is not None:
            residuals = jnp.where(full[:, None], residuals, memory.residuals)
        kept = memory.outputs.at[plan.place].set(out), residuals, memory.picks.at[plan.place].set(picks)
        return out, SchemeMemory(*kept)


@partial(jax.jit, static_argnames=("graph", "options", "rounding"))
def scheme_step(
    graph: nnx.GraphDef,
    params: Any,
    state: State,
    inputs: Inputs,
    picks: dict[str, Int[Array, "L N"]],
    i: Int[Array, ""] | int,
    budget: Budget,
    *,
    options: tuple[Option, ...],
    rounding: str | None = None,
) -> tuple[State, Array]:
    """One step, and the model's own output [B or 2B, V, C]; the picks made are in the state's memory."""
    model = Recorded(nnx.merge(graph, params))
    plans: dict[str, Any] = {stack: SchemePlan(jnp.arange(len(chosen)), chosen) for stack, chosen in picks.items()}
    after = denoise_step(model, FollowScheme(options, budget), inputs, i, state, plans, rounding=rounding)
    return after, model.outputs[0]


class Recorded:
    """A transformer that keeps its predictions, before guidance."""

    def __init__(self, model: Any):
        self.model, self.outputs = model, []

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        out, memory = self.model(*args, **kwargs)
        self.outputs.append(out)
        return out, memory


@dataclass(frozen=True)
class SchemeChoices:
    """What a scheme chose: the numbers of its options by step, layer and head, -1 for full attention."""

    options: tuple[Option, ...]
    picks: Int[np.ndarray, "steps layers N"]
    layouts: tuple[Layout, ...]

    def density(self) -> float:
        """The share of query-key pairs computed, with those of windows at full steps whose residual is used next."""
        pairs = np.array([[*(option.pairs(layout) for option in self.options), 1.0] for layout in self.layouts])
        residual = np.array([*(option.residual for option in self.options), False])
        windows = np.where(residual, pairs, 0).max(1)[:, None]
        spent = pairs[np.arange(len(pairs))[:, None], self.picks]
        before_use = (self.picks[:-1] == IN_FULL) & residual[self.picks[1:]]
        sizes = np.array([layout.length**2 for layout in self.layouts])[:, None]
        total = (spent * sizes).sum() + (before_use * windows * sizes).sum()
        return float(total / (sizes.sum() * self.picks.shape[0] * self.picks.shape[2]))


class Loop:
    """A pipeline's call, step by step, with these options."""

    def __init__(self, pipeline: Pipeline, options: tuple[Option, ...], arguments: dict[str, Any]):
        self.pipeline, self.call, self.options = pipeline, pipeline.prepare(of_names(Options, arguments)), options
        self.setting = self.call.setting
        if not self.setting.doubled_batch and any(option.share_guidance for option in options):
            raise ValueError("This call has no unconditional half of the batch to share: take no options that do.")
        self.shape = self.call.request.steps, len(self.setting.layers), self.setting.num_heads
        self.inputs = jax.device_put(self.call.inputs)
        self.state = self.call.start(FollowScheme(options, Budget.of(0.0, None, self.setting.num_heads)))

    def trial(self, i: int, picks: Int[np.ndarray, "layers N"], budget: Budget) -> tuple[State, Array]:
        """What `scheme_step` gives; nothing moves."""
        transformer, options = self.pipeline.transformer, {"options": self.options, "rounding": self.pipeline.rounding}
        chosen = by_stack(self.call.layers, picks)
        return scheme_step(transformer.graph, transformer.params, self.state, self.inputs, chosen, i, budget, **options)

    def advance(self, i: int, picks: Int[np.ndarray, "layers N"], budget: Budget) -> Int[np.ndarray, "layers N"]:
        """Goes on by one step; the picks made."""
        self.state, _ = self.trial(i, picks, budget)
        return in_order(self.call.layers, {stack: kept.picks for stack, kept in self.state.memory.items()})


def calibrate_scheme(
    pipeline: Pipeline,
    scheme: Scheme,
    threshold: float,
    *,
    c: float | None = 1.5,
    progress: bool = True,
    **arguments: Any,
) -> SchemeChoices:
    """Choose on one batch of prompts.

    Args:
        threshold: `calibrate`'s delta for schemes per head; else DiTFastAttn's. Layer l of L takes an option that moves
            the model's output by less than l / L of this threshold.
        c: `calibrate`'s.
        arguments: of the pipeline.
    """
    guided = pipeline.prepare(of_names(Options, arguments)).request.cfg_scale is not None
    options = tuple(option for option in scheme.options if guided or not option.share_guidance)
    loop = Loop(pipeline, options, arguments)
    steps, layers, heads = loop.shape
    budget, picks = Budget.of(threshold, c, heads), np.full(loop.shape, IN_FULL, np.int32)
    with told("compiling", progress):
        _, out = loop.trial(0, picks[0], budget)
        if not scheme.per_head:
            moved(out, out)
    for i in trange(steps, desc="calibrate", disable=not progress):
        if i > 0 and scheme.per_head:
            picks[i] = FREE
        elif i > 0:
            exact = loop.trial(i, picks[i], budget)[-1]
            for layer in range(layers):
                for number in range(len(options)):
                    picks[i, layer] = number
                    if float(moved(loop.trial(i, picks[i], budget)[-1], exact)) < (layer + 1) / layers * threshold:
                        break
                else:
                    picks[i, layer] = IN_FULL
        picks[i] = loop.advance(i, picks[i], budget)
    return SchemeChoices(options, picks, tuple(layer.layout for layer in loop.setting.layers))


def sample_scheme(pipeline: Pipeline, choices: SchemeChoices, **arguments: Any) -> Any:
    """Images in the form that the arguments, a pipeline's, ask for, under what a scheme chose."""
    loop = Loop(pipeline, choices.options, arguments)
    if loop.shape != choices.picks.shape:
        raise ValueError(f"The choice is of steps, layers, heads {choices.picks.shape}, the call of {loop.shape}.")
    budget = Budget.of(0.0, None, loop.shape[2])
    for i, picks in enumerate(choices.picks):
        loop.advance(i, picks, budget)
    return loop.call.images(np.asarray(loop.state.latents))


@jax.jit
def moved(out: Float[Array, "B V C"], exact: Float[Array, "B V C"]) -> Float[Array, ""]:
    """DiTFastAttn's distance (arXiv 2406.08552, section 3.4): relative differences, each of at most 10, on average."""
    out, exact = out.astype(jnp.float32), exact.astype(jnp.float32)
    size = jnp.maximum(jnp.abs(out), jnp.abs(exact)) + 1e-6
    return jnp.clip(jnp.abs(out - exact) / size, 0, 10).mean()
