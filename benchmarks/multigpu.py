"""Steps of the published models on several GPUs beside one, dense and by a plan, and what the exchange takes.

    python -m benchmarks.multigpu [CASE ...] [--devices 2] [--precision float8] [--rounds 3]

All of a case are timed in turn, round by round: on one device, and on as many as are named. `error` is that of the
latents after these steps, against one device. Weights are random. `benchmarks.exchange` times the exchange alone. On
GPUs each is traced once more, for the time of the first one's kernels.
On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.loops import Loop, interleaved, ratio
from benchmarks.machine import describe_machine
from benchmarks.profile import by_kind
from benchmarks.sampling import CPU, GPU, Case
from dfa2_jax import Plan
from dfa2_jax.io.atomic import write_whole


class Runs:
    """A loop by a plan, which is read once, and whose memory comes back from every call."""

    def __init__(self, loop: Loop, plan: Plan, steps: int):
        self.loop, self.plan, self.stop = loop, loop.head_plans(plan), 1 + steps
        _, self.memory = loop.planned(loop.caches(), self.plan, 0, 1)

    def dense(self) -> jax.Array:
        return self.loop.dense(1, self.stop)

    def planned(self) -> jax.Array:
        latents, self.memory = self.loop.planned(self.memory, self.plan, 1, self.stop)
        return latents


def measure(case: Case, devices: list[int], precision: str | None, rounds: int, steps: int, keep: float) -> Any:
    loop = case(steps + 1, precision)
    plan = loop.plan(keep, reuse=0.5)
    # One device has a mesh, too: else its kernels would be chosen as for as many as this host has.
    every = {count: Runs(loop.on(count), plan, steps) for count in (1, *devices)}
    calls = {f"{kind}, {count}": getattr(runs, kind) for count, runs in every.items() for kind in ("dense", "planned")}
    latents = {name: np.asarray(call(), np.float64) for name, call in calls.items()}
    times, on_gpu = interleaved(calls, rounds), jax.default_backend() == "gpu"
    meshes = {str(count): runs.loop.mesh for count, runs in every.items()}
    return {
        "mesh": {count: [mesh.rows, mesh.tokens] for count, mesh in meshes.items() if mesh is not None},
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "speedup": {name: ratio(times, f"{name.split(',')[0]}, 1", name) for name in times},
        "error": {name: difference(x, latents[f"{name.split(',')[0]}, 1"]) for name, x in latents.items()},
        "kernels": {name: by_kind(call, steps) for name, call in calls.items()} if on_gpu else {},
        "kept": keep,
        "seconds": times,
    }


def difference(x: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(x - wanted) / np.linalg.norm(wanted))


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--devices", type=int, nargs="+", default=[jax.device_count()])
    parser.add_argument("--precision", choices=("float8", "int8"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed at a time, after the first")
    parser.add_argument("--keep", type=float, default=0.32, help="the share of pairs that the plan keeps")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/multigpu_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        started, key = time.perf_counter(), name + (f", {args.precision}" if args.precision else "")
        rows[key] = measure(cases[name], args.devices, args.precision, args.rounds, args.steps, args.keep)
        print(
            f"{key}: {json.dumps({k: v for k, v in rows[key].items() if k not in ('seconds', 'kernels')})}", flush=True
        )
        rows[key] |= machine | {"run_seconds": time.perf_counter() - started}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
