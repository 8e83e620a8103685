"""`dfa2 calibrate`: prompts to a plan."""

import argparse
from contextlib import nullcontext
from typing import Any

import jax

from dfa2_jax.calibration.calibrate import calibrate
from dfa2_jax.commands.flags import given
from dfa2_jax.commands.plans import check_plan_out
from dfa2_jax.commands.start import open_pipeline, read_prompts, start, together
from dfa2_jax.demo.box import warn_unseen
from dfa2_jax.io.atomic import alone, replaceable
from dfa2_jax.io.terminal import print_path
from dfa2_jax.options import CALL, CalibrationOptions, Options
from dfa2_jax.parallel.processes import is_first, progress_of_first
from dfa2_jax.pipeline.timing import told


@together
def run(args: argparse.Namespace) -> int:
    """Progress is kept beside the plan: the same command goes on after an interruption."""
    start(args)
    if jax.process_count() > 1 and (args.delta is not None or args.heads != "full"):
        raise ValueError("heads are measured by one process, and several were started: pass --heads full, no --delta.")
    prompts = read_prompts(args.prompts)
    resume = args.out.with_name(f"{args.out.name}.progress")
    if is_first():
        check_plan_out(args.out)
        replaceable(resume)
    with told("loading", not args.quiet):
        pipeline = open_pipeline(args)
    warn_unseen(pipeline.fingerprint, [*prompts, args.negative_prompt])
    options: dict[str, Any] = given(args, Options, CALL) | given(args, CalibrationOptions) | {"c": args.c or None}
    with alone(args.out) if is_first() else nullcontext():  # two calibrations would write one file of progress
        with progress_of_first(resume) as progress:
            plan = calibrate(pipeline, prompts, **options, progress=not args.quiet, resume=progress)
        if is_first():
            plan.save(args.out)
            resume.unlink(missing_ok=True)
    print_path(args.out)
    return 0
