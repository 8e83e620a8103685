"""`dfa2-convert`: a diffusers folder to Orbax."""

import argparse
import logging
import os
import sys

from tqdm import tqdm

from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.io.signals import Interrupted
from dfa2_jax.io.terminal import print_path


def run(args: argparse.Namespace) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what it does not do
    try:
        with tqdm(unit="B", unit_scale=True, desc="convert") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            options = {"progress": progress, "download": args.download, "loras": args.lora}
            convert_checkpoint(args.src, args.dst, args.dtype, **options)
    except Interrupted as error:  # after the name was taken, which one step does, all is there
        kept = f"{args.dst} is complete" if os.path.lexists(args.dst) else "nothing was kept"
        print(f"dfa2-convert: interrupted, {kept}", file=sys.stderr)
        return error.exit_code
    print_path(args.dst)
    return 0
