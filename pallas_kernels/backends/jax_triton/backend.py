"""What the jax-triton kernel computes, and what for. It is an extra, so it is imported where it runs."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

from jaxtyping import Array, Float

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.backends.triton.tiles import Tiles, tiles_for, tiles_lack

TESTED = {"jax-triton": "0.3.1", "triton": "3.6.0"}
"""Versions that the kernel was tested with, on jax 0.11.2. jax-triton 0.4 renames arguments, and the PTX of later
Tritons is too new for that jax's ptxas."""


@dataclass(frozen=True)
class JaxTriton:
    tiles: Tiles | None = None
    """None: the table's for the device."""
    interpretable: ClassVar[bool] = True

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        return missing() or tiles_lack(problem, device) or device.no_gpu

    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        from pallas_kernels.backends.jax_triton.arrow import arrow_attention

        return arrow_attention(problem, self.tiles or tiles_for(problem, Device.current()), interpret=interpret)


def missing() -> str | None:
    """What must be installed, if the libraries are not those of `TESTED` (but for the last number)."""
    installed = {name: _version(name) for name in TESTED}
    if all(installed[name].split(".")[:2] == tested.split(".")[:2] for name, tested in TESTED.items()):
        return None
    wanted = " ".join(f"{name}=={tested}" for name, tested in TESTED.items())
    return f"the jax-triton kernel needs `pip install {wanted}` (and a jax for CUDA), found {installed}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"
