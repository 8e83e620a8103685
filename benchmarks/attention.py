"""Arrow attention against dense attention and other libraries, side by side in one run; on a GPU if JAX has one.

    python -m benchmarks.attention [--rounds 5] [--only 1K] [--out benchmarks/results/attention_cpu.json]
    JAX_PLATFORMS=cpu python3.12 -m benchmarks.attention --aot [--out benchmarks/results/attention_aot.json]

Every result is first compared with float64 over some of the queries; nothing wrong is timed. Contenders are timed in
turn, medians are taken. The rows are:

- dense;
- all heads at V/16, V/32 and V/64 tokens on each side;
- a third of the heads each full, 1/8 and 1/32;
- all cached;
- a nested call that gives full attention and four windows at once.

`efficiency` is the speedup over a dense contender times the exact density: 1 where cost follows the kept pairs.
`tile_efficiency` (on a GPU) takes the share of tiles that the kernel visits: 1 where cost follows the tiles. `tflops`
counts these tiles. `ceilings` are what the same machine reaches in the same rounds: in a product of square matrices,
and in a copy (bytes read and written).

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
# Else torch's workers spin for milliseconds after each call, on the cores of whoever is timed next. Arrows in full,
# which come after torch, then took 1.16 times the time of the same tiles in dense attention (1.03 without).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import aot
from benchmarks.machine import describe_machine
from benchmarks.torch_attention import add_torch
from dfa2_jax.io.atomic import write_whole
from pallas_kernels import CACHED, FULL, Device, Layout, arrow_attention, arrow_implementation, nested_arrow_attention
from pallas_kernels.backends.registry import interpretable_names
from pallas_kernels.backends.triton.tiles import TABLE
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


class Contenders:
    """Ready calls by name, each compared with float64; why others are missing; errors."""

    def __init__(self, shape: Shape):
        generator = np.random.default_rng(0)
        size = shape.batch, shape.layout.length, shape.heads, shape.head_dim
        tokens = (jnp.asarray(generator.standard_normal(size, np.float32), shape.dtype) for _ in range(3))
        self.shape, self.on_gpu = shape, jax.default_backend() == "gpu"
        self.qkv: tuple[jax.Array, ...] = tuple(tokens)
        self.exact = [np.asarray(x, np.float64) for x in self.qkv]
        self.plans = windows(shape.layout.num_visual, shape.heads)
        self.cache = jnp.zeros_like(self.qkv[0])
        self.calls: dict[str, Callable[[], Any]] = {}
        self.failed: dict[str, str] = {}
        self.errors: dict[str, float] = {}

    def add(
        self, name: str, call: Callable[[], Any], half_window: np.ndarray, to_numpy: Callable[[Any], Any] | None = None
    ) -> None:
        to_numpy = to_numpy or partial(np.asarray, dtype=np.float64)
        try:
            self.errors[name] = check(to_numpy(call()), self.exact, half_window, self.shape)
            self.calls[name] = call
        except AssertionError:
            raise
        except Exception as error:
            if name.startswith("arrow "):
                raise  # all others are compared with it
            self.failed[name] = f"{type(error).__name__}: {str(error)[:200]}"

    def add_arrows(self) -> None:
        """What this device gets by default, and on a GPU the other kernels. One cache goes from call to call."""
        implementations: dict[str, str | None] = {"arrow": None}
        if self.on_gpu:
            default = arrow_implementation(self.shape.dtype, self.shape.head_dim).implementation
            implementations |= {name: name for name in interpretable_names() if name != default}
        for label, implementation in implementations.items():
            options = {"layout": self.shape.layout, "implementation": implementation}
            attend = jax.jit(partial(arrow_attention, **options), donate_argnames="cache")
            for name, half_window in self.plans.items():
                call = partial(self._with_cache, attend, jnp.asarray(half_window))
                if name != "cached":
                    self.add(f"{label} {name}", call, half_window, np.array)
                elif f"{label} full" in self.calls:
                    self._add_cached(label, call)

    def _with_cache(self, attend: Callable[..., jax.Array], half_window: jax.Array) -> jax.Array:
        self.cache = attend(*self.qkv, half_window, cache=self.cache)
        return self.cache

    def _add_cached(self, label: str, call: Callable[[], jax.Array]) -> None:
        before = np.array(self.cache)
        if not np.array_equal(before, call()):
            raise AssertionError(f"{self.shape.name}: {label} changed what cached heads return; nothing was timed.")
        self.calls[f"{label} cached"] = call

    def add_nested(self) -> None:
        ladder = [self.shape.layout.num_visual // part for part in (64, 32, 16, 8)]
        nested = jax.jit(partial(nested_arrow_attention, layout=self.shape.layout))
        call = partial(nested, *self.qkv, jnp.array(ladder, jnp.int32))
        for window, out in zip([*ladder, FULL], np.asarray(call()), strict=True):
            error = check(out, self.exact, np.full(self.shape.heads, window), self.shape)
            self.errors["nested"] = max(self.errors.get("nested", 0), error)
        self.calls["nested"] = call

    def add_dense(self) -> None:
        """Ours, that of `jax.nn`, and on a GPU tokamax's."""
        shape, full = self.shape, self.plans["full"]
        baseline = "cudnn" if self.on_gpu else None
        dense = jax.jit(partial(arrow_attention, layout=shape.layout, implementation=baseline))
        self.add("dense", partial(dense, *self.qkv), full)
        scores = 4 * shape.batch * shape.heads * shape.layout.length**2
        if scores <= LARGEST_SCORES:
            self.add("jax.nn", partial(jax.jit(jax.nn.dot_product_attention), *self.qkv), full)
        else:
            self.failed["jax.nn"] = f"its scores take {scores / 1e9:.1f} GB"
        if not self.on_gpu:
            return
        try:
            import tokamax

            self.add("tokamax", partial(jax.jit(tokamax.dot_product_attention), *self.qkv), full)
        except ImportError as error:
            self.failed["tokamax"] = str(error)


def contenders(shape: Shape) -> Contenders:
    ready = Contenders(shape)
    ready.add_arrows()
    ready.add_nested()
    ready.add_dense()
    add_torch(ready)
    ready.calls |= limits(ready.qkv[0].dtype)
    return ready


def limits(dtype: Any) -> dict[str, Callable[[], Any]]:
    """What nothing here can be faster than: a product of random matrices, and a copy."""
    size, nbytes = PRODUCT[jax.default_backend()], COPY[jax.default_backend()]
    draw = jax.jit(partial(jax.random.normal, dtype=dtype), static_argnames="shape")
    a, b = (draw(jax.random.key(i), shape=(size, size)) for i in range(2))
    long = draw(jax.random.key(2), shape=(nbytes // dtype.itemsize,))
    return {"product": partial(jax.jit(jnp.matmul), a, b), "copy": partial(jax.jit(jnp.copy), long)}


def wait(out: Any) -> None:
    """For the result of the last of several calls."""
    if isinstance(out, jax.Array):
        out.block_until_ready()
    elif out.is_cuda:
        import torch

        torch.cuda.synchronize()


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, contenders in turn. Short calls are repeated within a round, and waited for once: a GPU works
    while Python prepares the next."""
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
    """The clock of the GPU's multiprocessors, in MHz; None without nvidia-smi."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    query = [program, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def visited(half_window: np.ndarray, shape: Shape) -> float | None:
    """Share of its tiles that the kernel visits which `arrow_attention` picks; "blockwise" has none of one size."""
    if jax.default_backend() != "gpu":
        return None
    if arrow_implementation(shape.dtype, shape.head_dim).implementation != "mosaic":
        itemsize = jnp.dtype(shape.dtype).itemsize
        tiles = TABLE[Device.current().tiles_row, shape.head_dim, itemsize]
        return float(count_tiles(half_window, shape.layout, tiles.rows, tiles.keys).density.mean())
    from pallas_kernels.backends.mosaic import arrow as mosaic  # need a newer jax than the rest
    from pallas_kernels.backends.mosaic import block

    rows = block.warpgroups(shape.head_dim, False) * block.ROWS
    jobs = mosaic.Jobs(shape.layout, rows, shape.heads, shape.batch)

    def steps(job: jax.Array) -> tuple[jax.Array, jax.Array]:
        place, _, first = jobs(job)
        window = jnp.asarray(half_window)[place]
        all_of_them = mosaic.Walk(shape.layout, jobs.rows, first, jnp.int32(EVERYTHING)).stop
        walk = mosaic.Walk(shape.layout, jobs.rows, first, jnp.where(window == FULL, EVERYTHING, window))
        return jnp.where(window == CACHED, 0, walk.stop), all_of_them

    some, every = jax.jit(jax.vmap(steps))(jnp.arange(jobs.count))
    return float(some.sum() / every.sum())


def line(name: str, times: dict[str, list[float]], shape: Shape) -> dict[str, Any]:
    """What follows from the times of arrows under one of `windows`."""
    half_window = windows(shape.layout.num_visual, shape.heads)[name]
    exact, tiles = float(density(half_window, shape.layout).mean()), visited(half_window, shape)
    arrows = times[f"arrow {name}"]
    rivals = [rival for rival in ("dense", "torch SDPA", f"FlexAttention {name}") if rival in times]
    speedups = {rival: median(a / b for a, b in zip(times[rival], arrows, strict=True)) for rival in rivals}
    over_dense = {rival: speedup for rival, speedup in speedups.items() if not rival.startswith("Flex")}
    derived = {
        "density": exact,
        "speedup_over": speedups,
        "efficiency": {rival: speedup * exact for rival, speedup in over_dense.items()},
    }
    if tiles is not None:
        derived |= {
            "tile_density": tiles,
            "tflops": 1e-12 * operations(shape) * tiles / median(arrows),
            "tile_efficiency": {rival: speedup * tiles for rival, speedup in over_dense.items()},
        }
    return derived


def operations(shape: Shape) -> int:
    """Floating-point operations of dense attention."""
    return 4 * shape.batch * shape.heads * shape.layout.length**2 * shape.head_dim


def run(shape: Shape, rounds: int) -> dict[str, Any]:
    ready = contenders(shape)
    times = measure(ready.calls, rounds)
    seconds = {name: median(values) for name, values in times.items()}
    sizes = {"batch": shape.batch, "heads": shape.heads, "head_dim": shape.head_dim, "dtype": shape.dtype}
    return {
        "machine": describe_machine(),
        "device": jax.devices()[0].device_kind,
        "shape": shape.name,
        "layout": str(shape.layout),
        **sizes,
        "arrow": arrow_implementation(shape.dtype, shape.head_dim).implementation,
        "clock_mhz": clock(),
        "dense_tflops": 1e-12 * operations(shape) / seconds["dense"],
        "ceilings": {
            "product_tflops": 2e-12 * PRODUCT[jax.default_backend()] ** 3 / seconds["product"],
            "copy_gb_s": 2e-9 * COPY[jax.default_backend()] / seconds["copy"],
        },
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "rows": {name: line(name, times, shape) for name in ready.plans},
        "largest_error": ready.errors,
        "not_run": ready.failed,
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
        write_whole(args.out, json.dumps({"shapes": list(results.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
