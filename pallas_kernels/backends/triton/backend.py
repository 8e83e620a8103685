"""What the Triton kernels compute, and what for. JAX will drop Pallas's Triton, so they are imported where they run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.backends.passes import QKV, Projected, Rope, ScaleAndShift
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

    def quantized_rows(
        self, x: Float[Array, "*dims D"], modulation: ScaleAndShift | None, *, interpret: bool
    ) -> tuple[Int[Array, "*dims D"], Float[Array, "*dims"]]:
        from pallas_kernels.backends.triton.rows import quantized_rows

        return quantized_rows(x, modulation, interpret=interpret)

    def normed_qkv(self, streams: Sequence[Projected], rope: Rope | None, *, interpret: bool) -> QKV:
        from pallas_kernels.backends.triton.qkv import normed_qkv

        return normed_qkv(streams, rope, interpret=interpret)

    def few_rows(
        self,
        x: Float[Array, "M K"],
        w: Int[Array, "L E K"],
        column_scale: Float[Array, "L E"],
        bias: Float[Array, "L E"] | None,
        layer: Int[Array, ""],
        *,
        interpret: bool,
    ) -> Float[Array, "M E"]:
        from pallas_kernels.backends.triton.few_rows import few_rows

        return few_rows(x, w, column_scale, bias, layer, interpret=interpret)
