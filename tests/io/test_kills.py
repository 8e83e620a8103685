"""SIGKILL at random moments: nothing half-written is accepted, and the next run leaves nothing behind.

`python -m benchmarks.kills` does the same a thousand times, with the commands that sample as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "kill_cases.py"


def test_twenty_killed_commands_are_made_good_by_the_next_run(tiny_flux_schnell, tmp_path):
    """In processes of their own: they are forks of one that has started no threads."""
    rows, environment = [], os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    for count in ("plan=17", "convert=3"):
        command = [sys.executable, SCRIPT, tiny_flux_schnell.parent, tmp_path, count]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        rows += map(json.loads, run.stdout.splitlines())
    assert len(rows) == 20 and not [row for row in rows if "fault" in row]
    assert sum(row["left"] for row in rows) > 0, "none met a write"
