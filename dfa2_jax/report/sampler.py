"""A report's images or videos, in batches of one size, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from time import perf_counter
from typing import Any

import jax
import numpy as np

from dfa2_jax.calibration.steps import REFINED
from dfa2_jax.nn.attention import dense_implementation
from dfa2_jax.options import Options
from dfa2_jax.pipeline.call import Call
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.pipeline.request import MAX_STEPS
from dfa2_jax.pipeline.timing import told
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.steps import adams_coefficients
from dfa2_jax.report.table import Shot
from dfa2_jax.sampling.solvers.base import Multistep
from dfa2_jax.sampling.solvers.schedulers import DPM, VP_DDIM

Solvers = tuple[tuple[str, dict[str, Any]], ...]
"""Titles, and the changes to a call."""


@dataclass
class Sampler:
    """A pipeline's images or videos in batches of one size, and the seconds of a step that they take.

    arguments: of the pipeline, the same for all; a plan among them says size and steps.
    """

    pipeline: Pipeline
    arguments: dict[str, Any]
    batch: int
    compiled: set[Any] = field(default_factory=set)

    @classmethod
    def open(
        cls, folder: str | PathLike[str], arguments: dict[str, Any], batch: int, progress: bool, **options: Any
    ) -> "Sampler":
        """A sampler of `Pipeline.from_pretrained` with these options."""
        with told("loading", progress):
            pipeline = Pipeline.from_pretrained(folder, **options)
        return cls(pipeline, arguments, batch)

    def prepare(self, shots: Sequence[Shot], offset: int = 0, **changes: Any) -> Call:
        """A call of `batch` images or videos; the last prompt fills up: another size would compile anew.

        Args:
            offset: added to the seeds.
            changes: to the arguments.
        """
        filled = [*shots, *[shots[-1]] * (self.batch - len(shots))]
        prompts, seeds = [shot.prompt for shot in filled], [shot.seed + offset for shot in filled]
        shown = {"output_type": "np", "progress": False}  # the report has a bar of its own
        return self.pipeline.prepare(Options(prompt=prompts, seed=seeds, **shown, **self.arguments | changes))

    def without_plan(self, call: Call) -> dict[str, Any]:
        """Changes that leave a call as the plan has made it, but for the plan."""
        request, options = call.request, call.options
        names = "height", "width", "num_frames", "guidance_scale", "scheduler"
        said = {name: getattr(request, name) for name in names}
        return said | {
            "plan": None,
            "max_sequence_length": request.length,
            "use_dynamic_cfg": options.use_dynamic_cfg,
            "true_cfg_scale": options.true_cfg_scale,
        }

    @property
    def solvers(self) -> Solvers:
        """Those that stand beside a plan of steps, and what they change of a dense call.

        CogVideoX's DPM++ 2M draws noise at each step: its videos come near to none of another solver.
        """
        if VP_DDIM in self.pipeline.family.scheduler_classes:
            return (("DDIM", {}),)
        return ("Euler's", {}), ("DPM++ 2M", {"scheduler": DPM})

    def limit(self, shots: Sequence[Shot], call: Call) -> Call:
        """The call of many steps, whose images or videos stand for the limit."""
        many = self.prepare(shots, **self.without_plan(call), num_inference_steps=limit_steps(call.request.steps))
        solver, sigmas = many.inputs.solver, np.asarray(many.schedule.sigmas)
        assert isinstance(solver, Multistep), solver  # no other has plans of steps
        second = solver.planned(sigmas, adams_coefficients(sigmas))
        return replace(many, inputs=replace(many.inputs, solver=second))

    def compile(self, call: Call, plan: Plan | None = None, implementation: str | None = None) -> None:
        """What `denoise` runs, unless that is done. It runs a step: GPUs load kernels when these first run."""
        shapes = jax.tree.structure(call.inputs), *map(np.shape, jax.tree.leaves(call.inputs))
        program = Call.remembers(plan), implementation, shapes
        if program not in self.compiled:  # one step is a call of the same program as all steps
            run, state = call.program(plan, implementation=implementation)
            jax.block_until_ready(run(state, 0, 1))
            self.compiled.add(program)

    def denoise(
        self, call: Call, plan: Plan | None = None, implementation: str | None = None
    ) -> tuple[np.ndarray, float]:
        """Patchified latents, and seconds, compilation apart."""
        self.compile(call, plan, implementation)
        run, state = call.program(plan, implementation=implementation)
        started = perf_counter()
        state = jax.block_until_ready(run(state, 0, call.num_steps(plan)))
        return np.asarray(state.latents), perf_counter() - started

    @property
    def other_implementation(self) -> str:
        """Another one of dense attention than the best: the same sums in another order."""
        config = self.pipeline.config
        best = dense_implementation(self.pipeline.dtype, config.attention_head_dim).implementation
        return {"mosaic": "cudnn", "cudnn": "blockwise"}.get(best, "reference")


def limit_steps(steps: int) -> int:
    """Steps of the run that stands for the limit, of second order, as a calibration's."""
    return min(REFINED * steps, MAX_STEPS)
