"""The exact choice alone: milliseconds, next to HiGHS on the same instance, and the sums that both reach.

python -m benchmarks.search [--rounds 20] [--out FILE]
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.machine import describe_machine
from dfa2_jax.calibration.search import choose
from dfa2_jax.io.atomic import write_whole

SAVED = (4000, 3400, 3000, 2500, 2000)
DELTA = 0.4


def highs(errors: np.ndarray, saved: tuple[int, ...], delta: float, bound: float) -> int:
    """What can be saved at most, as a mixed-integer program."""
    heads, methods = errors.shape
    constraints = [
        LinearConstraint(np.kron(np.eye(heads), np.ones(methods)), ub=np.ones(heads)),
        LinearConstraint(errors.reshape(1, -1), ub=delta),
    ]
    upper = (errors < bound).astype(float).ravel()
    found = milp(
        -np.tile(np.array(saved, float), heads),
        integrality=np.ones(upper.size),
        bounds=Bounds(0, upper),
        constraints=constraints,
    )
    return round(-found.fun)


def measure(heads: int, methods: int, rounds: int) -> dict[str, Any]:
    saved, bound = SAVED[:methods], 1.5 * DELTA / heads
    drawn = np.random.default_rng(0).integers(0, 2**16, (rounds + 1, heads, methods)) / 2**20  # HiGHS allows 1e-6
    program = jax.jit(lambda errors: choose(errors, saved, DELTA, bound))
    started = time.perf_counter()
    jax.block_until_ready(program(jnp.asarray(drawn[0], jnp.float32)))
    row: dict[str, Any] = {"heads": heads, "methods": methods, "first_call_s": time.perf_counter() - started}
    ours, theirs = [], []
    for errors in drawn[1:]:
        argument = jax.block_until_ready(jnp.asarray(errors, jnp.float32))
        started = time.perf_counter()
        picks = np.asarray(program(argument))
        middle = time.perf_counter()
        most = highs(errors, saved, DELTA, bound)
        theirs.append(time.perf_counter() - middle)
        ours.append(middle - started)
        if (gained := int(sum(saved[pick] for pick in picks if pick >= 0))) != most:
            raise AssertionError(f"{heads} heads, {methods} methods: we save {gained}, HiGHS {most}")
    return row | {"ms": 1e3 * median(ours), "highs_ms": 1e3 * median(theirs), "equal": len(ours)}


def main() -> None:
    platform = jax.default_backend()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/search_{platform}.json"))
    args = parser.parse_args()
    result = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "rows": []}
    for heads, methods in ((24, 4), (38, 4), (38, 5)):
        result["rows"].append(row := measure(heads, methods, args.rounds))
        print(row, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
