"""Steps of the published models at their sizes with blocks of 8 bits, beside bfloat16's, dense and by a plan.

    python -m benchmarks.quantized_steps [CASE ...] [--rounds 5] [--steps 2] [--keep 0.32]

All of a case are timed in turn, round by round: weights are random, which time like real ones. Results are kept after
every case, in benchmarks/results/quantized_steps_<platform>.json.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.loops import Loop, interleaved, ratio
from benchmarks.machine import describe_machine
from benchmarks.sampling import CPU, GPU, Case
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.sampling.loop import denoise, denoise_planned

DTYPES = (None, "float8", "int8")


class Runs:
    """A model in one precision, dense and by a plan, compiled ahead of time."""

    def __init__(self, case: Case, precision: str | None, steps: int, keep: float):
        self.loop: Loop = case(steps + 1, precision)
        self.caches, self.stop = self.loop.caches(), 1 + steps
        self.plans = self.loop.head_plans(self.loop.plan(keep, reuse=0.5))
        loop, inputs = self.loop, self.loop.inputs
        self.lowered = {
            "dense": denoise.lower(loop.graph, loop.params, loop.start(), inputs, 0, 0),
            "planned": denoise_planned.lower(
                loop.graph, loop.params, loop.start(self.caches), inputs, self.plans, 0, 0
            ),
        }
        self.compiled: dict[str, Any] = {}

    def compile(self, kind: str) -> None:
        self.compiled[kind] = self.lowered[kind].compile()

    def dense(self) -> jax.Array:
        loop = self.loop
        return self.compiled["dense"](loop.params, loop.start(), loop.inputs, 1, self.stop).latents

    def planned(self) -> jax.Array:
        loop, start = self.loop, self.loop.start(self.caches)
        state = self.compiled["planned"](loop.params, start, loop.inputs, self.plans, 1, self.stop)
        self.caches = state.memory
        return state.latents

    def peak_gb(self, kind: str) -> float:
        """What a loop needs, with all that it is given."""
        memory = self.compiled[kind].memory_analysis()
        given = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return (given + memory.temp_size_in_bytes) / 1e9


def measure(case: Case, rounds: int, steps: int, keep: float) -> dict[str, Any]:
    every = {dtype or jax.numpy.dtype(case.dtype).name: Runs(case, dtype, steps, keep) for dtype in DTYPES}
    first = next(iter(every))
    with ThreadPoolExecutor() as compilers:  # XLA times its choices of products one at a time all the same
        list(compilers.map(lambda pair: pair[0].compile(pair[1]), product(every.values(), KINDS)))
    calls = {f"{name}, {kind}": getattr(runs, kind) for name, runs in every.items() for kind in KINDS}
    times = interleaved(calls, rounds)
    nbytes = {name: sum(x.nbytes for x in jax.tree.leaves(runs.loop.params)) / 1e9 for name, runs in every.items()}
    return {
        "weights_gb": nbytes,
        "peak_gb": {f"{name}, {kind}": runs.peak_gb(kind) for name, runs in every.items() for kind in KINDS},
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "speedup": {name: ratio(times, f"{first}, dense", name) for name in times},
        "kept": keep,
        "seconds": times,
    }


KINDS = ("dense", "planned")


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed at a time, after the first")
    parser.add_argument("--keep", type=float, default=0.32, help="the share of pairs that the plan keeps")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/quantized_steps_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    rows = json.loads(args.out.read_text())["rows"] if args.cases and args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        rows[name] = machine | measure(cases[name], args.rounds, args.steps, args.keep)
        for run, ms in rows[name]["ms_per_step"].items():
            print(f"{name}, {run}: {ms:.1f} ms, {rows[name]['speedup'][run]:.2f}x", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
