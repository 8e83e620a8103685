"""Whole runs of the sampling loop, dense and by step plans, against what the number of nodes predicts.

    python -m benchmarks.step_runs [CASE ...] [--rounds 3] [--out FILE]

Weights are random, at published shapes: they take the time of real ones. Nodes are spread evenly, since time does not
depend on which they are. Where attention is 0.3 of a step, plans with heads run too. Their prediction is `Plan.cost`,
by the shares that are counted in a step's program. Runs take turns; a ratio is of medians.

Where FILE has a case from an earlier run, what that predicted is kept as `foretold_s`. Those seconds were committed
before this run. Cases that are not named keep their rows.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.loops import Loop, interleaved
from benchmarks.machine import describe_machine
from benchmarks.sampling import CPU, GPU
from dfa2_jax import Plan
from dfa2_jax.calibration.joint import WORTHWHILE
from dfa2_jax.io.atomic import replacing
from dfa2_jax.nn.attention import by_stack
from dfa2_jax.plan.steps import count_for, euler_coefficients
from dfa2_jax.sampling.inputs import pad_steps
from dfa2_jax.sampling.loop import HeadPlans, denoise, denoise_planned
from dfa2_jax.sampling.solvers.flow_euler import FlowMultistep

STEPS = {"FLUX.1-dev 1024": (50, 28)}
SPEEDUPS = (2.0, 3.0)


def run(loop: Loop, count: int, steps: int) -> jax.Array:
    """`count` nodes of a schedule of `steps`."""
    nodes = np.linspace(0, steps - 1, count).astype(int)
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    solver = FlowMultistep.moving(euler_coefficients(sigmas[[*nodes, -1]]))
    inputs = jax.device_put(loop.inputs.at(nodes, solver))
    return denoise(loop.graph, loop.params, loop.start(), inputs, 0, count).latents


def run_heads(loop: Loop, plan: Plan, steps: int, caches: dict[str, Any]) -> jax.Array:
    """The steps of a plan with heads; its memory is used again."""
    sigmas = np.linspace(1, 0, steps + 1, dtype=np.float32)
    solver = FlowMultistep.moving(euler_coefficients(sigmas[[*plan.nodes, -1]]))
    inputs = jax.device_put(loop.inputs.at(np.array(plan.nodes), solver))
    half_window, head_order = (
        by_stack(loop.calls, pad_steps(x), axis=1) for x in (plan.half_windows(), plan.head_order())
    )
    plans, state = HeadPlans(half_window, head_order, np.zeros((), np.int32)), loop.start(caches.pop("memory"))
    state = denoise_planned(loop.graph, loop.params, state, inputs, plans, 0, len(plan.nodes))
    caches["memory"] = state.memory
    return state.latents


def head_plans(loop: Loop, count: int, steps: int) -> dict[str, Plan]:
    """Plans of so many nodes: heads drawn at random, of two densities; and all heads reused at every second node."""
    nodes = tuple(np.linspace(0, steps - 1, count).astype(int).tolist())
    plans = {}
    for density in (0.6, 0.4):
        plan = loop.plan(density, reuse=1.0)
        kept = {"choices": plan.choices[:count], "nodes": nodes, "coefficients": np.zeros((0, 2))}
        plans[f"{count} nodes, heads {density:g}"] = replace(plan, **kept)
    plan = Plan.full(plan.setting, nodes)
    plans[f"{count} nodes, every second reused"] = plan.with_method(slice(1, None, 2), None, None, "cached")
    return plans


def measure(loop: Loop, steps: int, rounds: int) -> dict[str, Any]:
    counts = {"dense": steps} | {f"speedup {speedup:g}": count_for(speedup, steps) for speedup in SPEEDUPS}
    runs = {name: partial(run, loop, count, steps) for name, count in counts.items()}
    shares, plans = loop.shares(), {}
    if shares.attention >= WORTHWHILE:
        plans, caches = head_plans(loop, count_for(1.5, steps), steps), {"memory": loop.caches()}
        runs |= {name: partial(run_heads, loop, plan, steps, caches) for name, plan in plans.items()}
    times = interleaved(runs, rounds)
    dense = median(times["dense"])
    row: dict[str, Any] = {"steps": steps, "dense_s": dense, "shares": shares._asdict(), "seconds": times, "plans": {}}
    costs = {name: (count, count / steps) for name, count in counts.items()}
    costs |= {name: (len(plan.nodes), plan.cost(*shares)) for name, plan in plans.items()}
    for name, (count, cost) in costs.items():
        if name != "dense":
            predicted, seconds = dense * cost, median(times[name])
            row["plans"][name] = {
                "nodes": count,
                "density": plans[name].density() if name in plans else 1.0,
                "s": seconds,
                "predicted_s": predicted,
                "off": seconds / predicted - 1,
            }
    return row


def foretell(plans: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Adds what an earlier run predicted of the same plans, and how far that is off."""
    for name, plan in plans.items():
        if name in earlier:
            foretold = earlier[name]["predicted_s"]
            plan |= {"foretold_s": foretold, "off_foretold": plan["s"] / foretold - 1}


def main() -> None:
    cases = CPU if jax.default_backend() == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/step_runs_{jax.default_backend()}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    earlier = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    before = {(row["case"], row["steps"]): row for row in earlier}
    rows: dict[tuple[str, int], dict[str, Any]] = dict(before) if args.cases else {}
    content = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        loop = cases[name](max(STEPS.get(name, (28,))))
        for steps in STEPS.get(name, (28,)):
            row = {"case": name, **measure(loop, steps, args.rounds)}
            foretell(row["plans"], before.get((name, steps), {"plans": {}})["plans"])
            rows[name, steps] = row
            print(name, steps, f"dense {row['dense_s']:.2f} s", row["plans"], flush=True)
            with replacing(args.out) as file:
                file.write(json.dumps(content | {"rows": [*rows.values()]}, indent=1).encode() + b"\n")
        del loop  # before the next is made


if __name__ == "__main__":
    main()
