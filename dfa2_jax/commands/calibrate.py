"""`dfa2 calibrate`: prompts to a plan."""

import argparse
from typing import Any

from dfa2_jax.calibration.calibrate import calibrate
from dfa2_jax.commands.flags import given
from dfa2_jax.commands.plans import check_plan_out
from dfa2_jax.commands.start import open_pipeline, read_prompts, start
from dfa2_jax.demo.box import warn_unseen
from dfa2_jax.io.atomic import alone, replaceable
from dfa2_jax.io.terminal import print_path
from dfa2_jax.options import CALL, CalibrationOptions, Options
from dfa2_jax.pipeline.timing import told


def run(args: argparse.Namespace) -> int:
    """Progress is kept beside the plan: the same command goes on after an interruption."""
    start()
    prompts = read_prompts(args.prompts)
    check_plan_out(args.out)
    resume = args.out.with_name(f"{args.out.name}.progress")
    replaceable(resume)
    with told("loading", not args.quiet):
        pipeline = open_pipeline(args)
    warn_unseen(pipeline.fingerprint, [*prompts, args.negative_prompt])
    options: dict[str, Any] = given(args, Options, CALL) | given(args, CalibrationOptions) | {"c": args.c or None}
    with alone(args.out):  # two processes would write one file of progress
        plan = calibrate(pipeline, prompts, **options, progress=not args.quiet, resume=resume)
        plan.save(args.out)
        resume.unlink(missing_ok=True)
    print_path(args.out)
    return 0
