"""From prompts to a plan: the sampling loop with another attention, which tries every method on every head.

At each step after the first and in each layer, one pass gives every head's output under every candidate. Errors are
reduced per head, the choice is made in the same program, and the chosen outputs go on. So later layers and steps see
the compression that they will meet (DiTFastAttnV2, arXiv 2503.22796, section 3.3).
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from os import PathLike
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dfa2_jax.calibration.asked import asked, digest_of_all, facts_of, prepared
from dfa2_jax.calibration.attends import Budget
from dfa2_jax.calibration.attention_share import StepShares, shares_of
from dfa2_jax.calibration.candidates import candidates_of, check_tiles, check_windows, warn_idle
from dfa2_jax.calibration.heads import HeadRuns
from dfa2_jax.calibration.joint import WORTHWHILE, JointPlans
from dfa2_jax.calibration.journal import Journal
from dfa2_jax.calibration.resume import Checkpointed
from dfa2_jax.calibration.search import MAX_DELTA
from dfa2_jax.calibration.steps import StepPlans, StepRuns, check_solver
from dfa2_jax.calibration.trial_step import calibrate_step, planning_tiles
from dfa2_jax.io.names import natural, suggests_names
from dfa2_jax.nn.attention import by_stack, in_order
from dfa2_jax.nn.orders import native_memory
from dfa2_jax.options import CALL, CALL_FIELDS, CalibrationOptions, described
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.method import CACHED_METHOD, FULL_METHOD, Method
from dfa2_jax.plan.orders import lies
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import CalibrationRecord, Density
from dfa2_jax.plan.steps import check_budget, count_for
from dfa2_jax.sampling.loop import State

logger = logging.getLogger("dfa2_jax")

PAPER_ALONE = ("c", "cache")
"""Options of `delta`."""

AS_GIVEN = ("prompts", "image", "mask_image")
"""Arguments that may be large, and stay what they are."""

HEADS = ("windows", "orders", "attention_chunk", "tiles", "attention_share")
"""Options that say what heads may do."""


@suggests_names
@described(CALL_FIELDS, CalibrationOptions)
def calibrate(
    pipeline: Pipeline,
    prompts: list[str],
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    scheduler: str | Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    use_dynamic_cfg: bool = False,
    true_cfg_scale: float = 1.0,
    max_sequence_length: int | None = None,
    image: Any = None,
    mask_image: Any = None,
    speedup: float | None = None,
    psnr: float | None = None,
    target: str = "dense",
    heads: str = "auto",
    attention_share: float | None = None,
    delta: float | None = None,
    c: float | None = 1.5,
    windows: tuple[int, ...] = (8, 16, 32),
    orders: tuple[str, ...] | None = None,
    cache: bool = True,
    seed: int = 0,
    attention_chunk: int | None = None,
    tiles: tuple[int, int] | None = None,
    progress: bool = True,
    resume: str | PathLike[str] | None = None,
) -> Plan:
    """Find a plan for one budget: `speedup`, `psnr` or `delta`; without any, `speedup=2`.

    `speedup` and `psnr` choose the steps that run the network (`calibration.steps`), at the cost of three and of four
    dense runs. Where attention is much of a step, they choose what heads do, too (`calibration.heads`). That costs a
    dense run more, four forwards a layer, and up to four runs of plans. FLUX.1-dev takes 12 to 18 dense runs then.
    `delta` chooses what heads do at every step, in one run (DiTFastAttnV2, arXiv 2503.22796, section 3.3). A plan with
    heads is for calls of this size, text length, steps and kind of guidance. Others serve other sizes, too.

    Args:
        pipeline: whose steps or heads are tried.
        prompts: all in one batch, with the noise that a call of the pipeline draws for `seed`.
        {options}

    Returns:
        The plan, with how it was found and its errors.

    Raises:
        ValueError: an argument out of range, or one that the pipeline refuses, or a file of another calibration.
        MemoryError: the outputs kept from step to step do not fit.
    """
    given = {name: value if name in AS_GIVEN else natural(value) for name, value in locals().items()}
    options = CalibrationOptions(**{argument.name: given[argument.name] for argument in fields(CalibrationOptions)})
    _check_whole(pipeline, options)
    if options.delta is None:
        return _of_steps(pipeline, prompts, options, {name: given[name] for name in CALL})
    _check_paper(options)
    return CalibrationRun.begin(pipeline, prompts, options, {name: given[name] for name in CALL}).run()


def _check_paper(options: CalibrationOptions) -> None:
    """Raises ValueError where options are of another budget than delta."""
    if options.speedup is not None or options.psnr is not None:
        raise ValueError(f"speedup={options.speedup}, psnr={options.psnr} and delta={options.delta}: pass one of them.")
    for name in ("target", "heads", "attention_share"):
        if (value := getattr(options, name)) != getattr(CalibrationOptions, name):
            raise ValueError(f"{name}={value!r} is beside speedup= or psnr=, and delta= is the paper's: leave it out.")


def _of_steps(pipeline: Pipeline, prompts: list[str], options: CalibrationOptions, arguments: dict[str, Any]) -> Plan:
    """A plan of steps, and of heads where they pay."""
    budget = {"speedup": options.speedup, "psnr": options.psnr}
    if budget == {"speedup": None, "psnr": None}:
        budget["speedup"] = 2.0
    check_budget(**budget)
    _check_joint(options)
    _check_prompts(prompts, options.seed)
    if budget["speedup"] is not None and options.heads != "only":
        with _default_named(options):
            count_for(budget["speedup"], pipeline.request(asked(prompts, options, arguments)).steps)
    call = prepared(pipeline, prompts, options, arguments)
    check_solver(call, options.target)
    pipeline.check_vae()
    facts, heads = facts_of(prompts, call), _head_runs(options, call)
    if options.heads == "only" and heads is not None:
        with _default_named(options):
            heads.check_speedup(budget["speedup"])
    journal = Journal(options.resume, digest_of_all(call, facts))
    try:
        runs = StepRuns(call, journal, options.progress, *([] if heads is None else [heads.compile]))
        steps = StepPlans.measured(runs, facts | {"target": options.target})
        plan = None if options.heads == "only" else steps.for_budget(**budget)
        if heads is not None:
            plan = JointPlans(steps, heads, heads.tables(runs)).for_budget(plan, **budget)
        runs.bar.close()
    finally:
        journal.close()
    assert plan is not None and plan.step_calibration is not None
    plan.step_calibration.warn_if_low()
    return plan


@contextmanager
def _default_named(options: CalibrationOptions) -> Iterator[None]:
    """Says of a refused budget that nobody gave it, if so."""
    try:
        yield
    except ValueError as error:
        if options.speedup is not None:
            raise
        raise ValueError(f"{error} No budget was given, and speedup=2 is the default: pass one.") from error


def _check_whole(pipeline: Pipeline, options: CalibrationOptions) -> None:
    """Raises ValueError where heads would be measured by devices that have shares of the weights."""
    if pipeline.shard_weights and (options.delta is not None or options.heads != "full"):
        raise ValueError("heads are measured with whole weights: pass heads='full', or open without shard_weights.")


def _head_runs(options: CalibrationOptions, call: Call) -> HeadRuns | None:
    """What measures heads; None where steps alone are planned."""
    if options.heads == "full":
        return None
    tiles = planning_tiles(call.pipeline.config.attention_head_dim) if options.tiles is None else options.tiles
    candidates = candidates_of(options, call.grid.frames, call.shares_tokens)
    check_tiles(tiles)
    _check_chunk(options.attention_chunk, call)
    if options.heads == "only" and call.request.steps == 1:
        raise ValueError("heads='only' needs two steps at least: heads reuse what an earlier step computed.")
    shares = shares_of(call)
    if options.attention_share is not None:  # what is left is divided as counted
        left = (1 - options.attention_share) / (1 - shares.attention)
        shares = StepShares(options.attention_share, left * shares.projections)
    if options.heads == "auto" and (shares.attention < WORTHWHILE or call.request.steps == 1):
        _warn_unused(options, shares.attention)
        return None
    warn_idle(candidates, call.setting, tiles)
    arrows = tuple(method for method in candidates if method != CACHED_METHOD)
    runs = HeadRuns(call.over_batch(), arrows, shares, tiles, options.attention_chunk)
    runs.check_memory()
    return runs


def _warn_unused(options: CalibrationOptions, share: float) -> None:
    changed = [name for name in HEADS if getattr(options, name) != getattr(CalibrationOptions, name)]
    if unused := [name for name in changed if name != "attention_share"]:
        given = ", as attention_share says" if "attention_share" in changed else ""
        logger.warning(
            "heads are not planned, so %s are of no effect: attention takes %.2f of a step%s; they pay from %.1f on",
            ", ".join(unused), share, given, WORTHWHILE,
        )  # fmt: skip


def _check_joint(options: CalibrationOptions) -> None:
    """Raises ValueError where options contradict each other."""
    for name in PAPER_ALONE:
        if (value := getattr(options, name)) != getattr(CalibrationOptions, name):
            raise ValueError(f"{name}={value!r} is of delta=, and without it errors are weighed: leave it out.")
    if options.heads not in ("auto", "only", "full"):
        raise ValueError(f"heads={options.heads!r} is none of 'auto', 'only' and 'full'.")
    for name in HEADS:
        value = getattr(options, name)
        if options.heads == "full" and value != getattr(CalibrationOptions, name):
            raise ValueError(f"{name}={value!r} is of heads, and heads='full' spares none: leave it out.")
    share = options.attention_share
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1):
        raise ValueError(f"attention_share={share!r} must be a number from 0 to 1.")
    if options.target not in ("dense", "converged"):
        raise ValueError(f"target={options.target!r} is neither 'dense' nor 'converged'.")


@dataclass(frozen=True)
class CalibrationRun:
    """One calibration: the call that it samples, what it tries, and the plan that it fills.

    empty: the plan with every head in full.
    """

    pipeline: Pipeline
    prompts: list[str]
    options: CalibrationOptions
    call: Call
    candidates: tuple[Method, ...]
    tiles: tuple[int, int]
    empty: Plan

    @classmethod
    def begin(
        cls, pipeline: Pipeline, prompts: list[str], options: CalibrationOptions, arguments: dict[str, Any]
    ) -> "CalibrationRun":
        """Check every argument, and encode the prompts."""
        check_windows(options.windows)
        tiles = planning_tiles(pipeline.config.attention_head_dim) if options.tiles is None else options.tiles
        _check_prompts(prompts, options.seed)
        _check_heads(options)
        check_tiles(tiles)
        call = prepared(pipeline, prompts, options, arguments)
        candidates = candidates_of(options, call.grid.frames, call.shares_tokens)
        call = call.over_batch()
        _check_chunk(options.attention_chunk, call)
        shape = call.request.steps, len(call.layers), pipeline.config.num_attention_heads
        empty = Plan(setting=call.setting, methods=(FULL_METHOD, *candidates), choices=np.zeros(shape, np.uint8))
        warn_idle(candidates, call.setting, tiles)
        return cls(pipeline, prompts, options, call, candidates, tiles, empty)

    def run(self) -> Plan:
        """The plan, by what an earlier run found and the steps that it did not reach."""
        checkpointed = Checkpointed.read(self.options.resume, self.digest, self.empty)
        self.search(checkpointed)
        return self.finished(checkpointed)

    @property
    def facts(self) -> dict[str, Any]:
        """How the plan is found, as its file says it."""
        return facts_of(self.prompts, self.call) | {
            "delta": self.options.delta,
            "c": self.options.c,
            "candidates": tuple(str(method) for method in self.candidates),
            "tiles": self.tiles,
        }

    @property
    def digest(self) -> str:
        """The digest of all that the findings depend on."""
        return digest_of_all(self.call, self.facts)

    @jax.enable_x64(False)  # a program of 32 bits, whatever the user's setting is
    def search(self, checkpointed: Checkpointed) -> None:
        """Every step that an earlier run did not finish."""
        done, steps, transformer = 1 + checkpointed.steps, self.call.request.steps, self.pipeline.transformer
        # The dense step and those of an earlier run, with the sums of the steps that found them.
        run, state = self.call.program(checkpointed.filled(self.empty), skip_projections=False)
        assert self.options.delta is not None
        step = partial(
            calibrate_step,
            transformer.graph,
            self.call.params,
            inputs=self.call.put(self.call.inputs),
            budget=Budget.of(self.options.delta, self.options.c, self.pipeline.config.num_attention_heads),
            candidates=self.candidates,
            tiles=self.tiles,
            chunk=self.options.attention_chunk,
            rounding=self.pipeline.rounding,
            mesh=self.call.mesh,
            frames=self.call.grid.frames,
        )
        with told("compiling", self.options.progress):
            state = run(state, 0, 0)
            step.func.lower(*step.args, **step.keywords, state=state, i=done).compile()
        state = self.native(run(state, 0, done), checkpointed, done - 1)
        for i in tqdm(range(done, steps), "calibrate", steps, initial=done, disable=not self.options.progress):
            state, chosen = step(state=self.call.with_noise(state, i), i=i)
            picks, errors = ({stack: pair[n] for stack, pair in chosen.items()} for n in (0, 1))
            checkpointed.add(in_order(self.call.layers, picks), in_order(self.call.layers, errors))

    def native(self, state: State, checkpointed: Checkpointed, last: int) -> State:
        """The state after step `last` of an earlier run, with outputs in the native order, as candidates have them."""
        order = lies(checkpointed.filled(self.empty))[last]
        if not order.any():
            return state
        layouts = {layer.stack: layer.layout for layer in self.call.layers}
        memory = {
            stack: native_memory(x, by_stack(self.call.layers, order)[stack], layouts[stack], self.call.grid.frames)
            for stack, x in state.memory.items()
        }
        return replace(state, memory=memory)

    def finished(self, checkpointed: Checkpointed) -> Plan:
        plan = checkpointed.filled(self.empty)
        record = CalibrationRecord(
            **self.facts,
            predicted_density=Density(exact=plan.density(), tiles=plan.density(self.tiles)),
            errors=((0.0,) * len(self.call.layers), *checkpointed.spent),
        )
        return replace(plan, calibration=record)


def _check_chunk(chunk: int | None, call: Call) -> None:
    if chunk is not None and (type(chunk) is not int or chunk < 1 or call.batch % chunk):
        raise ValueError(
            f"attention_chunk={chunk} must divide the batch of {call.batch} (with guidance, twice the prompts)."
        )


def _check_prompts(prompts: list[str], seed: int) -> None:
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompts={prompts!r:.100} must be a list of texts, one at least.")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{seed=} must be an integer: all prompts are one batch.")


def _check_heads(options: CalibrationOptions) -> None:
    delta = options.delta
    for name, value in (("delta", delta), ("c", 1.0 if options.c is None else options.c)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
            raise ValueError(f"{name}={value!r} must be a number, not negative.")
    assert delta is not None
    if delta > MAX_DELTA:
        raise ValueError(f"{delta=} is above {MAX_DELTA}, where heads could be anything: the paper's are up to 1.")
