"""`dfa2 plan show`, `dfa2 plan sign` and `dfa2 plan resolve`."""

import argparse
import os
import sys
from pathlib import Path

from dfa2_jax.io.atomic import replaceable
from dfa2_jax.io.errors import blame
from dfa2_jax.io.extras import MissingExtra
from dfa2_jax.io.terminal import print_path
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.view import draw, summary

PNG = b"\x89PNG\r\n\x1a\n"
"""How a picture begins."""


def show(args: argparse.Namespace) -> int:
    plan = Plan.load(args.plan)
    print(summary(plan))
    picture = args.png or args.plan.with_name(f"{args.plan.name}.png")
    if picture.is_file() and not picture.read_bytes().startswith(PNG):
        raise FileExistsError(f"--png {picture} is there, and is no picture: choose another name.")
    try:
        draw(plan, picture)
        print_path(picture)
    except MissingExtra as error:
        if args.png:
            raise
        print(f"dfa2 plan show: {error}", file=sys.stderr)
    return 0


def sign(args: argparse.Namespace) -> int:
    print(Plan.sign(args.plan).digest)
    return 0


def check_plan_out(out: Path) -> None:
    """Whether a plan may be written there.

    Raises:
        OSError: there is no such folder, or none that is writable.
        PlanError: a file is there that is no plan.
    """
    if not os.access(out.absolute().parent, os.W_OK):
        raise PermissionError(f"--out {out} is not in a folder that is there and writable: choose another one.")
    if replaceable(out).exists():
        with blame(f"--out {out} is there, and is no plan: choose another name"):
            Plan.load(out)


def resolve(args: argparse.Namespace) -> int:
    check_plan_out(args.out)
    if args.out.exists() and args.out.samefile(args.plan):
        raise FileExistsError(f"--out {args.out} is the plan itself, whose own run would be lost: choose another name.")
    Plan.load(args.plan).resolve(speedup=args.speedup, psnr=args.psnr).save(args.out)
    print_path(args.out)
    return 0
