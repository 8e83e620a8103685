"""Tile sizes of the "triton" arrow kernel, timed side by side on a GPU: `python -m benchmarks.tiles [--out FILE]`.

The candidates are those that compile for the GPU without spills. Tiles are timed in turn, medians are taken.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.aot import CANDIDATES
from benchmarks.attention import measure, shapes, windows
from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import arrow_attention, register
from pallas_kernels.backends.triton.backend import Triton
from pallas_kernels.backends.triton.tiles import Tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiles_h200.json"))
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU, and on a CPU the kernels have no tiles to choose.")
    results = []
    for shape in tqdm(shapes()):
        size = shape.batch, shape.layout.length, shape.heads, shape.head_dim
        generator = np.random.default_rng(0)
        q, k, v = (jnp.asarray(generator.standard_normal(size, np.float32), shape.dtype) for _ in range(3))
        plans = windows(shape.layout.num_visual, shape.heads)
        calls: dict[str, Any] = {}
        for candidate in CANDIDATES[shape.head_dim]:
            register(str(candidate), Triton(Tiles(*candidate)))
            attend = jax.jit(partial(arrow_attention, layout=shape.layout, implementation=str(candidate)))
            for name in ("full", "V/16", "V/64", "mixed"):
                call = partial(attend, q, k, v, jnp.asarray(plans[name]))
                call()  # compiles with these tiles
                calls[f"{candidate} {name}"] = call
        times = {name: 1e3 * median(values) for name, values in measure(calls, args.rounds).items()}
        results.append({"shape": shape.name, "milliseconds": times})
        tqdm.write(f"{shape.name}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()))
    content = {"machine": describe_machine(), "device": jax.devices()[0].device_kind, "shapes": results}
    write_whole(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
