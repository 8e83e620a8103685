"""Where the Mosaic kernel's time goes: arrow attention with one thing left out, or done another way, at a time.

    python -m benchmarks.leave_out [--rounds 7] [--out benchmarks/results/leave_out_h100.json]

Heads are all V/16, V/32 or V/64. The kernel runs as shipped, without masks, without the tiles of text queries, and with
its jobs dealt out in turn instead of drawn. The two in the middle are wrong on purpose; the others are checked.
`by steps` is what the shipped kernel would take if every step of 128 keys took what it takes when all heads are full.
The time over that is masks, the start and end of jobs, and blocks that wait for the last one. Hopper and jax 0.11 or
newer. Bursts with rests, as benchmarks/attention.py.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import Shape, check, clock, measure, shapes, visited, windows
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import arrow_attention
from pallas_kernels.backends.mosaic import block
from pallas_kernels.backends.mosaic import jobs as mosaic_jobs

ROWS = ("V/16", "V/32", "V/64")


def without_masks() -> Any:
    attend = block.attend_tile
    return patch.object(block, "attend_tile", lambda *args, kept=None, **kwargs: attend(*args, **kwargs))


@contextmanager
def without_text_queries() -> Iterator[None]:
    jobs, place = mosaic_jobs.Jobs, mosaic_jobs.Jobs.__call__

    def of_text(self: Any) -> Any:
        return self.text_tiles * self.heads * self.batch

    count = property(lambda self: self.tiles * self.heads * self.batch - of_text(self))
    with (
        patch.object(jobs, "count", count),
        patch.object(jobs, "__call__", lambda self, job: place(self, job + of_text(self))),
    ):
        yield


def dealt() -> Any:
    post = mosaic_jobs.Queue.post
    return patch.object(
        mosaic_jobs.Queue, "post", lambda self, given, counter, interpret: post(self, given, counter, True)
    )


VARIANTS: dict[str, Callable[[], Any]] = {
    "as shipped": ExitStack,
    "no masks": without_masks,
    "no text queries": without_text_queries,
    "jobs dealt out": dealt,
}


def run(shape: Shape, rounds: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    size = shape.batch, shape.layout.length, shape.heads, shape.head_dim
    q, k, v = (jnp.asarray(generator.standard_normal(size, np.float32), shape.dtype) for _ in range(3))
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    plans, calls = windows(shape.layout.num_visual, shape.heads), {}
    for variant, change in VARIANTS.items():
        attend = jax.jit(
            partial(arrow_attention, layout=shape.layout, implementation="mosaic"), donate_argnames="cache"
        )
        carry = [jnp.zeros_like(q)]

        def call(half_window: jax.Array, attend: Any = attend, carry: list[jax.Array] = carry) -> jax.Array:
            carry[0] = attend(q, k, v, half_window, cache=carry[0])
            return carry[0]

        for row in ("full", *ROWS) if variant == "as shipped" else ROWS:
            with change():
                out = call(jnp.asarray(plans[row]))
            if variant in ("as shipped", "jobs dealt out"):
                check(out, exact, plans[row], shape)
            calls[f"{variant} {row}"] = partial(call, jnp.asarray(plans[row]))
    times = measure(calls, rounds)
    ms = {name: 1e3 * median(values) for name, values in times.items()}
    by_steps = {row: ms["as shipped full"] * visited(plans[row], shape) for row in ROWS}
    return {"shape": shape.name, "clock_mhz": clock(), "milliseconds": ms, "by_steps": by_steps, "all_seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/leave_out_h100.json"))
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "shapes": []}
    for shape in shapes():
        measured = run(shape, args.rounds)
        result["shapes"].append(measured)
        print(shape.name, f"{measured['clock_mhz']} MHz")
        for row in ROWS:
            parts = ", ".join(f"{name} {measured['milliseconds'][f'{name} {row}']:.3f}" for name in VARIANTS)
            print(f"  {row}: by steps {measured['by_steps'][row]:.3f} ms, {parts}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
