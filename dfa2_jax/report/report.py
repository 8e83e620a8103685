"""A quality report: what plans make against what dense sampling makes, next to mere rounding and to another seed.

Lines of the noise floor are dense too: the same sums in another order (another implementation of attention), and
another dtype. They say how much a change that nobody calls a loss moves each metric. Another seed says what no likeness
at all is worth. Networks, prompts and seeds are the same in all lines.

Blocks in 8 bits have lines of their own where they are asked for: dense, and by those plans that are of them.

Beside a plan of steps stand solvers in the plan's time: as many steps of Euler's, and of DPM++ 2M. All are also set
against the limit of many steps. A plan that imitates the dense run's error is worth less than one near the limit.
"""

import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dfa2_jax.calibration.attention_share import shares_of
from dfa2_jax.calibration.calibrate import planning_tiles
from dfa2_jax.io.extras import need
from dfa2_jax.io.names import natural, suggests_names
from dfa2_jax.io.videos import check_video
from dfa2_jax.options import ReportOptions, described
from dfa2_jax.pipeline.ahead import compile_decoder
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.canvas import import_matplotlib
from dfa2_jax.plan.method import PlanError
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import Setting
from dfa2_jax.report import metrics as quality
from dfa2_jax.report.attention_maps import watch, windows_of
from dfa2_jax.report.metrics import EQUAL_PSNR
from dfa2_jax.report.sampler import Sampler, Solvers, limit_steps
from dfa2_jax.report.table import Judges, Line, Report, Shot, by_precision
from dfa2_jax.weights.dtypes import as_precision

OTHER_SEED = 1000
"""Added to an image's seed for the ceiling."""

ROUNDS = 3
"""Timed at least, where there are fewer batches."""


class ReportTable:
    """The lines of a report, and the sampling that fills them: in the plans' dtype first, then in the others.

    plans: of the report's own dtype; those of `precisions` stand there.
    solvers: `Sampler.solvers`.
    exact: the dense images by batch, kept for the other dtypes: 13 MB each at 1024 px, 203 MB at 49 x 480 x 720.
    """

    def __init__(
        self, plans: Mapping[str, Plan], precisions: Mapping[str, Mapping[str, Plan]], judges: Judges,
        batches: list[list[Shot]], solvers: Solvers, dtype: str, quick: bool, progress: bool,
    ):  # fmt: skip
        self.steps = next(iter(plans.values())).setting.num_inference_steps
        self.judges, self.batches, self.quick, self.progress, self.done = judges, batches, quick, progress, 0
        other = "bfloat16" if dtype == "float32" else "float32"
        self.wide, self.narrow = (dtype, other) if dtype == "float32" else (other, dtype)
        self.dtype, self.other_dtype, self.exact = dtype, other, list[np.ndarray]()
        self.dense, self.ceiling = Line("dense", "dense"), Line("another seed", "ceiling", "dense")
        self.plans = [Line(name, "plan", "dense", plan) for name, plan in plans.items()]
        self.precisions = {
            precision: [Line(precision, "precision", "dense")]
            + [Line(name, "plan", "dense", plan) for name, plan in of_it.items()]
            for precision, of_it in precisions.items()
        }
        counts = sorted({len(plan.nodes) for plan in plans.values() if len(plan.nodes) < self.steps}, reverse=True)
        self.solvers = [] if quick else [
            Line(f"{count} steps of {title}", "solver", "dense", changes={"num_inference_steps": count} | other)
            for count in counts
            for title, other in solvers
        ]  # fmt: skip
        self.reordered = {name: Line(f"{name}, sums reordered", "floor", f"{name} dense") for name in (dtype, other)}
        self.rounded = Line(f"{self.narrow} against {self.wide}", "floor", f"{self.wide} dense")

    @property
    def lines(self) -> list[Line]:
        quantized = [line for lines in self.precisions.values() for line in lines]
        if self.quick:
            return [self.dense, *quantized, *self.plans]
        floor = self.reordered[self.wide], self.rounded, self.reordered[self.narrow]
        return [self.dense, *floor, *quantized, *self.plans, *self.solvers, self.ceiling]

    def fill(self, sampler: Sampler, call: Call) -> None:
        """The lines of a pipeline's dtype, compiled before the bar starts.

        Args:
            call: of the first batch.
        """
        own = sampler.pipeline.dtype.name == self.dtype
        with told("compiling", self.progress):
            call = compile_decoder(call)
            if call.options.vae_tiling:  # its own choice: those that follow are decoded alike
                sampler.arguments["vae_tiling"] = True
            (self.compile_own if own else self.compile_other)(sampler, call)
        total, off = len(self.batches) * len(self.lines), not self.progress
        with tqdm(desc="report", total=total, initial=self.done, disable=off) as bar:
            (self.own if own else self.other)(sampler, bar)
            self.done = bar.n

    def compile_own(self, sampler: Sampler, call: Call) -> None:
        shots = self.batches[0]
        for line in (self.dense, *self.plans, *self.solvers):
            sampler.compile(self.call_of(sampler, shots, call, line), line.plan)
        if self.solvers:
            sampler.compile(sampler.limit(shots, call))
        if not self.quick:
            with fitting(self.reordered[self.dtype]):
                sampler.compile(call, None, sampler.other_implementation)

    def compile_other(self, sampler: Sampler, call: Call) -> None:
        with fitting(self.rounded):
            sampler.compile(call)
        with fitting(self.reordered[self.other_dtype]):
            sampler.compile(call, None, sampler.other_implementation)

    @staticmethod
    def call_of(sampler: Sampler, shots: list[Shot], call: Call, line: Line) -> Call:
        """A line's, where the dense one's is `call`."""
        return sampler.prepare(shots, **sampler.without_plan(call) | line.changes) if line.changes else call

    def own(self, sampler: Sampler, bar: tqdm) -> None:
        """Dense and plans in turn, so that a busy machine slows both; the floor of this dtype; the ceiling."""
        calls: dict[int, Call] = {}
        for shots in self.batches:
            call = sampler.prepare(shots)
            many = sampler.limit(shots, call) if self.solvers else None
            limit = None if many is None else many.images(sampler.denoise(many)[0])[: len(shots)]
            exact = self._take(sampler, call, shots, self.dense, None, bar, limit=limit)
            assert exact is not None
            if not np.isfinite(exact).all():
                prompt = shots[0].prompt
                raise ValueError(f"Dense sampling of {prompt!r:.200} is not finite in {self.dtype}: try another dtype.")
            for line in (self.dense, *self.plans, *self.solvers):
                calls[id(line)] = self.call_of(sampler, shots, call, line)
                if line is not self.dense:
                    self._take(sampler, calls[id(line)], shots, line, exact, bar, limit=limit)
            if not self.quick or self.precisions:
                self.exact.append(exact)
            if not self.quick:
                self._reorder(sampler, call, shots, self.reordered[self.dtype], exact, bar)
                self._take(sampler, sampler.prepare(shots, OTHER_SEED), shots, self.ceiling, exact, bar)
        for _ in range(len(self.batches), ROUNDS):
            for line in (self.dense, *self.plans, *self.solvers):
                line.seconds.append(sampler.denoise(calls[id(line)], line.plan)[1] / self.steps)

    def other(self, sampler: Sampler, bar: tqdm) -> None:
        for shots, exact in zip(self.batches, self.exact, strict=True):
            call = sampler.prepare(shots)
            images = self._take(sampler, call, shots, self.rounded, exact, bar)
            if images is not None:
                self._reorder(sampler, call, shots, self.reordered[self.other_dtype], images, bar)

    def fill_precision(self, sampler: Sampler, precision: str) -> None:
        """The lines of blocks in 8 bits; as many rounds as the dense line has, one after the other."""
        lines, steps = self.precisions[precision], self.steps
        calls = [sampler.prepare(shots) for shots in self.batches]
        for line in lines:
            if line.plan is not None:
                _check_plans({line.name: line.plan}, calls[0].setting)
        with told(f"compiling {precision}", self.progress):
            for line in lines:
                sampler.compile(calls[0], line.plan)
        total, off = len(self.batches) * len(self.lines), not self.progress
        with tqdm(desc="report", total=total, initial=self.done, disable=off) as bar:
            for shots, call, exact in zip(self.batches, calls, self.exact, strict=True):
                for line in lines:
                    self._take(sampler, call, shots, line, exact, bar)
            self.done = bar.n
        for line in lines:
            for _ in range(len(line.seconds), len(self.dense.seconds)):
                line.seconds.append(sampler.denoise(calls[0], line.plan)[1] / steps)

    def _take(
        self, sampler: Sampler, call: Call, shots: list[Shot], line: Line, exact: np.ndarray | None, bar: tqdm,
        implementation: str | None = None, limit: np.ndarray | None = None,
    ) -> np.ndarray | None:  # fmt: skip
        """A batch's images, scored in their line; None where a line of the floor does not fit in memory.

        Args:
            limit: images of many steps, to be compared with, too.
        """
        if line.left_out:
            return None
        with fitting(line):
            tokens, seconds = sampler.denoise(call, line.plan, implementation)
            images = call.images(tokens)[: len(shots)]
            if line.kind in ("dense", "plan", "precision", "solver"):
                line.seconds.append(seconds / self.steps)
            if exact is not None and line is self.rounded and self.dtype == self.narrow:
                line.add(self.judges, shots, exact, images)  # the narrow one's, against the wide one's
            else:
                line.add(self.judges, shots, images, exact, limit)
            bar.update()
            return images

    def _reorder(self, sampler: Sampler, call: Call, shots: list[Shot], line: Line, exact: Any, bar: tqdm) -> None:
        self._take(sampler, call, shots, line, exact, bar, sampler.other_implementation)


@contextmanager
def fitting(*lines: Line) -> Iterator[None]:
    """Lines of the floor that do not fit in memory are left out, and say so; for others the report ends."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
        if not exhausted or any(line.kind != "floor" for line in lines):
            raise
        for line in lines:
            line.left_out = f"does not fit in memory: {error!s:.200}"


@suggests_names
@described(ReportOptions)
def quality_report(
    folder: str | PathLike[str],
    plans: Mapping[str, Plan],
    prompts: Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    negative_prompt: str | None = None,
    guidance_scale: float | None = None,
    batch: int = 1,
    dtype: str | None = None,
    limits: Mapping[str, float] | None = None,
    lpips: str | PathLike[str] | None = None,
    clip: str | PathLike[str] | None = None,
    image_reward: str | PathLike[str] | None = None,
    precisions: Sequence[str] = (),
    quick: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> Report:
    """Measure plans against dense sampling, videos by frame. `Report.save` writes it, `Report.failures` is the gate.

    Args:
        folder: of the model, as `Pipeline.from_pretrained` takes it. It is loaded in two dtypes, and in each precision.
        plans: by the names that the report gives them, all for the same size and steps. One at least is for `dtype`.
        limits: of a plan's mean: at least so much "psnr" (dB) and "ssim", at most so much "lpips".
        {options}

    Raises:
        ValueError: an argument is out of range, a metric cannot be had, or a dense image is not finite. Videos need a
            Pillow with WebP.
        PlanError: a plan is for another model, size or number of steps.
        MemoryError: what a plan keeps from step to step does not fit.
    """
    seed, batch, guidance_scale = natural(seed), natural(batch), natural(guidance_scale)
    prompts, seeds = list(prompts), [seed] if isinstance(seed, int) else list(seed)
    limits = {} if limits is None else dict(limits)
    _check(prompts, seeds, batch, plans, limits, lpips)
    own, others = by_precision(plans, list(precisions), as_precision(dtype))
    judges = _judges(lpips, clip, image_reward)
    shots = [Shot(prompt, number) for prompt in prompts for number in seeds]
    batch = min(batch, len(shots))
    batches = [shots[i : i + batch] for i in range(0, len(shots), batch)]
    arguments = dict(negative_prompt=negative_prompt, guidance_scale=guidance_scale, plan=next(iter(own.values())))
    opened = partial(Sampler.open, folder, batch=batch, progress=progress, verify=verify)
    sampler = opened(arguments, dtype=dtype)
    with told("encoding", progress):
        first = replace(sampler, batch=1).prepare(shots[:1])
        _check_plans(own, first.setting)
        call = sampler.prepare(batches[0])
    if call.request.fps is not None:
        check_video("webp", call.request.fps, (call.request.height, call.request.width))
    facts = _facts(sampler, folder, first) | {"negative_prompt": negative_prompt}
    table = ReportTable(own, others, judges, batches, sampler.solvers, sampler.pipeline.dtype.name, quick, progress)
    facts["limit_steps"] = limit_steps(table.steps) if table.solvers else None
    table.fill(sampler, call)
    masses = None if quick else watch(first, windows_of([*plans.values()]), progress=progress)
    same = arguments | sampler.without_plan(call) | {"num_inference_steps": table.steps}
    del sampler, first, call  # two sets of weights need not fit
    _fill_others(table, opened, arguments, same)
    return Report(tuple(table.lines), tuple(prompts), tuple(seeds), limits, masses, facts)


def _fill_others(
    table: ReportTable, opened: Callable[..., Sampler], arguments: dict[str, Any], same: dict[str, Any]
) -> None:
    """The lines of other dtypes than the plans', each with weights of its own.

    Args:
        opened: `Sampler.open`, of arguments and a dtype.
        same: arguments that say all that the first plan says, for precisions that may have none.
    """
    for precision in table.precisions:
        table.fill_precision(opened(same, dtype=precision), precision)
    if table.quick:
        return
    with fitting(table.rounded, table.reordered[table.other_dtype]):
        sampler = opened(arguments, dtype=table.other_dtype)
        with told("encoding", table.progress):
            call = sampler.prepare(table.batches[0])
        table.fill(sampler, call)


RANGES = {"psnr": (0.0, EQUAL_PSNR), "ssim": (-1.0, 1.0), "lpips": (0.0, math.inf)}
"""What a metric can be: any other limit is met by all images, or by none."""


def _check(
    prompts: list[str], seeds: list[int], batch: int, plans: Mapping[str, Plan], limits: dict[str, float], lpips: Any
) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be texts, one at least, got {prompts!r:.200}.")
    if not seeds or len({*seeds}) < len(seeds):
        raise ValueError(f"seeds={seeds} must be different ones, one at least.")
    if batch < 1:
        raise ValueError(f"{batch=} must be at least 1.")
    if not plans:
        raise ValueError("A report needs a plan at least.")
    for metric, limit in limits.items():
        if metric not in RANGES or not math.isfinite(limit):
            raise ValueError(f"limits has {metric}={limit}: limits are finite, of {', '.join(RANGES)}.")
        least, most = RANGES[metric]
        if not least <= limit <= most:
            raise ValueError(f"limits has {metric}={limit}, but {metric} is {least:g} to {most:g}.")
    if "lpips" in limits and lpips is None:
        raise ValueError(f"A limit of {limits['lpips']} on LPIPS needs the metric's weights: give lpips too.")


def _check_plans(plans: Mapping[str, Plan], setting: Setting) -> None:
    for name, plan in plans.items():
        try:
            plan.check(setting)
        except PlanError as error:
            raise PlanError(f"plan {name}: {error}") from error


def _judges(lpips: Any, clip: Any, image_reward: Any) -> Judges:
    import_matplotlib("A report", "report")
    need("skimage.metrics", "A report", "report")
    near: dict[str, Any] = {"psnr": quality.psnr, "ssim": quality.ssim}
    if lpips is not None:
        near["lpips"] = quality.lpips(Path(lpips))
    if image_reward is not None:
        quality.image_reward(Path(image_reward))
    return Judges(near, {} if clip is None else {"clip": quality.clip_score(Path(clip))})


def _facts(sampler: Sampler, folder: str | PathLike[str], call: Call) -> dict[str, Any]:
    pipeline, request, device = sampler.pipeline, call.request, jax.devices()[0]
    video = {} if request.num_frames is None else {
        "num_frames": request.num_frames, "fps": request.fps, "use_dynamic_cfg": call.options.use_dynamic_cfg,
    }  # fmt: skip
    return {
        "format": "dfa2-report",
        "version": 1,
        "model": {
            "folder": Path(folder).resolve().name,
            "pipeline": pipeline.pipeline_class,
            "fingerprint": pipeline.fingerprint,
            "dtype": pipeline.dtype.name,
            "precision": pipeline.precision,
        },
        "machine": {
            "device": f"{device.device_kind} ({device.platform})",
            "processor": processor(),
            "cores": cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: version(name) for name in ("dfa2-jax", "jax", "jaxlib", "flax", "numpy", "scikit-image")},
        "arguments": {
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.steps,
            "guidance_scale": float(request.guidance_scale),
            "max_sequence_length": request.length,
            "batch": sampler.batch,
        }
        | video,
        "attention_share": shares_of(call).attention,
        "tiles": list(planning_tiles(pipeline.config.attention_head_dim)),
    }


def processor() -> str:
    """The CPU's name: times mean little without it."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return named[1] if named else platform.processor()
