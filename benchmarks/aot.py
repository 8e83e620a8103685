"""The attention kernels compiled for NVIDIA GPUs that are not here: what their machine code takes and does.

    JAX_PLATFORMS=cpu python3.12 -m benchmarks.aot [--out benchmarks/results/aot.json]

For every shipped configuration, and for the other tiles that were considered: registers, spills, shared memory, blocks
per multiprocessor, asynchronous instructions, copies and aliasing in the program, instructions per score element of the
loops without and with masks. `pallas_kernels.cost` turns them into seconds; `predicted` is the time of FLUX (head_dim
128) or SD3 (64) at 2048 px with every head full, and with V/64 tokens on each side. Writes JSON and a Markdown table.
`pallas_kernels.aot` says what must be installed. About five minutes.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from benchmarks.tiles import CANDIDATES
from pallas_kernels import FULL, Layout, aot, arrow, arrow_attention, cost, nested_arrow_attention
from pallas_kernels.hlo import weight_copies
from pallas_kernels.tiles import TABLE, Tiles

HEADS = 24
LAYOUTS = {64: Layout(333, 16384, text_first=False), 128: Layout(512, 16384, text_first=True)}


def examine(gpu: str, kind: str, head_dim: int, dtype: str, tiles: Tiles) -> dict[str, Any]:
    """One kernel in a program of its own, with a cache that is given away."""
    target, layout = aot.target(gpu), LAYOUTS[head_dim]
    arrow.tiles_for = lambda *_: tiles
    one = jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), jnp.dtype(dtype))
    inputs = ["q", "k", "v"] + ["cache"] * (kind == "arrow")
    if kind == "arrow":
        function = jax.jit(partial(arrow_attention, layout=layout), donate_argnames="cache")
        half_window = jax.ShapeDtypeStruct((HEADS,), jnp.int32)
        compiled, kernels = aot.kernels(target, function, *target.abstract((one,) * 3), half_window, cache=one)
    else:
        function = jax.jit(partial(nested_arrow_attention, layout=layout))
        compiled, kernels = aot.kernels(target, function, *target.abstract((one,) * 3), jnp.arange(4, dtype=jnp.int32))
    name = "arrow_attention" if kind == "arrow" else "nested_arrow_attention"
    kernel = next(kernel for kernel in kernels if kernel.name == name)
    scores = tiles.rows * tiles.keys // (32 * tiles.warps)
    loops = [loop.per_score(scores) for loop in kernel.softmax_loops]
    return {
        "gpu": gpu,
        "kernel": kind,
        "head_dim": head_dim,
        "dtype": dtype,
        "tiles": [tiles.rows, tiles.keys, tiles.warps, tiles.stages],
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "blocks_per_sm": aot.blocks_per_sm(kernel, target),
        "wgmma": kernel.wgmma,
        "mma": kernel.mma,
        "cp_async": kernel.cp_async,
        "instructions_per_score": loops,
        "copies_of_inputs": sum(len(weight_copies(compiled.hlo, name)) for name in inputs),
        "output_in_cache": compiled.alias_bytes == compiled.output_bytes,
    }


def predict(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds at 2048 px, of 16-bit arrow kernels."""
    if row["kernel"] != "arrow" or row["dtype"] != "bfloat16":
        return {}
    gpu, head_dim, loops = row["gpu"], row["head_dim"], row["instructions_per_score"]
    layout, tiles = LAYOUTS[head_dim], Tiles(*row["tiles"])
    code = cost.Code(row["blocks_per_sm"], loops[0], loops[-1])
    windows = {"full": FULL, "V/64": layout.num_visual // 64}
    return {
        name: 1e3 * cost.arrow_seconds(gpu, head_dim, layout, np.full(HEADS, window), tiles=tiles, code=code)
        for name, window in windows.items()
    }


def markdown(rows: list[dict[str, Any]], jax_version: str) -> str:
    columns = (
        "gpu", "kernel", "head_dim", "dtype", "tiles", "registers", "spill_bytes", "shared_bytes", "blocks_per_sm",
        "wgmma", "mma", "cp_async", "copies_of_inputs", "output_in_cache",
    )  # fmt: skip
    lines = [
        f"Compiled without a GPU, jax {jax_version}: `python -m benchmarks.aot`.",
        "Tiles: query rows, keys, warps, stages. Loops: instructions per score element, the last with masks.",
        "Predicted: `pallas_kernels.cost`, milliseconds of 24 heads at 2048 px, all full and all V/64; on an A100 the",
        "model was never compared with a timing. Shipped tiles come first.",
        "",
        f"| {' | '.join(columns)} | loops | predicted |",
        f"|{'---|' * (len(columns) + 2)}",
    ]
    for row in rows:
        loops = ", ".join(f"{count:.1f}" for count in row["instructions_per_score"])
        predicted = ", ".join(f"{ms:.2f}" for ms in row["predicted_ms"].values())
        lines.append(f"| {' | '.join(str(row[column]) for column in columns)} | {loops} | {predicted} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/aot.json"))
    args = parser.parse_args()
    jobs = []
    for (gpu, head_dim, size), shipped in TABLE.items():
        dtype, kinds = (
            ("bfloat16", ["arrow", "nested"]) if size == 2 else ("float32", ["arrow"])
        )  # float16: as bfloat16
        jobs += [(gpu.lower(), kind, head_dim, dtype, shipped) for kind in kinds]
    for (gpu, head_dim, size), shipped in TABLE.items():
        others = [Tiles(*tiles) for tiles in {*CANDIDATES[head_dim], (64, 64, 4, 2)}] if size == 2 else []
        jobs += [(gpu.lower(), "arrow", head_dim, "bfloat16", tiles) for tiles in others if tiles != shipped]
    rows = []
    for job in tqdm(jobs):
        row = examine(*job)
        rows.append(row | {"predicted_ms": predict(row)})
    args.out.write_text(json.dumps({"machine": describe_machine(), "kernels": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(rows, jax.__version__))


if __name__ == "__main__":
    main()
