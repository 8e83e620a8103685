"""Kills commands at random moments (SIGKILL) and runs each again; a run goes on where the last one stopped.

    python -m benchmarks.kills [plan convert ...] [--count 200] [--models DIR] [--out benchmarks/results/kills.json]

What a kill leaves must be whole where it shows. The next run must give what an unbroken one gives, bit for bit, and
leave nothing else. Each of the five commands is killed so many times; tests/kill_cases.py has them. `--models` names
the folder that `python tests/tiny.py DIR` wrote; by default the environment's DFA2_TINY.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import replacing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from kill_cases import Killer, prepare  # noqa: E402

NAMES = ("plan", "convert", "calibrate", "sample", "report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="COMMAND", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument(
        "--count", type=int, default=200, help="kills of each command, those of earlier runs among them"
    )
    parser.add_argument("--models", type=Path, default=os.environ.get("DFA2_TINY"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    args = parser.parse_args()
    if args.models is None:
        parser.error("--models DIR or DFA2_TINY: the folders that `python tests/tiny.py DIR` writes")
    content = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    rows = {row["case"]: row for row in content["rows"]}
    for name in NAMES:
        rows.setdefault(name, {"case": name, "kills": 0, "ended_before": 0, "left_something": 0, "faults": []})
    with tempfile.TemporaryDirectory() as work:
        missing = [name for name in args.names or NAMES if rows[name]["kills"] < args.count]
        for name, case in prepare(args.models, Path(work), missing).items():
            row = rows[name]
            killer = Killer(name, case, Path(work), seed=row["kills"])
            row["seconds_unbroken"] = round(killer.seconds, 2)
            for _ in tqdm(range(row["kills"], args.count), name, disable=None):
                found = killer.kill()
                row["kills"] += 1
                row["ended_before"] += not found["killed"]
                row["left_something"] += found["left"] > 0
                row["faults"] += [found] if "fault" in found else []
                content = {"machine": describe_machine(), "kills": sum(row["kills"] for row in rows.values())}
                with replacing(args.out) as file:
                    file.write((json.dumps(content | {"rows": [*rows.values()]}, indent=1) + "\n").encode())
    print(json.dumps([*rows.values()], indent=1))


if __name__ == "__main__":
    main()
