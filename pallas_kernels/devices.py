"""What serves what, and why: the backend that `implementation=None` means, by operation and device."""

from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from pallas_kernels.backends.base import Device as Device
from pallas_kernels.backends.base import HasMerit, Operation, Problem
from pallas_kernels.backends.registry import backend_named, lacks
from pallas_kernels.cost import nested_seconds, separate_seconds
from pallas_kernels.layout import Layout

PREFERENCE: dict[Operation, tuple[str, ...]] = {
    "arrow": ("mosaic", "triton", "blockwise"),
    "nested": ("mosaic", "triton", "blockwise"),
    "dense": ("mosaic", "cudnn", "blockwise"),
}
"""The first that lacks nothing and has a merit (`backends.base.HasMerit`) is chosen.

The last can do everything, anywhere.
"""

FIRST = "the first of `devices.PREFERENCE` that can"
"""Said of a backend that declares no merit."""


class BackendChoice(NamedTuple):
    """An implementation, and why it was chosen."""

    implementation: str
    why: str


def gpu_kind() -> str | None:
    """Name of the NVIDIA GPU that programs are for: that of the mesh that is set, else the default device; or None."""
    device = Device.current()
    return device.name if device.is_nvidia else None


def dense_implementation(dtype: DTypeLike, head_dim: int) -> BackendChoice:
    """The backend that dense attention runs on."""
    return choose(_asked("dense", dtype, head_dim), Device.current())


def arrow_implementation(dtype: DTypeLike, head_dim: int) -> BackendChoice:
    """The backend that arrow attention runs on."""
    return choose(_asked("arrow", dtype, head_dim), Device.current())


def _asked(operation: Operation, dtype: DTypeLike, head_dim: int) -> Problem[jax.ShapeDtypeStruct]:
    """A problem of one token: only its dtype and head_dim are known."""
    token = jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype)
    return Problem(operation=operation, q=token, k=token, v=token, layout=Layout(0, 1, text_first=True))


def choose(problem: Problem, device: Device) -> BackendChoice:
    """The best backend for a problem."""
    *others, anywhere = PREFERENCE[problem.operation]
    if not device.is_nvidia:
        return BackendChoice(anywhere, f"the default device is {device.name!r}, not an NVIDIA GPU")
    missed, why = [], FIRST
    for name in others:
        lacking, merit = lacks(name, problem, device), _merit(name, problem, device)
        if lacking is None and merit is not None:
            return BackendChoice(name, "; ".join([merit, *missed]))
        if lacking is not None and merit is not None:
            missed.append(lacking)
        why = lacking or f"{name!r} is slower here"
    return BackendChoice(anywhere, why)


def _merit(name: str, problem: Problem, device: Device) -> str | None:
    """As `HasMerit.merit`; `FIRST` of a backend that declares none, or that cannot be imported."""
    try:
        backend = backend_named(name)
    except ImportError:
        return FIRST
    return backend.merit(problem, device) if isinstance(backend, HasMerit) else FIRST


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
