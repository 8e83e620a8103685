"""The attention kernels compiled for NVIDIA GPUs that are not here: what their machine code takes and does.

    JAX_PLATFORMS=cpu python3.12 -m benchmarks.aot [--out benchmarks/results/aot.json]

Rows are the shipped configurations, and the other tiles that were considered. A row holds registers, spills, shared
memory, blocks per multiprocessor, asynchronous instructions, and the program's copies and aliasing. It also holds
instructions per score element of the loops without and with masks. `pallas_kernels.cost` turns them into seconds.
`predicted` is the time of FLUX (head_dim 128) or SD3 (64) at 2048 px: with every head full, and with V/64 tokens on
each side. Writes JSON and a Markdown table. `pallas_kernels.inspect.aot` says what must be installed. About five
minutes.

`python3.12 -m benchmarks.attention --aot` sets the implementations side by side instead (`compare`): half a minute.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import FULL, Layout, arrow_attention, cost, nested_arrow_attention, register
from pallas_kernels.backends.triton.backend import Triton
from pallas_kernels.backends.triton.tiles import TABLE, Tiles
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import weight_copies

HEADS = 24
MEASURED = Path("benchmarks/results/attention_h100.json")
CANDIDATES = {
    64: [(64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3)],
    128: [(64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2)],
}
"""Tiles of the "triton" kernel by head_dim: rows, keys, warps, stages."""

LAYOUTS = {64: Layout(333, 16384, text_first=False), 128: Layout(512, 16384, text_first=True)}


def build(
    gpu: str, kind: str, head_dim: int, dtype: str, implementation: str
) -> tuple[aot.Target, aot.Compiled, aot.Kernel]:
    """The kernel that attends, in a program of its own with a cache that is given away."""
    target, layout = aot.target(gpu), LAYOUTS[head_dim]
    tensor = target.abstract(jax.ShapeDtypeStruct((1, layout.length, HEADS, head_dim), jnp.dtype(dtype)))
    options = {"layout": layout, "implementation": implementation}
    if kind == "arrow":
        function = jax.jit(partial(arrow_attention, **options), donate_argnames="cache")
        half_window = jax.ShapeDtypeStruct((HEADS,), jnp.int32)
        compiled, kernels = aot.kernels(target, function, tensor, tensor, tensor, half_window, cache=tensor)
    else:
        function = jax.jit(partial(nested_arrow_attention, **options))
        compiled, kernels = aot.kernels(target, function, tensor, tensor, tensor, jnp.arange(4, dtype=jnp.int32))
    names = (
        *("arrow_attention", "nested_arrow_attention"),
        *("arrow_attention_mosaic_mosaic_gpu_kernel", "_arrow_attention"),  # Mosaic's, jax-triton's
    )
    return target, compiled, next(kernel for kernel in kernels if kernel.name in names)


def examine(gpu: str, kind: str, head_dim: int, dtype: str, tiles: Tiles) -> dict[str, Any]:
    """One of the "triton" kernels, with other tiles."""
    register(str(tiles), Triton(tiles))
    target, compiled, kernel = build(gpu, kind, head_dim, dtype, str(tiles))
    inputs = ["q", "k", "v"] + ["cache"] * (kind == "arrow")
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


def compare(gpu: str) -> list[dict[str, Any]]:
    """Arrow attention in bfloat16, as shipped, by every implementation for a GPU; a row says why one is missing."""
    rows = []
    for implementation, head_dim in product(("triton", "mosaic", "jax_triton"), LAYOUTS):
        row: dict[str, Any] = {"implementation": implementation, "head_dim": head_dim}
        try:
            row |= _summary(gpu, implementation, head_dim)
        except (ImportError, NotImplementedError, RuntimeError, StopIteration, ValueError) as error:
            row["missing"] = (str(error) or type(error).__name__).splitlines()[0]
        rows.append(row | _measured(implementation, head_dim))
    return rows


def _summary(gpu: str, implementation: str, head_dim: int) -> dict[str, Any]:
    target, _, kernel = build(gpu, "arrow", head_dim, "bfloat16", implementation)
    if implementation == "mosaic":
        from pallas_kernels.backends.mosaic import arrow as mosaic  # needs a newer jax than the rest

        rows, keys, warps, alone = mosaic.ROWS, mosaic.KEYS, 4, cost.FETCHED
        computing = kernel.warps - warps  # the last warpgroup fetches
    else:
        tiles = TABLE[gpu, head_dim, 2]
        rows, keys, warps, alone = tiles.rows, tiles.keys, tiles.warps, cost.ALONE
        computing = kernel.warps
    clean, *_, masked = (loop.per_score(rows * keys // (32 * warps)) for loop in kernel.softmax_loops)
    blocks = aot.blocks_per_sm(kernel, target)
    return {
        "registers": kernel.registers,
        "most_registers": kernel.most_registers,
        "spill_bytes": kernel.spill_bytes,
        "shared_bytes": kernel.shared_bytes,
        "blocks_per_sm": blocks,
        "computing_warps_per_sm": blocks * computing,
        "instructions_per_score": {"clean": clean, "masked": masked},
        "ceiling_share": cost.ceiling_share(gpu, head_dim, blocks * computing, clean, alone),
    }


def _measured(implementation: str, head_dim: int) -> dict[str, float]:
    """Share of the ceiling on an H100, whose multiprocessors are an H200's, with every head full at 2048 px."""
    known = json.loads(MEASURED.read_text())["shapes"]
    shape = next(entry for entry in known if entry["shape"].endswith("2K") and entry["head_dim"] == head_dim)
    names = ["arrow full"] * (shape["arrow"] == implementation) + [f"{implementation} full"]
    times = [shape["milliseconds"][name] for name in names if name in shape["milliseconds"]]
    operations = 4 * head_dim * shape["batch"] * shape["heads"] * LAYOUTS[head_dim].length ** 2
    return {"measured_share_h100": operations / (1e-3 * times[0] * cost.GPUS["h200"].flops)} if times else {}


def comparison(gpu: str, rows: list[dict[str, Any]], jax_version: str) -> str:
    ceiling = cost.GPUS[gpu].flops / 1e12
    names = "registers", "shared bytes", "blocks per SM", "clean", "masked", "predicted", "measured, H100"
    lines = [
        f"Arrow attention in bfloat16, compiled for {gpu.upper()} without a GPU, jax {jax_version}:",
        "`python -m benchmarks.attention --aot`.",
        "",
        f"| implementation | head_dim | {' | '.join(names)} |",
        f"|{'---|' * (len(names) + 2)}",
    ]
    for row in rows:
        cells = [row["implementation"], row["head_dim"]]
        share = row.get("measured_share_h100")
        measured = "" if share is None else f"{share:.0%} ({share * ceiling:.0f})"
        if "missing" in row:
            cells += [row["missing"], "", "", "", "", "", measured]
        else:
            registers = [row["registers"]] + [row["most_registers"]] * (row["most_registers"] > row["registers"])
            predicted = f"{row['ceiling_share']:.0%} ({row['ceiling_share'] * ceiling:.0f})"
            cells += [" to ".join(map(str, registers)), row["shared_bytes"], row["blocks_per_sm"]]
            cells += [f"{value:.2f}" for value in row["instructions_per_score"].values()] + [predicted, measured]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Registers: of a thread at launch, and of one that computes where warps that fetch give theirs away. Clean and",
        "masked: instructions per score of the loops without and with masks, of a thread that computes.",
        "",
        f"Predicted: share of the tensor cores' {ceiling:.0f} TFLOP/s, and TFLOP/s, of the loop without masks, by",
        "`pallas_kernels.cost`. A warp takes the tensor cores, the exponential unit and its issue slots one after the",
        "other; with n warps per scheduler a score takes n^(-1/3) of that sum, because they overlap. For Triton times",
        f"{cost.ALONE}, fitted on an H200: its warps also load. For Mosaic, whose loads are other warps', times",
        f"{cost.FETCHED}: chosen knowing two timings like those measured here.",
        "",
        f"Measured: every head full at 2048 px ({MEASURED.name}), by the kernels of that day, which may be older than",
        "this machine code.",
    ]
    return "\n".join(lines) + "\n"


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
        jobs += [(gpu, kind, head_dim, dtype, shipped) for kind in kinds]
    for (gpu, head_dim, size), shipped in TABLE.items():
        others = [Tiles(*tiles) for tiles in {*CANDIDATES[head_dim], (64, 64, 4, 2)}] if size == 2 else []
        jobs += [(gpu, "arrow", head_dim, "bfloat16", tiles) for tiles in others if tiles != shipped]
    rows = []
    for job in tqdm(jobs):
        row = examine(*job)
        rows.append(row | {"predicted_ms": predict(row)})
    save(args.out, rows, markdown(rows, jax.__version__))


def save(out: Path, rows: list[dict[str, Any]], table: str) -> None:
    write_whole(out, json.dumps({"machine": describe_machine(), "kernels": rows}, indent=1) + "\n")
    write_whole(out.with_suffix(".md"), table)


if __name__ == "__main__":
    main()
