"""Where the time of a dense denoising step goes on an NVIDIA GPU, by kernels, and what `XLA_OPTIONS` save.

    python -m benchmarks.profile [CASE ...] [--rounds 5] [--out benchmarks/results/profile_gpu.json]

Cases are those of benchmarks/sampling.py. The step is timed with attention by cuDNN, as it is shipped otherwise, and
without these options, in turn. Then each is traced once more, for the milliseconds of its kernels.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax

from benchmarks.loops import Loop, interleaved, ratio
from benchmarks.machine import describe_machine
from benchmarks.sampling import GPU
from dfa2_jax.io.atomic import write_whole
from dfa2_jax.sampling.loop import denoise

KINDS = {
    "exchange": ("nccl",),
    "attention": ("sdpa", "mosaic", "arrow"),
    "products": ("nvjet", "gemm", "gemv", "cublas", "cutlass"),
    "copies": ("memcpy", "MemcpyD2D"),
}
"""By what the names of their kernels contain, in this order; the rest is elementwise operations and norms."""


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel for part in parts)), "the rest")


def kernel_ms(run: Any) -> tuple[dict[str, float], float]:
    """Milliseconds of each kernel that a call runs on the first GPU, longest first, and from the first's start to the
    last's end."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [
            (event.name, event.start_ns, event.duration_ns)
            for plane in planes
            if plane.name == "/device:GPU:0"
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if not event.name.startswith(("MemcpyH2D", "MemcpyD2H"))
        ]
    found: dict[str, float] = defaultdict(float)
    for name, _, duration in events:
        found[name] += duration / 1e6
    last = max(start + duration for _, start, duration in events)
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return dict(ordered), (last - min(start for _, start, _ in events)) / 1e6


def by_kind(run: Any, steps: int) -> dict[str, Any]:
    """Milliseconds of a step by kinds of kernels, between kernels, and of the longest; of a call of so many steps.

    Kernels that run at once both count, so that gaps can be negative.
    """
    found, span = kernel_ms(run)
    kinds: dict[str, float] = defaultdict(float)
    for kernel, ms in found.items():
        kinds[kind_of(kernel)] += ms / steps
    return {
        "ms": kinds,
        "gaps_ms": span / steps - sum(kinds.values()),
        "longest": [[kernel[:80], ms / steps] for kernel, ms in list(found.items())[:20]],
    }


def measure(loop: Loop, rounds: int, steps: int) -> dict[str, Any]:
    plain = jax.jit(denoise.__wrapped__, static_argnames=("graph", "implementation"), donate_argnames="state")
    runs = {
        name: partial(
            function, loop.graph, loop.params, loop.start(), loop.inputs, 1, 1 + steps, implementation="cudnn"
        )
        for name, function in {"shipped": denoise, "without": plain}.items()
    }
    times = interleaved(runs, rounds)
    return {
        "ms_per_step": {name: 1e3 * median(values) / steps for name, values in times.items()},
        "without_over_shipped": ratio(times, "without", "shipped"),
        "seconds": times,
        "kernels": {name: by_kind(run, steps) for name, run in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(GPU)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_gpu.json"))
    args = parser.parse_args()
    if unknown := [case for case in args.cases if case not in GPU]:
        parser.error(f"unknown {unknown}: choose from {list(GPU)}")
    if jax.default_backend() != "gpu":
        parser.error("this traces the kernels of an NVIDIA GPU; the default device is none.")
    result: dict[str, Any] = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "rows": {}}
    for name in args.cases or GPU:
        row = result["rows"][name] = measure(GPU[name](args.steps + 1), args.rounds, args.steps)
        print(f"{name}: {row['ms_per_step']}, {row['without_over_shipped']:.2f}", flush=True)
        for program, found in row["kernels"].items():
            kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in found["ms"].items())
            print(f"  {program}: {kinds}, gaps {found['gaps_ms']:.1f}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
