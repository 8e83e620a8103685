"""What calibration costs: in units of a dense run, of dense attention, and against the official scheme.

    python -m benchmarks.calibration [CASE ...] [--rounds 5] [--out FILE]

Cases are those of benchmarks/sampling.py whose attention takes most of a step, and one of 24 heads. One step of each is
timed, interleaved:

- dense;
- without attention;
- calibration: every candidate in one nested pass, the choice in the program;
- the official scheme: a dense pass, one per window, the choice, and a pass of the chosen mix.

Also the exact choice alone, for all layers, and memory.
"""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loops import Loop, interleaved, ratio
from benchmarks.machine import describe_machine
from benchmarks.sampling import CPU, GPU, cut_sd35
from dfa2_jax import Method
from dfa2_jax.calibration import attends
from dfa2_jax.calibration import calibrate as calibration
from dfa2_jax.calibration.search import choose
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.nn.attention import arrow_attention, in_order
from dfa2_jax.nn.linear import XLA_OPTIONS
from dfa2_jax.sampling.loop import denoise
from pallas_kernels.layout import FULL

CPU_CASES = CPU | {"1,024 tokens, 24 heads": cut_sd35(32, 154, 24, 64)}
CASES = {
    "cpu": ["1,024 tokens, share of 2048 px", "1,024 tokens, 24 heads", "4,096 tokens, share of 2048 px"],
    "gpu": ["FLUX.1-dev 1024", "FLUX.1-dev 2048", "SD3.5-medium 2048"],
}
CANDIDATES = (Method("cached"), *map(Method.arrow, (8, 16, 32)))


class Official(attends.TryEverything):
    """One pass for each window; the chosen mix is computed once more (method.md 4.2 of the paper's code)."""

    def __call__(self, project: Any, layout: Any, memory: Any, plan: Any) -> tuple[Any, Any]:
        q, k, v = project()
        trials: Any = super().__call__(lambda: (q, k, v), layout, memory, plan)[1]
        windows = np.array([method.half_window(layout.num_visual) for method in self.candidates], np.int32)
        half_window = jnp.append(jnp.asarray(windows), jnp.int32(FULL))[trials.picks[plan.place]]
        caches = arrow_attention(q, k, v, half_window, layout=layout, cache=memory.caches, layer=plan.place)
        return caches[plan.place], replace(trials, caches=caches)

    def _outputs(self, windows: Any, layout: Any, q: Any, k: Any, v: Any, previous: Any) -> tuple[list[Any], Any]:
        def alone(window: int) -> jax.Array:
            return arrow_attention(q, k, v, jnp.full(q.shape[2], window, jnp.int32), layout=layout)

        return [previous if window < FULL else alone(window) for window in windows], arrow_attention(
            q, k, v, layout=layout
        )


def stepper(loop: Loop, kind: type, tiles: tuple[int, int]) -> Any:
    """A calibration step of its own program, with `kind` in the place of `TryEverything`."""
    names = ("graph", "candidates", "tiles", "chunk", "implementation", "rounding")

    def calibrate_step(graph: Any, params: Any, state: Any, **kwargs: Any) -> Any:
        with patch.object(calibration, "TryEverything", kind):
            return calibration.calibrate_step.__wrapped__(graph, params, state, **kwargs)

    options = {"donate_argnames": "state", "compiler_options": XLA_OPTIONS}
    step = jax.jit(calibrate_step, static_argnums=0, static_argnames=names, **options)
    budget = attends.Budget.of(0.4, 1.5, loop.config.num_attention_heads)
    return partial(step, loop.graph, loop.params, inputs=loop.inputs, i=1, budget=budget), {
        "candidates": CANDIDATES,
        "tiles": tiles,
    }


def measure(loop: Loop, rounds: int) -> dict[str, Any]:
    heads, head_dim = loop.config.num_attention_heads, loop.config.attention_head_dim
    tiles = calibration.planning_tiles(head_dim)
    caches = loop.caches()
    programs = {"calibration": attends.TryEverything, "official scheme": Official}
    steps = {name: stepper(loop, kind, tiles) for name, kind in programs.items()}
    saved = [
        attends.saved_tiles(np.array([m.half_window(x.num_visual) for m in CANDIDATES], np.int32), x, tiles)
        for x in loop.layers.values()
    ]
    errors = jnp.asarray(np.random.default_rng(0).uniform(0, 0.04, (len(saved), heads, len(CANDIDATES))), jnp.float32)

    @jax.jit
    def choices(errors: jax.Array) -> list[jax.Array]:
        return [choose(one, s, 0.4, 1.5 * 0.4 / heads) for one, s in zip(errors, saved, strict=True)]

    def run(name: str) -> Any:
        nonlocal caches
        step, options = steps[name]
        state, chosen = step(loop.start(caches), **options)
        caches = state.memory
        return state.latents, in_order(loop.calls, {stack: picks for stack, (picks, _) in chosen.items()})

    _, filled = loop.planned(caches, loop.plan(1.0, reuse=0.0), 0, 1)
    picks = []
    for name in programs:
        caches = jax.tree.map(jnp.copy, filled)
        picks.append(np.asarray(run(name)[1]))
    times = interleaved(
        {"dense": lambda: loop.dense(1, 2), "without attention": lambda: loop.rest(1, 2)}
        | {name: partial(run, name) for name in programs}
        | {"choices": lambda: choices(errors)},
        rounds,
    )
    found: dict[str, Any] = {name: ratio(times, name, "dense") for name in programs}
    seconds = {name: median(values) for name, values in times.items()}
    attention = seconds["dense"] - seconds["without attention"]
    return {
        "shape": {"visual": loop.num_visual, "text": loop.num_text, "batch": loop.batch, "dtype": str(loop.dtype)},
        "heads": [heads, head_dim],
        "attention_share": attention / seconds["dense"],
        "in_dense_runs": found,
        "in_dense_attention": {name: (seconds[name] - seconds["without attention"]) / attention for name in programs},
        "choices_share": ratio(times, "choices", "calibration"),
        "same_picks": float((picks[0] == picks[1]).mean()),
        "memory": memory(loop, caches, steps),
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "seconds": times,
    }


def memory(loop: Loop, caches: Any, steps: dict[str, Any]) -> dict[str, Any]:
    """Bytes beside weights and caches, as compiled (a CPU's leave out what some fusions use). Predicted for
    calibration: a dense step's, and the longest layer's outputs under every arrow and as they were a step ago."""
    width = loop.config.num_attention_heads * loop.config.attention_head_dim
    longest = max(layout.length for layout in loop.layers.values())
    dense = denoise.lower(loop.graph, loop.params, loop.start(), loop.inputs, 1, 2)
    found = {"caches": sum(x.nbytes for x in jax.tree.leaves(caches)), "dense": temporary(dense)}
    found["predicted"] = found["dense"] + len(CANDIDATES) * loop.batch * longest * width * loop.dtype.itemsize
    for name, (step, options) in steps.items():
        found[name] = temporary(step.func.lower(*step.args, loop.start(caches), **step.keywords, **options))
    return found


def temporary(lowered: Any) -> int:
    return lowered.compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    platform = jax.default_backend()
    cases = CPU_CASES if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases)}; default: {CASES[platform]}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/calibration_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    result: dict[str, Any] = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "rows": {}}
    for name in args.cases or CASES[platform]:
        row = result["rows"][name] = measure(cases[name](2), args.rounds)
        shown = {key: row[key] for key in ("attention_share", "in_dense_runs", "in_dense_attention", "memory")}
        print(f"{name}: {json.dumps(shown | {key: row[key] for key in ('choices_share', 'same_picks')})}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
