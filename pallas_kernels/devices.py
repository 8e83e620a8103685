"""What serves what, and why: the backend that `implementation=None` means, by operation and device."""

from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from pallas_kernels.backends.base import Device as Device
from pallas_kernels.backends.base import Operation, Problem
from pallas_kernels.backends.registry import lacks
from pallas_kernels.cost import nested_seconds, separate_seconds
from pallas_kernels.layout import Layout

PREFERENCE: dict[Operation, tuple[str, ...]] = {
    "arrow": ("mosaic", "triton", "blockwise"),
    "nested": ("mosaic", "triton", "blockwise"),
    "dense": ("mosaic", "cudnn", "blockwise"),
}
"""The first that lacks nothing and is not `_slower` is chosen. The last can do everything, anywhere."""

MEASURED = {
    64: "1.01 to 1.26 times as fast as 'triton' for full, narrow and mixed heads",
    128: "1.40 to 1.57 times as fast as 'triton' for full, narrow and mixed heads",
}
"""Speed of the "mosaic" kernels on an H100, by head_dim."""

DENSE_MERITS = {
    "mosaic": "for one Hopper GPU: 1.17 to 1.21 times as fast as cuDNN, which computes gradients",
    "cudnn": "cuDNN's fused attention, for 16-bit inputs on NVIDIA GPUs; it has gradients",
}

FIRST = "the first of `devices.PREFERENCE` that can"
"""Said of a backend that a user put into `PREFERENCE`."""


class Choice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: str
    why: str


def gpu_kind() -> str | None:
    """Name of the NVIDIA GPU that programs are for: that of the mesh that is set, else the default device; or None."""
    device = Device.current()
    return device.name if device.is_nvidia else None


def dense_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """The backend that dense attention runs on."""
    return choose(_asked("dense", dtype, head_dim), Device.current())


def arrow_implementation(dtype: DTypeLike, head_dim: int) -> Choice:
    """The backend that arrow attention runs on."""
    return choose(_asked("arrow", dtype, head_dim), Device.current())


def _asked(operation: Operation, dtype: DTypeLike, head_dim: int) -> Problem[jax.ShapeDtypeStruct]:
    """A problem of one token: only its dtype and head_dim are known."""
    token = jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype)
    return Problem(operation=operation, q=token, k=token, v=token, layout=Layout(0, 1, text_first=True))


def choose(problem: Problem, device: Device) -> Choice:
    """The best backend for a problem."""
    *others, anywhere = PREFERENCE[problem.operation]
    if not device.is_nvidia:
        return Choice(anywhere, f"the default device is {device.name!r}, not an NVIDIA GPU")
    reasons = {}
    for name in others:
        reasons[name] = lacks(name, problem, device)
        if reasons[name] is None and not _slower(name, problem, device):
            return Choice(name, _merit(name, problem, device, reasons))
    return Choice(anywhere, reasons[others[-1]])


def _slower(name: str, problem: Problem, device: Device) -> bool:
    """Whether the next backend is the better choice, though this one lacks nothing."""
    if name != "mosaic":
        return False
    if problem.operation == "dense":
        # on several GPUs a jit of sharded arrays would gather them for a kernel that XLA cannot split
        return device.generation != "hopper" or problem.head_dim != 64 or device.count > 1
    return device.generation != "hopper"


def _merit(name: str, problem: Problem, device: Device, reasons: dict[str, str | None]) -> str:
    """Why a backend is chosen, given what those before it lack."""
    if problem.operation == "dense":
        return DENSE_MERITS.get(name, FIRST)
    if name == "mosaic":
        return f"for Hopper: {MEASURED[problem.head_dim]} (benchmarks/results/attention_h100.json)"
    if name == "triton":
        missed = f"; {reasons.get('mosaic')}" if device.generation == "hopper" else ""
        return "one launch for full, arrow and cached heads" + missed
    return FIRST


def passes_are_faster(problem: Problem, half_windows: Int[np.ndarray, " W"] | None, count: int) -> bool:
    """Whether a pass for each of `count` windows is faster than one pass for all, on the backend that is chosen.

    Unknown windows (None) are taken as V/16, V/32 and so on.
    """
    device = Device.current()
    if choose(problem, device).implementation != "triton":
        return False
    if problem.dtype == np.float32:
        return True  # the nested kernel spills 432 bytes a thread at a head_dim of 64
    batch, _, heads, dim = problem.q.shape
    windows = problem.layout.num_visual // 2 ** np.arange(4, 4 + count) if half_windows is None else half_windows
    args = device.tiles_row, dim, problem.layout, windows, heads, batch
    return separate_seconds(*args) < nested_seconds(*args)
