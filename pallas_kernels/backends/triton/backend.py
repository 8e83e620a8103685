"""What the Triton kernels compute, and what for. JAX will drop Pallas's Triton, so they are imported where they run."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.backends.triton.tiles import Tiles, tiles_for, tiles_lack


@dataclass(frozen=True)
class Triton:
    tiles: Tiles | None = None
    """None: the table's for the device."""
    interpretable: ClassVar[bool] = True

    def lacks(self, problem: Problem[Any], device: Device) -> str | None:
        return tiles_lack(problem, device) or device.no_gpu

    def merit(self, problem: Problem[Any], device: Device) -> str | None:
        return "one launch for full, arrow and cached heads"

    def arrow(self, problem: Problem[Array], *, interpret: bool) -> Float[Array, "*L B T N H"]:
        from pallas_kernels.backends.triton.arrow import arrow_attention

        return arrow_attention(problem, self.tiles or tiles_for(problem, Device.current()), interpret=interpret)

    def nested(
        self, problem: Problem[Array], half_windows: Int[Array, " W"], *, interpret: bool
    ) -> Float[Array, "W+1 B T N H"]:
        from pallas_kernels.backends.triton.nested import nested_arrow_attention

        tiles = self.tiles or tiles_for(problem, Device.current())
        return nested_arrow_attention(problem, half_windows, tiles, interpret=interpret)
