"""`dfa2 plan show` and `dfa2 plan sign`."""

import argparse
import sys

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
