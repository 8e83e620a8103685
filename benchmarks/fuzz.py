"""Damages weights, plans, tokenizers, configs and progress many times over; ends at the first that is taken wrongly.

    python -m benchmarks.fuzz [weights plans ...] [--count 30000] [--seed 1] [--jobs 2] [--out FILE.json]

Weights must be read as by safetensors itself, or refused with a CheckpointError, in memory of at most twice
the files and a constant. Plans must be what the file says, or refused with a PlanError. Tokenizers, configs and a
calibration's progress must be what the files say, or refused with a CheckpointError, in bounded memory. Each kind is
damaged so many times, in several processes with seeds of their own. The test suite does some hundreds with another
seed. The damage is that of tests/mutations.py and tests/folder_mutations.py.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax.demo.box import FOLDER
from dfa2_jax.io.atomic import replacing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from folder_mutations import ConfigFuzzer, TokenizerFuzzer  # noqa: E402
from mutations import SLACK_BYTES, Fuzzer, PlanFuzzer, ResumeFuzzer  # noqa: E402

KINDS = {
    "weights": Fuzzer,
    "plans": PlanFuzzer,
    "tokenizers": TokenizerFuzzer,
    "configs": lambda folder, seed: ConfigFuzzer(FOLDER, folder / "box", seed),
    "progress": ResumeFuzzer,
}
SHARE = 500
"""The count that one process takes at a time."""


def damage(kind: str, seed: int, count: int) -> tuple[str, dict[str, int], dict[str, int]]:
    """What came of so many; and of weights, the bytes that reading took above twice the files."""
    logging.disable()  # texts that are cut
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / kind
        place.mkdir()
        fuzzer: Any = KINDS[kind](place, seed)
        for _ in range(count):
            fuzzer.step()
        return kind, fuzzer.counts, getattr(fuzzer, "peak_above_twice", {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    args = parser.parse_args()
    start, kinds = time.perf_counter(), args.kinds or list(KINDS)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    peaks: Counter[str] = Counter()
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        shares = [
            pool.submit(damage, kind, args.seed + first, min(SHARE, args.count - first))
            for first in range(0, args.count, SHARE)
            for kind in kinds
        ]
        for share in tqdm(as_completed(shares), "fuzz", len(shares)):
            kind, counted, above = share.result()
            counts[kind].update(counted)
            peaks |= Counter(above)
    result = {
        "machine": describe_machine(),
        "mutations": args.count,
        "seed": args.seed,
        "kinds": {kind: dict(counted) for kind, counted in counts.items()},
        "other_exceptions": 0,  # the first would have ended the run
        "peak_bytes_above_twice_the_files": dict(peaks),
        "allowed_bytes_above_twice_the_files": SLACK_BYTES,
        "seconds": round(time.perf_counter() - start, 1),
    }
    with replacing(args.out) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
