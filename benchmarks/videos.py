"""A step of CogVideoX and HunyuanVideo at the published sizes, dense and by plans of arrows in two orders of tokens.

    python -m benchmarks.videos [CASE ...] [--rounds 3] [--steps 1] [--out FILE]

Weights are random, which time like real ones. Plans keep a share of the query-key pairs. Half of the saving is by
cached heads, half by arrows, and half of the arrows run over time. "native" is the plan whose arrows all run frame by
frame: the difference is what transposing costs. The ceiling is that of `benchmarks.sampling`. The first step, always
dense, is not timed. Results are kept after every case, in benchmarks/results/videos_<platform>.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.loops import Loop, interleaved, kept, ratio
from benchmarks.machine import describe_machine
from benchmarks.sampling import Case
from dfa2_jax import Plan
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.plan.method import Method
from dfa2_jax.sampling.tokens import Grid
from pallas_kernels import dense_implementation

TARGETS = {"CogVideoXTransformer3DModel": (0.5, 0.3, 0.2), "HunyuanVideoTransformer3DModel": (0.5, 0.35, 0.25, 0.15)}
"""Shares of the pairs that plans keep."""


def cogvideox(layers: int, heads: int, grid: Grid, dtype: Any = jnp.bfloat16, **config: Any) -> Case:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "use_rotary_positional_embeddings": True}
    return Case("CogVideoXTransformer3DModel", sizes | config, grid, 226, guided=True, dtype=dtype)


NEWER = {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81}
"""Fields of CogVideoX 1.5."""
HUNYUAN = Case("HunyuanVideoTransformer3DModel", {}, Grid(33, 45, 80), 256, guided=False, dtype=jnp.bfloat16)
"""A text of 192 tokens, padded to 256."""
SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "text_embed_dim": 64,
}
GPU = {
    "CogVideoX-5B 49 x 480 x 720": cogvideox(42, 48, Grid(13, 30, 45)),
    "CogVideoX1.5-5B 81 x 768 x 1360": cogvideox(42, 48, Grid(11, 48, 85), **NEWER),
    "HunyuanVideo 129 x 544 x 960": HUNYUAN._replace(grid=Grid(33, 34, 60)),
    "HunyuanVideo 129 x 720 x 1280": HUNYUAN,
}
CPU = {
    "CogVideoX, 4 layers, 1,280 tokens": cogvideox(4, 6, Grid(5, 16, 16), jnp.float32),
    "HunyuanVideo, 4 layers, 1,280 tokens": HUNYUAN._replace(
        config=SMALL | {"rope_axes_dim": (8, 28, 28)}, grid=Grid(5, 16, 16), num_text=32, dtype=jnp.float32
    ),
}


def in_native_order(plan: Plan) -> Plan:
    """The plan whose arrows are as wide, and all run frame by frame."""
    methods = list(dict.fromkeys(Method(str(method).replace(", time", "")) for method in plan.methods))
    place = np.array([methods.index(Method(str(method).replace(", time", ""))) for method in plan.methods], np.uint8)
    return Plan(plan.setting, tuple(methods), place[plan.choices])


def measure(loop: Loop, targets: tuple[float, ...], rounds: int, steps: int) -> dict[str, Any]:
    stop, caches = 1 + steps, loop.caches()
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: loop.dense(1, stop),
        "without attention": lambda: loop.rest(1, stop),
    }
    if dense_implementation(loop.dtype, loop.config.attention_head_dim).implementation == "mosaic":
        runs["dense by cuDNN"] = lambda: loop.dense(1, stop, implementation="cudnn")
    plans = {f"keeps {target}": loop.plan(target, reuse=0.5) for target in targets}
    plans |= {f"{name}, native": in_native_order(plan) for name, plan in plans.items()}

    def planned(name: str) -> jax.Array:
        nonlocal caches
        latents, caches = loop.planned(caches, plans[name], 1, stop)
        return latents

    started = time.perf_counter()
    times = interleaved(runs | {name: partial(planned, name) for name in plans}, rounds)
    share = 1 - ratio(times, "without attention", "dense")
    row: dict[str, Any] = {
        "tokens": {"visual": loop.num_visual, "text": loop.num_text, "batch": loop.batch, "dtype": str(loop.dtype)},
        "heads": [loop.config.num_attention_heads, loop.config.attention_head_dim],
        "attention_share": share,
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "plans": {},
        "seconds": times,
        "benchmark_s": time.perf_counter() - started,
    }
    for name, plan in plans.items():
        pairs, speedup = kept(plan, range(1, stop)), ratio(times, "dense", name)
        ceiling = 1 / (1 - share * (1 - pairs))
        row["plans"][name] = {"kept": pairs, "speedup": speedup, "ceiling": ceiling}
        if "dense by cuDNN" in runs:
            row["plans"][name]["speedup_over_cudnn"] = ratio(times, "dense by cuDNN", name)
        if f"{name}, native" in plans:
            row["plans"][name]["transposing"] = ratio(times, name, f"{name}, native") - 1
    if stats := jax.devices()[0].memory_stats():
        row["peak_gb"] = stats["peak_bytes_in_use"] / 1e9
    return row


def main() -> None:
    platform = jax.default_backend()
    cases = CPU if platform == "cpu" else GPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(cases)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed at a time, after the first")
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/videos_{platform}.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in cases]:
        parser.error(f"unknown {unknown}: choose from {list(cases)}")
    rows = json.loads(args.out.read_text())["rows"] if args.cases and args.out.exists() else {}
    machine = {"machine": describe_machine(), "device": jax.devices()[0].device_kind}
    for name in args.cases or cases:
        loop = cases[name](args.steps + 1)
        row = rows[name] = machine | measure(loop, TARGETS[cases[name].class_name], args.rounds, args.steps)
        del loop  # before the next is made
        print(f"{name}: {json.dumps(row['ms_per_step'])}, {json.dumps(row['plans'], indent=1)}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
