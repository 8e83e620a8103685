"""`dfa2 report`: what plans do to images or videos, with a verdict in words first."""

import argparse
import sys

from dfa2_jax.commands.flags import given
from dfa2_jax.commands.start import read_prompts, start
from dfa2_jax.demo.box import warn_unseen
from dfa2_jax.io.atomic import writable
from dfa2_jax.io.terminal import print_path
from dfa2_jax.options import ReportOptions
from dfa2_jax.plan.plan import Plan
from dfa2_jax.report.report import quality_report
from dfa2_jax.report.table import Line, Report


def run(args: argparse.Namespace) -> int:
    start()
    prompts, names = read_prompts(args.prompts), [path.stem for path in args.plan]
    if len({*names}) < len(names):  # plans of one name in different folders
        names = [str(path) for path in args.plan]
    plans = {name: Plan.load(path) for name, path in zip(names, args.plan, strict=True)}
    if len(plans) < len(names):
        raise ValueError(f"--plan {max(names, key=names.count)} is there twice.")
    writable(args.out)
    limits = {"lpips": args.max_lpips, "ssim": args.min_ssim, "psnr": args.min_psnr}
    limits = {metric: limit for metric, limit in limits.items() if limit is not None}
    options = given(args, ReportOptions)
    warn_unseen(next(iter(plans.values())).setting.weights, [*prompts, args.negative_prompt])
    report = quality_report(
        args.folder, plans, prompts, **options, limits=limits, verify=args.verify, progress=not args.quiet
    )
    path = report.save(args.out)
    print(verdict(report))
    print_path(path)
    for failure in report.failures:
        print(f"dfa2 report: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def verdict(report: Report) -> str:
    """One line: whether the gate is open, and how far each plan is from dense sampling."""
    count = len(report.failures)
    if count:
        gate = f"Failed: {count} limit{'s are' if count > 1 else ' is'} missed."
    else:
        gate = "Passed: all limits are kept." if report.limits else "No limits were set."
    return " ".join([gate, *(_of_plan(report, line) for line in report.of_kind("plan"))])


def _of_plan(report: Report, plan: Line) -> str:
    speed = f"Plan {plan.name} is {report.speedup(plan):.2f} times as fast as dense sampling"
    mean = plan.mean("psnr")
    likeness = f"its {report.noun}s keep a mean PSNR of {mean:.1f} dB to the dense ones"
    if "limit_psnr" in plan.scores:
        near, dense = plan.mean("limit_psnr"), report.lines[0].mean("limit_psnr")
        likeness += f" and of {near:.1f} dB to the limit of many steps, where dense sampling has {dense:.1f} dB"
    if any(distance["within"] for distance in report.distances(plan)):
        return f"{speed}, and {likeness}, within the noise of rounding."
    others = [line for kind in ("floor", "ceiling") for line in report.of_kind(kind) if not line.left_out]
    compared = "; ".join(f"{line.name} {line.mean('psnr'):.1f} dB" for line in others)
    return f"{speed}, and {likeness}{f' (for scale: {compared})' if compared else ''}."
