"""`dfa2-convert SRC DST [--dtype]`."""

import argparse
import logging
import sys
from collections.abc import Sequence

from tqdm import tqdm

from dfa2_jax.checkpoint import FLOAT_DTYPES
from dfa2_jax.faults import CheckpointError

from .convert import convert_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, or 2 with one line on stderr, or 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="dfa2-convert", description="Convert a diffusers folder to Orbax.")
    parser.add_argument("src", metavar="SRC", help="a diffusers folder, or a hub id such as owner/name")
    parser.add_argument("dst", metavar="DST", help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=sorted(FLOAT_DTYPES), help="of the weights (default: as stored)")
    args = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what it does not do
    try:
        with tqdm(unit="B", unit_scale=True, desc="convert") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            convert_checkpoint(args.src, args.dst, args.dtype, progress=progress)
    except (CheckpointError, OSError) as error:
        print(f"dfa2-convert: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dfa2-convert: interrupted, nothing was kept", file=sys.stderr)
        return 130
    print(args.dst)
    return 0


if __name__ == "__main__":
    sys.exit(main())
