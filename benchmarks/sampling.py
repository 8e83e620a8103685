"""Compressed sampling over dense, end to end, next to the ceiling that Amdahl's law gives.

    python -m benchmarks.sampling [CASE ...] [--rounds 5] [--steps 2] [--unrolled] [--out FILE]

A case is a model of random weights at one size. On a GPU, cases are SD3.5 and FLUX.1-dev at true shapes. On a CPU, they
are a cut-down SD3.5-medium. Its attention takes the share of the arithmetic that it takes in SD3.5-medium at 1024 or
2048 px (0.38 and 0.70). Plans keep a share of the query-key pairs. Half of the saving comes from cached heads and half
from arrows, mixed in every layer. Or all of it comes from arrows ("arrows"), or from cached heads ("reuse"). The first
step, always dense, is not timed. The ceiling is 1 / (1 - s (1 - kept)), where s is the measured share of attention.
Attention's time is that of a step less that of one without attention. The ceiling can be passed, because cached heads
skip their projections too: the last plan caches all. A GPU's peak memory is the process's so far.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.loops import Loop, interleaved, kept, ratio
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.sampling.tokens import Grid
from pallas_kernels import dense_implementation


class Case(NamedTuple):
    """A transformer at one size; called with a number of steps, its sampling loop."""

    class_name: str
    config: dict[str, Any]
    grid: Grid
    num_text: int
    guided: bool
    dtype: Any

    def __call__(self, steps: int, precision: str | None = None) -> Loop:
        class_name, config, *_ = self
        sizes = {"grid": self.grid, "num_text": self.num_text, "guided": self.guided, "dtype": self.dtype}
        return Loop(class_name, config, steps=steps, precision=precision, **sizes)


def cut_sd35(side: int, num_text: int, heads: int, head_dim: int) -> Case:
    """SD3.5-medium in four blocks, two of them dual (it has 13 of 24)."""
    config = {
        "num_layers": 4,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": 1024,
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 64,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    return Case("SD3Transformer2DModel", config, Grid(1, side, side), num_text, False, jnp.float32)


def sd35(layers: int, heads: int, dual: int, pixels: int) -> Case:
    config = {
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": "rms_norm",
    }
    return Case("SD3Transformer2DModel", config, square(pixels), 333, True, jnp.bfloat16)


def flux_dev(pixels: int) -> Case:
    return Case("FluxTransformer2DModel", {"guidance_embeds": True}, square(pixels), 512, False, jnp.bfloat16)


def square(pixels: int) -> Grid:
    """Tokens of a square image."""
    return Grid(1, pixels // 16, pixels // 16)


CPU = {
    "1,024 tokens, share of 1024 px": cut_sd35(32, 154, 6, 64),
    "1,024 tokens, share of 2048 px": cut_sd35(32, 154, 3, 32),
    "4,096 tokens, share of 1024 px": cut_sd35(64, 333, 24, 64),
    "4,096 tokens, share of 2048 px": cut_sd35(64, 333, 6, 64),
}
GPU = {
    "FLUX.1-dev 1024": flux_dev(1024),
    "FLUX.1-dev 2048": flux_dev(2048),
    "SD3.5-medium 1024": sd35(24, 24, 13, 1024),
    "SD3.5-medium 2048": sd35(24, 24, 13, 2048),
    "SD3.5-large 1024": sd35(38, 38, 0, 1024),
    "SD3.5-large 2048": sd35(38, 38, 0, 2048),
}
TARGETS = {"cpu": (0.6, 0.45, 0.3), "gpu": (0.69, 0.57, 0.44, 0.32)}
"""Kept shares; on a GPU those of the paper's sparsities 0.31, 0.43, 0.56, 0.68."""


def arithmetic_share(loop: Loop) -> float:
    """Attention's share of a step's multiplications: two products of T x T x D a layer, the rest by its parameters."""
    width = loop.config.num_attention_heads * loop.config.attention_head_dim
    products = sum(2 * layout.length**2 * width for layout in loop.layers.values())
    linear = loop.num_visual * sum(x.size for x in jax.tree.leaves(loop.params))  # text's weights on fewer tokens
    if hasattr(loop.config, "dual_attention_layers"):
        joint = sum(12 * layout.length for name, layout in loop.layers.items() if name.startswith("joint"))
        second = sum(4 * layout.length for name, layout in loop.layers.items() if name.startswith("attn2"))
        linear = width**2 * (joint + second)
    return products / (products + linear)


def measure(loop: Loop, targets: tuple[float, ...], rounds: int, steps: int, unrolled: bool) -> dict[str, Any]:
    stop, caches = 1 + steps, loop.caches()
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: loop.dense(1, stop),
        "without attention": lambda: loop.rest(1, stop),
    }
    if dense_implementation(loop.dtype, loop.config.attention_head_dim).implementation == "mosaic":
        runs["dense by cuDNN"] = lambda: loop.dense(1, stop, implementation="cudnn")
    if unrolled:
        runs["dense unrolled"] = lambda: loop.dense(1, stop, unroll=True)
    plans = {}
    for kind, reuse in (("mixed", 0.5), ("arrows", 0.0), ("reuse", 1.0)):
        for target in targets:
            try:
                plans[f"{kind} {target}"] = loop.plan(target, reuse=reuse)
            except ValueError as error:
                print(f"  {kind} {target}: {error}")
    plans["all cached"] = next(iter(plans.values())).with_method(slice(1, None), None, None, "cached")

    def planned(name: str) -> jax.Array:
        nonlocal caches
        latents, caches = loop.planned(caches, plans[name], 1, stop)
        return latents

    started = time.perf_counter()
    jax.block_until_ready(loop.dense(1, stop))
    first = time.perf_counter()
    jax.block_until_ready(planned(next(iter(plans))))
    compiled = {"dense": first - started, "planned": time.perf_counter() - first}
    times = interleaved(runs | {name: partial(planned, name) for name in plans}, rounds)
    share = 1 - ratio(times, "without attention", "dense")
    row: dict[str, Any] = {
        "shape": {"visual": loop.num_visual, "text": loop.num_text, "batch": loop.batch, "dtype": str(loop.dtype)},
        "heads": [loop.config.num_attention_heads, loop.config.attention_head_dim],
        "attention_share": {"measured": share, "of_arithmetic": arithmetic_share(loop)},
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "first_call_s": compiled,
        "plans": {},
        "seconds": times,
    }
    for name, plan in plans.items():
        pairs, speedup = kept(plan, range(1, stop)), ratio(times, "dense", name)
        ceiling = 1 / (1 - share * (1 - pairs))
        row["plans"][name] = {"kept": pairs, "speedup": speedup, "ceiling": ceiling, "of_ceiling": speedup / ceiling}
        if "dense by cuDNN" in runs:
            row["plans"][name]["speedup_over_cudnn"] = ratio(times, "dense by cuDNN", name)
    if stats := jax.devices()[0].memory_stats():
        row["peak_gb"] = stats["peak_bytes_in_use"] / 1e9
    return row


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}; the file keeps others"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed at a time, after the first")
    parser.add_argument(
        "--unrolled", action="store_true", help="dense steps with unrolled layers too: compiles minutes"
    )
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/sampling_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    rows = json.loads(args.out.read_text())["rows"] if args.cases and args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        loop = cases[name](args.steps + 1)
        row = rows[name] = machine | measure(loop, TARGETS[platform], args.rounds, args.steps, args.unrolled)
        del loop  # before the next is made
        print(f"{name}: {row['ms_per_step']['dense']:.1f} ms a step, attention {row['attention_share']}", flush=True)
        for plan, found in row["plans"].items():
            print("  " + plan.ljust(13) + ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
