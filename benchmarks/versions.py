"""Two versions of this code side by side on one GPU: steps at 2048 px, dense and by plans that keep 0.32.

    git worktree add build/v1 6292297
    python -m benchmarks.versions before=build/v1 after=. [--cases "FLUX.1-dev 2048" ...] [--repeats 2] [--out FILE]

Each version runs in processes of its own, in turn, `--repeats` times. A ratio is the median of the last version's
milliseconds over the first's.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from dfa2_jax.io.atomic import write_whole

CASES = ("FLUX.1-dev 2048", "SD3.5-medium 2048")
RESULTS = Path(__file__).parent / "results" / "versions_h200.json"

MEASURE = """
import json, sys
from statistics import median
import jax
from benchmarks.loops import interleaved
from benchmarks.sampling import GPU

loop, steps = GPU[sys.argv[1]](28), 3
caches = loop.caches()
plans = {"mixed": loop.plan(0.32, reuse=0.5), "reuse": loop.plan(0.32, reuse=1.0)}

def planned(name):
    global caches
    latents, caches = loop.planned(caches, plans[name], 1, 1 + steps)
    return latents

runs = {"dense": lambda: loop.dense(1, 1 + steps)} | {name: lambda name=name: planned(name) for name in plans}
times = interleaved(runs, 6)
ms = {name: 1e3 * median(values) / steps for name, values in times.items()}
print(json.dumps({"ms_per_step": ms, "device": jax.devices()[0].device_kind, "jax": jax.__version__}))
"""
"""Uses what both versions have alike: `benchmarks.loops.Loop` and `benchmarks.sampling.GPU`."""


def measure(root: Path, case: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root.resolve()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", "-c", MEASURE, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    if done.returncode:
        raise SystemExit(f"{root}, {case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(runs: list[dict[str, Any]], first: str, last: str) -> dict[str, float]:
    """Milliseconds of the last version over those of the first, by kind of step."""

    def middle(version: str, kind: str) -> float:
        return median(run["ms_per_step"][kind] for run in runs if run["version"] == version)

    return {kind: middle(last, kind) / middle(first, kind) for kind in runs[0]["ms_per_step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs=2, metavar="NAME=FOLDER")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folders = dict(version.split("=", 1) for version in args.versions)
    content: dict[str, Any] = {}
    for case in args.cases:
        runs = [
            {"version": name} | measure(Path(folder), case)
            for _ in range(args.repeats)
            for name, folder in folders.items()
        ]
        content[case] = {"runs": runs, "after_over_before": ratios(runs, *folders)}
        print(case, json.dumps(content[case]["after_over_before"]), flush=True)
        write_whole(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
