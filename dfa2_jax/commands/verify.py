"""`dfa2 verify`: a folder against its checksums."""

import argparse

from tqdm import tqdm

from dfa2_jax.io.hub import find_model
from dfa2_jax.io.terminal import print_path
from dfa2_jax.weights.verify import verify_folder


def run(args: argparse.Namespace) -> int:
    folder = find_model(args.folder)
    with tqdm(unit="B", unit_scale=True, desc="verify", disable=args.quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        unknown = verify_folder(folder, progress)
        for name in unknown:
            bar.write(f"{name} has no checksum")
    print_path(folder)
    return 0
