"""Kills commands at random moments (SIGKILL) and runs each again; a run goes on where the last one stopped.

    python -m benchmarks.kills [plan=400 convert=200 ...] [--jobs 2] [--models DIR] [--out kills.json]

What a kill leaves must be whole where it shows. The next run must give what an unbroken one gives, bit for bit, and
leave nothing else. Each command is killed 200 times, or as often as is said; tests/kill_cases.py has them. `--models`
names the folder that `python tests/tiny.py DIR` wrote; by default the environment's DFA2_TINY.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import replacing

NAMES = ("plan", "convert", "calibrate", "calibrate steps", "sample", "report")
SCRIPT = Path(__file__).parents[1] / "tests/kill_cases.py"


def kills(models: Path, missing: dict[str, range], jobs: int) -> Iterator[dict[str, Any]]:
    """As they come: by command, those of these numbers, in so many processes."""
    shares = [(name, numbers[job::jobs]) for job in range(jobs) for name, numbers in missing.items()]
    shares.sort(key=lambda share: NAMES.index(share[0]), reverse=True)  # the longest first
    made: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def run(name: str, numbers: range) -> None:
        with tempfile.TemporaryDirectory() as work:
            command = [sys.executable, SCRIPT, models, work, f"{name}={len(numbers)}", str(numbers[0])]
            environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                made.put(json.loads(line))
            if process.wait():
                raise RuntimeError(f"{name}: exit code {process.returncode}")

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run, *share) for share in shares if share[1]]
        while not all(share.done() for share in running) or not made.empty():
            try:
                yield made.get(timeout=1)
            except Empty:
                continue
        for share in running:
            share.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "counts", nargs="*", metavar="COMMAND[=COUNT]", help=f"of {', '.join(NAMES)} (default: all, 200 kills each)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--models", type=Path, default=os.environ.get("DFA2_TINY"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    args = parser.parse_args()
    if args.models is None:
        parser.error("--models DIR or DFA2_TINY: the folders that `python tests/tiny.py DIR` writes")
    content = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    rows = {row["case"]: row for row in content["rows"]}
    counts = {name: int(count or 200) for name, _, count in (text.partition("=") for text in args.counts or NAMES)}
    for name in counts:
        rows.setdefault(name, {"case": name, "kills": 0, "left_something": 0, "faults": []})
    machine, rows = describe_machine(), {name: rows[name] for name in NAMES if name in rows}
    missing = {name: range(rows[name]["kills"], count) for name, count in counts.items()}
    for kill in tqdm(kills(args.models, missing, args.jobs), "kills", sum(map(len, missing.values()))):
        row = rows[kill["case"]]
        row["seconds_unbroken"] = kill["seconds_unbroken"]
        row["kills"] += 1
        row["left_something"] += kill["left"] > 0
        row["faults"] += [kill] if "fault" in kill else []
        row["machine"] = f"{machine['processor']}, {machine['cores']} cores"
        content = {"machine": machine, "kills": sum(row["kills"] for row in rows.values())}
        with replacing(args.out) as file:
            file.write((json.dumps(content | {"rows": [*rows.values()]}, indent=1) + "\n").encode())
    print(json.dumps([*rows.values()], indent=1))


if __name__ == "__main__":
    main()
