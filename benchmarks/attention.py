"""Arrow attention against dense attention and other libraries, side by side in one run; on a GPU if JAX has one.

    python -m benchmarks.attention [--rounds 5] [--only 1K] [--out benchmarks/results/attention_cpu.json]
    JAX_PLATFORMS=cpu python3.12 -m benchmarks.attention --aot [--out benchmarks/results/attention_aot.json]

Every result is first compared with float64 over some of the rows; nothing wrong is timed. Rows: dense; all heads at
V/16, V/32 and V/64 tokens on each side; a third of the heads each full, 1/8 and 1/32; all cached; and a nested call
that gives full attention and four windows at once. Contenders are timed in turn, medians are taken. `efficiency` is the
speedup over a dense contender times the exact density, `tile_efficiency` (on a GPU) times the share of tiles that the
kernel visits: 1 where cost follows the kept pairs, or the tiles. `tflops` counts these tiles; `ceilings` are what the
same machine reaches in the same rounds in a product of square matrices and in a copy (bytes read and written).

On a GPU each burst of calls follows a rest, at the clock that a cool card has (`clock_mhz`, after the last). Without
rests an H100 lowers it to stay within its power limit, from 1,980 to 1,455 MHz under full attention at 2048 px.
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs a share of the GPU
# Else torch's workers spin for milliseconds after each call, on the cores of whoever is timed next: arrows in full,
# which come after torch, then took 1.16 times the time of the same tiles in dense attention (1.03 without).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.machine import describe_machine
from pallas_kernels import CACHED, FULL, Layout, arrow_attention, nested_arrow_attention
from pallas_kernels import api as arrow
from pallas_kernels.backends.triton.tiles import tiles_for
from pallas_kernels.mask import EVERYTHING, count_tiles, density

BURST, REST = 0.012, 0.05
"""Seconds, on a GPU."""

PRODUCT, COPY = {"cpu": 2048, "gpu": 8192}, {"cpu": 2**28, "gpu": 2**30}
"""Rows and columns of the matrices; bytes."""

LARGEST_SCORES = 4e9
"""Bytes of scores: dense attention of jax.nn holds them two or three times."""


class Shape(NamedTuple):
    name: str
    batch: int
    heads: int
    head_dim: int
    layout: Layout
    dtype: str


def shapes() -> list[Shape]:
    if jax.default_backend() == "gpu":
        return [
            Shape("FLUX 1K", 1, 24, 128, Layout(512, 4096, True), "bfloat16"),
            Shape("FLUX 2K", 1, 24, 128, Layout(512, 16384, True), "bfloat16"),
            Shape("SD3 1K", 2, 24, 64, Layout(333, 4096, False), "bfloat16"),
            Shape("SD3 2K", 1, 24, 64, Layout(333, 16384, False), "bfloat16"),
            Shape("FLUX 4K", 1, 24, 128, Layout(512, 65536, True), "bfloat16"),
        ]
    return [
        Shape(f"{name}, text {'first' if text_first else 'last'}, {dtype}", 1, heads, 64,
              Layout(text, visual, text_first), dtype)
        for name, heads, text, visual in (("512", 8, 256, 1024), ("1K", 8, 512, 4096), ("2K", 4, 512, 16384))
        for text_first in (True, False)
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip


def windows(visual: int, heads: int) -> dict[str, np.ndarray]:
    mixed = [(FULL, visual // 8, visual // 32)[3 * head // heads] for head in range(heads)]
    rows = {
        "full": [FULL] * heads,
        "V/16": [visual // 16] * heads,
        "V/32": [visual // 32] * heads,
        "V/64": [visual // 64] * heads,
        "mixed": mixed,
        "cached": [CACHED] * heads,
    }
    return {name: np.array(row, np.int32) for name, row in rows.items()}


def expected(q: np.ndarray, k: np.ndarray, v: np.ndarray, half_window: int, layout: Layout, rows: np.ndarray) -> Any:
    """Output of some rows of one head, in float64."""
    position = np.arange(layout.length)
    text = (position >= layout.text.start) & (position < layout.text.stop)
    kept = text[rows][:, None] | text | (np.abs(rows[:, None] - position) <= half_window) | (half_window == FULL)
    scores = np.where(kept, (q[rows] @ k.T) * q.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v


def check(out: Any, qkv: list[np.ndarray], half_window: np.ndarray, shape: Shape) -> float:
    """Largest error of 40 rows of the first, middle and last head, of the first and the last of the batch.

    Raises:
        AssertionError: it is more than rounding.
    """
    out = np.asarray(out, np.float64)
    rows = np.unique(np.linspace(0, shape.layout.length - 1, 40).astype(int))
    error = 0.0
    for one, head in product({0, shape.batch - 1}, {0, shape.heads // 2, shape.heads - 1}):
        q, k, v = (x[one, :, head] for x in qkv)
        want = expected(q, k, v, half_window[head], shape.layout, rows)
        error = np.maximum(error, np.abs(out[one, rows, head] - want).max())  # a NaN stays
    limit = 1e-5 if shape.dtype == "float32" else 2e-2
    if not error < limit:
        raise AssertionError(f"{shape.name}: error {error} is above {limit}; nothing was timed.")
    return float(error)


def contenders(shape: Shape) -> tuple[dict[str, Callable[[], Any]], dict[str, str], dict[str, float]]:
    """Ready calls; why others are missing; errors."""
    generator = np.random.default_rng(0)
    size = shape.batch, shape.layout.length, shape.heads, shape.head_dim
    q, k, v = (jnp.asarray(generator.standard_normal(size, np.float32), shape.dtype) for _ in range(3))
    exact = [np.asarray(x, np.float64) for x in (q, k, v)]
    calls: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}

    def add(name: str, call: Callable[[], Any], to_numpy: Callable[[Any], Any], half_window: np.ndarray) -> None:
        try:
            errors[name] = check(to_numpy(call()), exact, half_window, shape)
            calls[name] = call
        except AssertionError:
            raise
        except Exception as error:
            if name.startswith("arrow "):
                raise  # all others are compared with it
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"

    plans = windows(shape.layout.num_visual, shape.heads)
    carry = [jnp.zeros_like(q)]

    def ours(attend: Any, half_window: jax.Array) -> jax.Array:
        carry[0] = attend(q, k, v, half_window, cache=carry[0])
        return carry[0]

    contestants: dict[str, str | None] = {"arrow": None}  # what this device gets by default
    if jax.default_backend() == "gpu":
        default = arrow.arrow_implementation(shape.dtype, shape.head_dim).implementation
        contestants |= {name: name for name in arrow.KERNELS if name != default}
    for label, implementation in contestants.items():
        options = {"layout": shape.layout, "implementation": implementation}
        attend = jax.jit(partial(arrow_attention, **options), donate_argnames="cache")
        for name, row in plans.items():
            call = partial(ours, attend, jnp.asarray(row))
            if name != "cached":
                add(f"{label} {name}", call, np.array, row)
            elif f"{label} full" in calls:
                before = np.array(carry[0])
                if not np.array_equal(before, call()):
                    raise AssertionError(f"{shape.name}: {label} changed what cached heads return; nothing was timed.")
                calls[f"{label} cached"] = call
    ladder = [shape.layout.num_visual // part for part in (64, 32, 16, 8)]
    nested = jax.jit(partial(nested_arrow_attention, layout=shape.layout))
    outs = np.asarray(nested(q, k, v, jnp.array(ladder, jnp.int32)))
    for window, out in zip([*ladder, FULL], outs, strict=True):
        errors["nested"] = max(errors.get("nested", 0), check(out, exact, np.full(shape.heads, window), shape))
    calls["nested"] = partial(nested, q, k, v, jnp.array(ladder, jnp.int32))
    as_float = partial(np.asarray, dtype=np.float64)
    full = plans["full"]
    baseline = "cudnn" if jax.default_backend() == "gpu" else None
    dense = jax.jit(partial(arrow_attention, layout=shape.layout, implementation=baseline))
    add("dense", partial(dense, q, k, v), as_float, full)
    scores = 4 * shape.batch * shape.heads * shape.layout.length**2
    if scores <= LARGEST_SCORES:
        plain = jax.jit(jax.nn.dot_product_attention)
        add("jax.nn", partial(plain, q, k, v), as_float, full)
    else:
        failed["jax.nn"] = f"its scores take {scores / 1e9:.1f} GB"
    if jax.default_backend() == "gpu":
        try:
            import tokamax

            other = jax.jit(tokamax.dot_product_attention)
            add("tokamax", partial(other, q, k, v), as_float, full)
        except ImportError as error:
            failed["tokamax"] = str(error)
    add_torch(add, failed, [np.array(x, np.float32) for x in (q, k, v)], shape, plans)
    return calls | limits(q.dtype), failed, errors


def limits(dtype: Any) -> dict[str, Callable[[], Any]]:
    """What nothing here can be faster than: a product of random matrices, and a copy."""
    size, nbytes = PRODUCT[jax.default_backend()], COPY[jax.default_backend()]
    draw = jax.jit(partial(jax.random.normal, dtype=dtype), static_argnames="shape")
    a, b = (draw(jax.random.key(i), shape=(size, size)) for i in range(2))
    long = draw(jax.random.key(2), shape=(nbytes // dtype.itemsize,))
    return {"product": partial(jax.jit(jnp.matmul), a, b), "copy": partial(jax.jit(jnp.copy), long)}


def add_torch(add: Any, failed: dict[str, str], qkv: list[np.ndarray], shape: Shape, plans: dict) -> None:
    """torch's SDPA, and FlexAttention with the same masks (compiled once for all of them)."""
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        failed["torch"] = str(error)
        return
    if not os.environ.get("TRITON_CACHE_DIR"):  # jax-triton empties it on import, and torch.compile then fails
        os.environ.pop("TRITON_CACHE_DIR", None)
    on_gpu = jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    q, k, v = (
        torch.from_numpy(x).to(device=device, dtype=getattr(torch, shape.dtype)).transpose(1, 2).contiguous()
        for x in qkv
    )
    layout, length = shape.layout, shape.layout.length
    text = torch.zeros(length, dtype=torch.bool, device=device)
    text[layout.text] = True
    torch._dynamo.reset()  # else it stops compiling at the eighth set of shapes and masks
    compiled = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask) if on_gpu else create_block_mask  # else it makes all of the mask first

    def back(out: Any) -> Any:
        return out.transpose(1, 2).double().cpu().numpy()

    with torch.no_grad():
        add("torch SDPA", partial(torch.nn.functional.scaled_dot_product_attention, q, k, v), back, plans["full"])
        for name in ("full", "V/16", "V/64", "mixed"):
            window = torch.as_tensor(np.where(plans[name] == FULL, length, plans[name]), device=device)

            def kept(b: Any, h: Any, i: Any, j: Any, window: Any = window) -> Any:
                return text[i] | text[j] | ((i - j).abs() <= window[h])

            try:
                mask = make_mask(kept, 1, shape.heads, length, length, device=device)
            except Exception as error:
                failed[f"FlexAttention {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            add(f"FlexAttention {name}", partial(compiled, q, k, v, block_mask=mask), back, plans[name])


def wait(out: Any) -> None:
    """For the result of the last of several calls."""
    if isinstance(out, jax.Array):
        out.block_until_ready()
    elif out.is_cuda:
        import torch

        torch.cuda.synchronize()


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, contenders in turn; short calls are repeated within a round, and waited for once, so that a
    GPU works while Python prepares the next."""
    on_gpu = jax.default_backend() == "gpu"

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        if on_gpu:
            time.sleep(REST)
            wait(call())
        started = time.perf_counter()
        for _ in range(repeats):
            out = call()
        wait(out)
        return (time.perf_counter() - started) / repeats

    repeats = {}
    for name, call in calls.items():
        wait(call())
        repeats[name] = max(1, min(100, round((BURST if on_gpu else 0.05) / seconds(call, 1))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return times


def clock() -> int | None:
    """Of the GPU's multiprocessors, in MHz."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def visited(row: np.ndarray, shape: Shape) -> float | None:
    """Share of its tiles that the kernel visits which `arrow_attention` picks; "blockwise" has none of one size."""
    if jax.default_backend() != "gpu":
        return None
    if arrow.arrow_implementation(shape.dtype, shape.head_dim).implementation != "mosaic":
        tiles = tiles_for(arrow.gpu_kind(), shape.head_dim, shape.dtype)
        return float(count_tiles(row, shape.layout, tiles.rows, tiles.keys).density.mean())
    from pallas_kernels.backends.mosaic import arrow as mosaic  # need a newer jax than the rest
    from pallas_kernels.backends.mosaic import block as mosaic_common

    rows = mosaic_common.warpgroups(shape.head_dim, False) * mosaic_common.ROWS
    jobs = mosaic.Jobs(shape.layout, rows, shape.heads, shape.batch)

    def steps(job: jax.Array) -> tuple[jax.Array, jax.Array]:
        place, _, first = jobs(job)
        window = jnp.asarray(row)[place]
        all_of_them = mosaic.Walk(shape.layout, jobs.rows, first, jnp.int32(EVERYTHING)).stop
        walk = mosaic.Walk(shape.layout, jobs.rows, first, jnp.where(window == FULL, EVERYTHING, window))
        return jnp.where(window == CACHED, 0, walk.stop), all_of_them

    some, every = jax.jit(jax.vmap(steps))(jnp.arange(jobs.count))
    return float(some.sum() / every.sum())


def run(shape: Shape, rounds: int) -> dict[str, Any]:
    calls, failed, errors = contenders(shape)
    times = measure(calls, rounds)
    seconds = {name: median(values) for name, values in times.items()}
    operations = 4 * shape.batch * shape.heads * shape.layout.length**2 * shape.head_dim
    rows = {}
    for name, row in windows(shape.layout.num_visual, shape.heads).items():
        exact, tiles = float(density(row, shape.layout).mean()), visited(row, shape)
        rivals = [rival for rival in ("dense", "torch SDPA", f"FlexAttention {name}") if rival in seconds]
        speedups = {
            rival: median(a / b for a, b in zip(times[rival], times[f"arrow {name}"], strict=True)) for rival in rivals
        }
        ours = {rival: speedup for rival, speedup in speedups.items() if not rival.startswith("Flex")}
        rows[name] = {
            "density": exact,
            "speedup_over": speedups,
            "efficiency": {rival: speedup * exact for rival, speedup in ours.items()},
        }
        if tiles is not None:
            rows[name] |= {
                "tile_density": tiles,
                "tflops": 1e-12 * operations * tiles / seconds[f"arrow {name}"],
                "tile_efficiency": {rival: speedup * tiles for rival, speedup in ours.items()},
            }
    sizes = {"batch": shape.batch, "heads": shape.heads, "head_dim": shape.head_dim, "dtype": shape.dtype}
    return {
        "machine": describe_machine(),
        "device": jax.devices()[0].device_kind,
        "shape": shape.name,
        "layout": str(shape.layout),
        **sizes,
        "arrow": arrow.arrow_implementation(shape.dtype, shape.head_dim).implementation,
        "clock_mhz": clock(),
        "dense_tflops": 1e-12 * operations / seconds["dense"],
        "ceilings": {
            "product_tflops": 2e-12 * PRODUCT[jax.default_backend()] ** 3 / seconds["product"],
            "copy_gb_s": 2e-9 * COPY[jax.default_backend()] / seconds["copy"],
        },
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "rows": rows,
        "largest_error": errors,
        "not_run": failed,
        "all_seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names of the shapes to run; the file keeps the others")
    parser.add_argument("--aot", action="store_true", help="compile each implementation for an H200 instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.aot:
        from benchmarks import aot  # which imports this module

        rows = aot.compare("h200")
        table = aot.comparison("h200", rows, jax.__version__)
        aot.save(args.out or Path("benchmarks/results/attention_aot.json"), rows, table)
        print(table)
        return
    kind = "gpu" if jax.default_backend() == "gpu" else "cpu"
    args.out = args.out or Path(f"benchmarks/results/attention_{kind}.json")
    chosen = [shape for shape in shapes() if args.only in shape.name]
    known = json.loads(args.out.read_text())["shapes"] if args.only and args.out.exists() else []
    results = {entry["shape"]: entry for entry in known}
    for shape in tqdm(chosen):
        last = results[shape.name] = run(shape, args.rounds)
        tqdm.write(f"{shape.name}: " + ", ".join(f"{name} {ms:.4g} ms" for name, ms in last["milliseconds"].items()))
        tqdm.write("  " + ", ".join(f"{name} {row['efficiency']}" for name, row in last["rows"].items()))
        tqdm.write(f"  {last['not_run'] or ''}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"shapes": list(results.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
