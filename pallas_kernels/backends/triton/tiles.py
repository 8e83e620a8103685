"""Tile sizes of the Triton kernels, by GPU, head_dim and dtype."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.backends.base import Device, Problem


@dataclass(frozen=True)
class Tiles:
    """How the kernels cut the work.

    Raises:
        ValueError: a size is not a power of two that Triton can tile.
    """

    rows: int
    """Queries of a program."""
    keys: int
    """Keys of one step of its loops."""
    warps: int
    stages: int
    """Steps in flight: loads run ahead of products by one less."""
    text_keys: int = 2048
    """Keys that one program scans for text queries; the rest goes to other programs."""

    def __post_init__(self) -> None:
        for name in ("rows", "keys", "warps"):
            value, least = getattr(self, name), 1 if name == "warps" else 16
            if not isinstance(value, int) or value < least or value & (value - 1):
                raise ValueError(f"{name}={value!r} must be a power of two of at least {least}.")
        if not 1 <= self.stages <= 8 or self.text_keys < self.keys:
            raise ValueError(f"{self.stages=} must be from 1 to 8, and {self.text_keys=} at least {self.keys=}.")


TABLE = {
    ("h200", 64, 2): Tiles(rows=64, keys=64, warps=4, stages=3),
    ("h200", 128, 2): Tiles(rows=64, keys=64, warps=4, stages=3),
    ("h200", 64, 4): Tiles(rows=32, keys=32, warps=4, stages=2),
    ("h200", 128, 4): Tiles(rows=32, keys=16, warps=8, stages=2),
    ("a100", 64, 2): Tiles(rows=64, keys=64, warps=4, stages=2),
    ("a100", 128, 2): Tiles(rows=128, keys=64, warps=8, stages=3),
    ("a100", 64, 4): Tiles(rows=32, keys=32, warps=4, stages=2),
    ("a100", 128, 4): Tiles(rows=32, keys=16, warps=8, stages=2),
}
"""By GPU, head_dim and bytes of the dtype. In arrow attention none spills on an H200, nor in a loop on an
A100 (tests/kernels/test_kernels_aot.py).

For 16 bits, each is the fastest by `cost.arrow_seconds` of those in benchmarks/results/aot.md. On an H200 64x64 is also
the fastest measured, or within 4 % of it (benchmarks/results/tiles_h200.json). Larger tiles take fewer instructions per
score, and leave fewer blocks per multiprocessor. On an A100 nothing was timed. In float32, as IEEE products without
tensor cores, arrows at a head_dim of 128 take 4.4 (full) and 1.06 (V/64) times XLA's dense attention. Tiles of 32x32
with 4 warps, which spill, take 3.0 and 0.74 times."""


def tiles_lack(problem: Problem[Any], device: Device) -> str | None:
    """Why `TABLE` has no tiles for a problem, or a device cannot run them, if so."""
    if problem.head_dim not in (64, 128):
        return f"the Triton kernels are built for a head_dim of 64 and 128, not {problem.head_dim}"
    if problem.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"the Triton kernels take bfloat16, float16 and float32, not {jnp.dtype(problem.dtype).name}"
    if device.capability is not None and device.capability < 8:
        return f"the Triton kernels need compute capability 8.0 or above, not {device.capability}"
    return None


def tiles_for(problem: Problem[Any], device: Device) -> Tiles:
    """The table's entry for a problem; in interpret mode too."""
    return TABLE[device.tiles_row, problem.head_dim, jnp.dtype(problem.dtype).itemsize]
