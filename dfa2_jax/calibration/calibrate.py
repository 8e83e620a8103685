"""From prompts to a plan: the sampling loop with another attention, which tries every method on every head.

At each step after the first and in each layer, one pass gives every head's output under every candidate; errors are
reduced per head, the choice is made in the same program, and the chosen outputs go on: later layers and steps see the
compression that they will meet (DiTFastAttnV2, arXiv 2503.22796, section 3.3).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from dfa2_jax.calibration.resume import Progress, digest_of
from dfa2_jax.calibration.search import MAX_DELTA, choose
from dfa2_jax.nn.attention import Heads, Memory, PlanRow, Project, arrow_attention, nested_arrow_attention
from dfa2_jax.nn.layers import XLA_OPTIONS
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.plan.plan import CACHED_METHOD, FULL_METHOD, Method, Plan
from dfa2_jax.plan.setting import Calibration, Density, Setting
from dfa2_jax.sampling.loop import Inputs, by_segment, denoise_step, in_order, rounding_to
from pallas_kernels.layout import CACHED, FULL, Layout
from pallas_kernels.mask import count_tiles

logger = logging.getLogger("dfa2_jax")

PLANNING_TILES = {64: (128, 128), 128: (128, 64)}
"""By head_dim, those of the paper's kernel."""


class Found(NamedTuple):
    """What calibration remembers of the layers of a segment."""

    caches: Float[Array, "L B T N H"]
    picks: Int[Array, "L N"]
    """Number of the chosen candidate; -1: full."""
    errors: Float[Array, "L N M"]
    """Relative squared error of every candidate."""


class Budget(NamedTuple):
    """Of one layer at one step. Data: another one compiles nothing."""

    delta: Float[Array, ""]
    """What the errors of the chosen methods may add up to over the heads."""
    bound: Float[Array, ""]
    """What each stays below."""

    @classmethod
    def of(cls, delta: float, c: float | None, heads: int) -> "Budget":
        """`c * delta / heads` bounds a head (appendix); None: nothing does. Rounded down: float32(0.6) is above 0.6."""
        return cls(float32_below(delta), float32_below(np.inf if c is None else c * delta / heads))


def float32_below(x: float) -> Float[Array, ""]:
    """The largest float32 that is not above x."""
    nearest = np.float32(x)
    return jnp.asarray(np.nextafter(nearest, np.float32(-np.inf)) if float(nearest) > x else nearest)


class Moments(NamedTuple):
    """Sums over a part of the batch, per head, in float32."""

    squares: Float[Array, "N M"]
    """Of the differences between each candidate's output and the dense one."""
    mean: Float[Array, " N"]
    """Of the dense output."""
    spread: Float[Array, " N"]
    """Of its squared distances from that mean."""


@dataclass(frozen=True)
class Calibrating:
    """Attention that finds out what each head could do with.

    candidates: methods other than full.
    tiles: queries and keys of the tiles that a method saves, `Plan.density`'s.
    chunk: samples of the batch whose candidates are held at once; None: all.
    """

    candidates: tuple[Method, ...]
    budget: Budget
    tiles: tuple[int, int]
    chunk: int | None = None
    implementation: str | None = None

    def __call__(self, project: Project, layout: Layout, memory: Found, row: PlanRow) -> tuple[Heads, Found]:
        q, k, v = project()
        windows = np.array([method.half_window(layout.num_visual) for method in self.candidates], np.int32)
        previous = memory.caches[row.layer]
        saved = saved_tiles(windows, layout, self.tiles)
        if self.chunk is None:
            candidates, out = self._outputs(windows, layout, q, k, v, previous)
            errors = relative_errors(jax.tree.map(lambda x: x[None], moments(candidates, out)))
            picks = choose(errors, saved, *self.budget)
            for number, candidate in enumerate(candidates):
                out = jnp.where((picks == number)[None, None, :, None], candidate, out)
            caches = jax.lax.dynamic_update_index_in_dim(memory.caches, out, row.layer, 0)
        else:
            parts = tuple(x.reshape(-1, self.chunk, *x.shape[1:]) for x in (q, k, v, previous))
            errors = relative_errors(jax.lax.map(lambda part: moments(*self._outputs(windows, layout, *part)), parts))
            picks = choose(errors, saved, *self.budget)
            half_window = jnp.append(jnp.asarray(windows), jnp.int32(FULL))[picks]
            options = {"layout": layout, "implementation": self.implementation}
            caches = arrow_attention(q, k, v, half_window, cache=memory.caches, layer=row.layer, **options)
            out = caches[row.layer]
        found = Found(caches, memory.picks.at[row.layer].set(picks), memory.errors.at[row.layer].set(errors))
        return out, found

    def _outputs(
        self, windows: Int[np.ndarray, " M"], layout: Layout, q: Heads, k: Heads, v: Heads, previous: Heads
    ) -> tuple[list[Heads], Heads]:
        """Every head under every candidate, and dense."""
        options = {"layout": layout, "implementation": self.implementation}
        arrows = np.unique(windows[windows >= 0])
        if not arrows.size:
            full = jnp.full(q.shape[2], FULL, jnp.int32)
            return [previous] * len(windows), arrow_attention(q, k, v, full, **options)
        nested = nested_arrow_attention(q, k, v, jnp.asarray(arrows), **options)
        places = [np.searchsorted(arrows, window) for window in windows]
        return [
            previous if window == CACHED else nested[place] for window, place in zip(windows, places, strict=True)
        ], nested[-1]


def saved_tiles(windows: Int[np.ndarray, " M"], layout: Layout, tiles: tuple[int, int]) -> tuple[int, ...]:
    """Tiles of a head that each candidate does not visit."""
    count = count_tiles(windows, layout, *tiles)
    return tuple(int(count.total - visited) for visited in count.visited)


def moments(candidates: list[Heads], dense: Heads) -> Moments:
    """Over batch, tokens (those of text too, as in the paper) and channels."""
    axes, exact = (0, 1, 3), dense.astype(jnp.float32)
    mean = exact.mean(axes, keepdims=True)
    squares = [jnp.square(candidate.astype(jnp.float32) - exact).mean(axes) for candidate in candidates]
    return Moments(jnp.stack(squares, axis=1), mean[0, 0, :, 0], jnp.square(exact - mean).mean(axes))


def relative_errors(parts: Moments) -> Float[Array, "N M"]:
    """Relative squared error of each head under each candidate, from equal parts of the batch on the first axis.

    `mean((o' - o)^2) / mean((o - mean(o))^2)` (section 3.2). The mean of the parts' errors would be another number.
    """
    squares, mean, spread = (x.mean(0) for x in parts)
    return squares / (spread + jnp.square(parts.mean - mean[None]).mean(0))[:, None]


@partial(
    jax.jit,
    static_argnames=("graph", "candidates", "tiles", "chunk", "implementation", "rounding"),
    donate_argnames=("latents", "caches"),
    compiler_options=XLA_OPTIONS,
)
def calibrate_step(
    graph: nnx.GraphDef,
    params: Any,
    latents: Float[Array, "B V C"],
    caches: tuple[Memory, ...],
    inputs: Inputs,
    i: Int[Array, ""] | int,
    budget: Budget,
    *,
    candidates: tuple[Method, ...],
    tiles: tuple[int, int],
    chunk: int | None = None,
    implementation: str | None = None,
    rounding: str | None = None,
) -> tuple[Float[Array, "B V C"], tuple[Memory, ...], Int[Array, "layers N"], Float[Array, "layers N M"]]:
    """Step `i`, not the first, and what it found of every layer in order of execution: picks and errors (`Found`)."""
    model = nnx.merge(graph, params)

    def remember(cache: Array | None) -> Found | None:
        if cache is None:
            return None
        size = len(cache), cache.shape[3]
        return Found(cache, jnp.zeros(size, jnp.int32), jnp.zeros((*size, len(candidates))))

    memory = tuple((remember(first), remember(second)) for first, second in caches)
    attend = Calibrating(candidates, budget, tiles, chunk, implementation)
    rows = by_segment(model.attention_rows, None)
    step = partial(denoise_step, model.velocity, attend, inputs, rounding_to(rounding))
    out, memory = step(i, latents, memory, rows)

    def of_each(get: Callable[[Found], Any]) -> tuple[Memory, ...]:
        return tuple((first and get(first), second and get(second)) for first, second in memory)

    picks, errors = in_order(model.attention_rows, of_each(lambda found: (found.picks, found.errors)))
    return jnp.asarray(out), of_each(lambda found: found.caches), picks, errors


def calibrate(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    delta: float = 0.4,
    c: float | None = 1.5,
    windows: tuple[int, ...] = (8, 16, 32),
    cache: bool = True,
    seed: int = 0,
    attention_chunk: int | None = None,
    tiles: tuple[int, int] | None = None,
    progress: bool = True,
    resume: str | PathLike[str] | None = None,
) -> Plan:
    """Find a plan in one sampling run of a batch of prompts (DiTFastAttnV2, arXiv 2503.22796, section 3.3).

    Args:
        prompts: all in one batch, with the noise that `Pipeline.__call__` draws for `seed`. The arguments up to
            `max_sequence_length` are the pipeline's, and what the plan will be for.
        delta: budget of each layer at each step: relative squared errors of its heads' outputs add up to at most this.
            Larger plans are faster and coarser; the paper tries 0.2 to 1.0.
        c: a head's share of the budget: its error stays below `c * delta / heads`. None: no bound.
        windows: arrows to try, as fractions 1/f of the visual tokens in width.
        cache: whether heads may reuse their output of the step before.
        attention_chunk: images (with guidance, halves of them) whose candidate outputs a layer holds at once.
        tiles: queries and keys of the tiles whose savings are weighed, by default a constant of the head_dim, so that a
            plan does not depend on the device.
        resume: a file that keeps what is found after every step, and is gone on from where it exists.

    Returns:
        The plan, with how it was found and its errors.

    Raises:
        ValueError: an argument out of range, or one that the pipeline refuses, or a file of another calibration.
        MemoryError: the outputs kept from step to step do not fit.
    """
    candidates = _candidates(windows, cache)
    named = {
        "prompt": prompts,
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        "max_sequence_length": max_sequence_length,
        "seed": seed,
    }
    heads = pipeline.config.num_attention_heads
    tiles = tiles or PLANNING_TILES.get(pipeline.config.attention_head_dim, (128, 128))
    _check(prompts, seed, delta, c, tiles)
    call = pipeline.prepare(**named)
    if negative_prompt is not None and call.request.scale is None:
        raise ValueError(f"{negative_prompt=:.100} has no effect: this model does not guide at {guidance_scale=}.")
    batch = len(call.inputs.text)
    if attention_chunk is not None and (attention_chunk < 1 or batch % attention_chunk):
        raise ValueError(f"{attention_chunk=} must divide the batch of {batch} (with guidance, twice the prompts).")
    setting = pipeline.setting_of(call)
    table = (FULL_METHOD, *candidates)
    choices = np.zeros((call.request.steps, len(setting.layers), heads), np.uint8)
    plan = Plan(setting=setting, methods=table, choices=choices)
    _tell_idle(candidates, setting, tiles)
    facts: dict[str, Any] = {
        "prompts_sha256": digest_of({"prompts": prompts, "negative_prompt": negative_prompt}),
        "num_prompts": len(prompts),
        "seed": seed,
        "guidance_scale": call.request.guidance_scale,
        "dtype": pipeline.dtype.name,
        "delta": delta,
        "c": c,
        "candidates": tuple(str(method) for method in candidates),
        "tiles": tiles,
        "versions": {"dfa2_jax": version("dfa2-jax"), "jax": jax.__version__},
    }
    told = facts | {"setting": setting.model_dump(mode="json"), "rounding": pipeline.rounding}
    found = Progress.read(resume, digest_of(told), plan)

    run, tokens, caches = pipeline.denoiser(call, found.plan(plan), skip=False)  # as the steps that found it
    tokens, caches = run(tokens, caches, 0, 1 + found.steps)  # the dense step, and those that an earlier run found
    transformer = pipeline.transformer
    step = partial(
        calibrate_step,
        transformer.graph,
        transformer.params,
        inputs=jax.device_put(call.inputs),
        budget=Budget.of(delta, c, heads),
        candidates=candidates,
        tiles=tiles,
        chunk=attention_chunk,
        rounding=pipeline.rounding,
    )
    todo = range(1 + found.steps, call.request.steps)
    for i in tqdm(todo, "calibrate", call.request.steps, initial=1 + found.steps, disable=not progress):
        tokens, caches, picks, errors = step(latents=tokens, caches=caches, i=i)
        found.add(np.asarray(picks), np.asarray(errors))
    plan = found.plan(plan)
    calibration = Calibration(
        **facts,
        predicted_density=Density(exact=plan.density(), tiles=plan.density(tiles)),
        errors=((0.0,) * len(setting.layers), *found.spent),
    )
    return replace(plan, calibration=calibration)


def _candidates(windows: tuple[int, ...], cache: bool) -> tuple[Method, ...]:
    if any(isinstance(f, bool) or not isinstance(f, int) or f < 1 for f in windows) or len({*windows}) < len(windows):
        raise ValueError(f"{windows=} must be different positive integers: 8 is an arrow of 1/8 of the visual tokens.")
    candidates = (*([CACHED_METHOD] if cache else []), *(Method.arrow(f) for f in windows))
    if not candidates:
        raise ValueError(f"{windows=} and {cache=} leave nothing to choose from.")
    return candidates


def _tell_idle(candidates: tuple[Method, ...], setting: Setting, tiles: tuple[int, int]) -> None:
    """Small images: where a tile holds more than a band, arrows save nothing."""
    saved = []
    for layer in setting.layers:
        windows = np.array([method.half_window(layer.num_visual) for method in candidates], np.int32)
        saved.append(saved_tiles(windows, layer.layout, tiles))
    if idle := [str(method) for method, *savings in zip(candidates, *saved, strict=True) if not any(savings)]:
        logger.warning(
            "%s save no tile of %s queries x %s keys in any layer (%s visual tokens) and are never chosen: "
            "give smaller tiles",
            ", ".join(idle), *tiles, setting.layers[0].num_visual,
        )  # fmt: skip


def _check(prompts: list[str], seed: int, delta: float, c: float | None, tiles: tuple[int, ...]) -> None:
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts={prompts!r:.100} must be a list of texts, one at least.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{seed=} must be an integer: all prompts are one batch.")
    for name, value in (("delta", delta), ("c", 1.0 if c is None else c)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise ValueError(f"{name}={value!r} must be a number, not negative.")
    if delta > MAX_DELTA:
        raise ValueError(f"{delta=} is above {MAX_DELTA}, where heads could be anything: the paper's are up to 1.")
    if not isinstance(tiles, tuple) or len(tiles) != 2 or any(not isinstance(size, int) or size < 1 for size in tiles):
        raise ValueError(f"{tiles=} must be two positive integers: queries and keys of a tile.")
