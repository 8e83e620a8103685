"""Seconds that attention takes on a named GPU, predicted from tiles and machine code, and the paper's roofline.

A score is one query against one key of one head. A score takes three pipes of a multiprocessor. These are 4 head_dim
operations of the tensor cores, one of the exponential unit, and issue slots. One warp waits for each in turn; the more
warps a multiprocessor holds, the more of that overlaps. The constants are fitted on an H200 to 88 timings of 6
tiles at 1024 and 2048 px, from full to V/64 (benchmarks/results/tiles_h200.json). Predictions are off by 4 % (root mean
square), 13 % at worst. On an A100 nothing was timed.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from pallas_kernels.backends.triton.tiles import TABLE, Tiles
from pallas_kernels.layout import FULL, Layout
from pallas_kernels.mask import count_tiles


class GPU(NamedTuple):
    """Public figures of the hardware."""

    multiprocessors: int
    clock: float
    """Hz at which the tensor cores reach the vendor's dense 16-bit figure."""
    tensor: int
    """Dense 16-bit floating-point operations per clock and multiprocessor."""
    bandwidth: float
    """Bytes per second of memory."""

    @property
    def flops(self) -> float:
        """Dense 16-bit floating-point operations per second."""
        return self.multiprocessors * self.clock * self.tensor


GPUS = {"h200": GPU(132, 1.83e9, 4096, 4.8e12), "a100": GPU(108, 1.41e9, 2048, 2.039e12)}
EXPONENTIALS, ISSUED = 16, 128
"""Per clock and multiprocessor, from compute capability 8.0 on: exponentials; instructions, counted for one thread."""

ALONE, OVERLAP = 1.23, 1 / 3
"""With one warp per scheduler a score takes 1.23 times the sum of its pipes; with n warps, n ** -OVERLAP of that."""

FETCHED = 1.0
"""Instead of `ALONE`, where other warps fetch the tiles ("mosaic"): the plain sum of the pipes. `OVERLAP` is Triton's.
Chosen knowing timings of full attention at 2048 px on an H100 (benchmarks/results/attention_h100.json). These reached
1.00 and 1.02 times the `ceiling_share` at a head_dim of 64 and 128. With 6.3 and 7.5 instructions per score in place of
6.5 and 7.8 they reach 1.00 and 1.07. The clock was 1.98 GHz, where `GPUS` has 1.83."""

EXPOSED_CLOCKS = 550
"""Wait of each tile whose loads run one tile ahead only, where no second block fills the wait."""

LAUNCH = 55e-6
"""Seconds of a call whatever it holds: two launches, the tail of the last programs."""

CUDNN = {64: 0.41, 128: 0.61}
"""Share of `GPU.flops` that cuDNN's dense attention reaches on an H200 (benchmarks/results/attention_gpu.json)."""


class Code(NamedTuple):
    """Figures of a compiled kernel that determine its cost, from `aot.kernels` and `aot.blocks_per_sm`."""

    blocks: int
    """Blocks that one multiprocessor holds at once."""
    clean: float
    """Instructions per score in the loop without masks."""
    masked: float


ARROW = {
    ("h200", 64): Code(4, 9.6, 14.2),
    ("h200", 128): Code(2, 11.8, 15.7),
    ("a100", 64): Code(3, 11.0, 15.5),
    ("a100", 128): Code(1, 15.8, 19.7),
}
NESTED = {
    ("h200", 64): Code(3, 9.3, 17.1),
    ("h200", 128): Code(2, 11.6, 19.5),
    ("a100", 64): Code(2, 11.2, 18.7),
    ("a100", 128): Code(1, 16.0, 23.8),
}
"""Figures of the shipped 16-bit tiles, by GPU and head_dim; tests/kernels/test_kernels_aot.py compiles them anew."""


def score_clocks(gpu: str, head_dim: int, warps: int, issued: float, alone: float = ALONE) -> float:
    """Clocks of a multiprocessor per score. `warps` compute at once, and each score takes `issued` instructions."""
    pipes = 4 * head_dim / GPUS[gpu].tensor + 1 / EXPONENTIALS + issued / ISSUED
    return alone * (warps / 4) ** -OVERLAP * pipes  # a warp has one of four schedulers


def ceiling_share(gpu: str, head_dim: int, warps: int, issued: float, alone: float = ALONE) -> float:
    """Share of `GPU.flops` that the products of a loop reach, without launch, first loads and tail."""
    return 4 * head_dim / GPUS[gpu].tensor / score_clocks(gpu, head_dim, warps, issued, alone)


def tiles_seconds(gpu: str, head_dim: int, tiles: Tiles, code: Code, visited: int, masked: int) -> float:
    """Seconds of a launch. `visited` counts all tiles, `masked` those among them that need a mask."""
    machine, scores = GPUS[gpu], tiles.rows * tiles.keys
    warps = tiles.warps * code.blocks
    clean, edge = (scores * score_clocks(gpu, head_dim, warps, issued) for issued in (code.clean, code.masked))
    clocks = (visited - masked) * clean + masked * edge
    if tiles.stages == 2 and code.blocks == 1:
        clocks += EXPOSED_CLOCKS * visited
    return clocks / (machine.multiprocessors * machine.clock) + LAUNCH


def arrow_seconds(
    gpu: str,
    head_dim: int,
    layout: Layout,
    half_window: Int[np.ndarray, " N"],
    batch: int = 1,
    *,
    tiles: Tiles | None = None,
    code: Code | None = None,
) -> float:
    """Seconds of one call of the 16-bit "triton" `arrow_attention`.

    Args:
        gpu: one of `GPUS`.
        tiles, code: another kernel's than the shipped one's.
    """
    tiles, code = tiles or _shipped(gpu, head_dim), code or ARROW[gpu, head_dim]
    count = count_tiles(half_window, layout, tiles.rows, tiles.keys)
    visited, masked = int(count.visited.sum()), int(count.masked.sum())
    return tiles_seconds(gpu, head_dim, tiles, code, batch * visited, batch * masked)


def nested_seconds(
    gpu: str, head_dim: int, layout: Layout, half_windows: Int[np.ndarray, " W"], heads: int, batch: int = 1
) -> float:
    """Seconds of one call of the 16-bit "triton" `nested_arrow_attention`.

    It is a full pass. Tiles on the edge of a window are masked, and visited for both rings that share them.
    """
    tiles = _shipped(gpu, head_dim)
    edges = count_tiles(half_windows, layout, tiles.rows, tiles.keys).masked
    full = count_tiles(np.array([FULL]), layout, tiles.rows, tiles.keys)
    ragged = int(full.masked[0])
    twice = int(edges.sum()) - ragged * len(half_windows)
    visited, masked = full.total + twice, ragged + 2 * twice
    programs = batch * heads
    return tiles_seconds(gpu, head_dim, tiles, NESTED[gpu, head_dim], programs * visited, programs * masked)


def dense_seconds(gpu: str, head_dim: int, layout: Layout, heads: int, batch: int = 1) -> float:
    """Seconds of cuDNN's dense attention in 16 bits."""
    return 4 * head_dim * batch * heads * layout.length**2 / (CUDNN[head_dim] * GPUS[gpu].flops)


def separate_seconds(
    gpu: str, head_dim: int, layout: Layout, half_windows: Int[np.ndarray, " W"], heads: int, batch: int = 1
) -> float:
    """Seconds of what a nested call replaces: dense attention, and an arrow call for each window."""
    calls = [arrow_seconds(gpu, head_dim, layout, np.full(heads, window), batch) for window in half_windows]
    return dense_seconds(gpu, head_dim, layout, heads, batch) + sum(calls)


def intensity(length: int, sparsity: float, block_rows: int) -> float:
    """Floating-point operations per byte of 16-bit block-sparse attention (DiTFastAttnV2, appendix).

    `2 N (1 - r) / (2 + (1 - r) N / B_r)`: each block of B_r queries reads the keys that it keeps again. As the paper
    writes it, a block reads keys or values, not both. The formula takes every such read to go to memory. A
    cache that holds a head's keys and values (FLUX at 2048 px: 8.7 MB) serves them on some GPUs.
    """
    kept = (1 - sparsity) * length
    return 2 * kept / (2 + kept / block_rows)


def memory_bound_from(length: int, block_rows: int, flops: float, bandwidth: float) -> float:
    """The sparsity from which on `intensity` is below what a GPU needs to be busy; at most 0: always."""
    ridge = flops / bandwidth
    if 2 * block_rows <= ridge:  # the limit of many kept keys
        return 0.0
    return 1 - 2 * ridge / ((2 - ridge / block_rows) * length)


def _shipped(gpu: str, head_dim: int) -> Tiles:
    return TABLE[gpu, head_dim, 2]
