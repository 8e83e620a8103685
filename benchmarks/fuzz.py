"""Damages weights, plans, tokenizers and configs many times over; stops at the first that is taken in a wrong way.

    python -m benchmarks.fuzz [--count 100000] [--seed 1] [--out benchmarks/results/fuzz.json]

Weights must be read as by safetensors itself, or refused with a CheckpointError, in memory of at most twice
the files and a constant. Plans must be what the file says, or refused with a PlanError. Tokenizers, configs and a
calibration's progress must be what the files say, or refused with a CheckpointError, in bounded memory. Each kind is
damaged so many times. The test suite does some hundreds with another seed. The damage is that of tests/mutations.py and
tests/folder_mutations.py.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import trange

from benchmarks.machine import describe_machine
from dfa2_jax.demo.box import FOLDER

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from folder_mutations import ConfigFuzzer, TokenizerFuzzer  # noqa: E402
from mutations import SLACK_BYTES, Fuzzer, PlanFuzzer, ResumeFuzzer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        for _ in trange(args.count, disable=None):
            fuzzer.step()
        plans = PlanFuzzer(Path(folder), args.seed)
        for _ in trange(args.count, disable=None):
            plans.step()
        tokenizers = TokenizerFuzzer(Path(folder) / "tokenizers", args.seed)
        for _ in trange(args.count, disable=None):
            tokenizers.step()
        configs = ConfigFuzzer(FOLDER, Path(folder) / "configs", args.seed)
        for _ in trange(args.count, disable=None):
            configs.step()
        progress = ResumeFuzzer(Path(folder), args.seed)
        for _ in trange(args.count, disable=None):
            progress.step()
    result = {
        "machine": describe_machine(),
        "mutations": args.count,
        "seed": args.seed,
        **fuzzer.counts,
        "plans": plans.counts,
        "tokenizers": tokenizers.counts,
        "configs": configs.counts,
        "progress": progress.counts,
        "other_exceptions": 0,  # the first would have ended the run
        "peak_bytes_above_twice_the_files": fuzzer.peak_above_twice,
        "allowed_bytes_above_twice_the_files": SLACK_BYTES,
        "seconds": round(time.perf_counter() - start, 1),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
