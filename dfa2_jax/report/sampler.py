"""A report's images, in batches of one size, and how long they take."""

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
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep


@dataclass
class Sampler:
    """A pipeline's images in batches of one size, and the seconds of a step that they take.

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
        """A sampler of `Pipeline.from_pretrained` with these options.

        Raises:
            ValueError: the model makes videos.
        """
        with told("loading", progress):
            pipeline = Pipeline.from_pretrained(folder, **options)
        if pipeline.sizes.num_frames is not None:
            raise ValueError(f"{folder} makes videos ({pipeline.pipeline_class}): reports compare images alone.")
        return cls(pipeline, arguments, batch)

    def prepare(self, shots: Sequence[Shot], offset: int = 0, **changes: Any) -> Call:
        """A call of `batch` images; the last prompt fills up: another size would compile anew.

        Args:
            offset: added to the seeds.
            changes: to the arguments.
        """
        filled = [*shots, *[shots[-1]] * (self.batch - len(shots))]
        prompts, seeds = [shot.prompt for shot in filled], [shot.seed + offset for shot in filled]
        return self.pipeline.prepare(Options(prompt=prompts, seed=seeds, output_type="np", **self.arguments | changes))

    def without_plan(self, call: Call) -> dict[str, Any]:
        """Changes that leave a call as the plan has made it, but for the plan."""
        request = call.request
        said = {name: getattr(request, name) for name in ("height", "width", "guidance_scale", "scheduler")}
        return said | {"plan": None, "max_sequence_length": request.length}

    def limit(self, shots: Sequence[Shot], call: Call) -> Call:
        """The call of many steps, whose images stand for the limit."""
        many = self.prepare(shots, **self.without_plan(call), num_inference_steps=limit_steps(call.request.steps))
        solver = FlowMultistep.of(adams_coefficients(many.schedule.sigmas))
        return replace(many, inputs=replace(many.inputs, solver=solver))

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
