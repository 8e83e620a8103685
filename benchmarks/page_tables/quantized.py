"""Tables of docs/quantization.md."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.page_tables.base import table

TOY = "dtype | layers in float8 | PSNR to float32, dB: mean, worst | SSIM: mean, worst"


@table("quantized-toy", "quantized_toy_gpu.json", TOY, "python -m benchmarks.quantized")
def quantized_toy(data: Any) -> Iterator[list[str]]:
    yield from _quality(one for one in data["rows"] if one["in_float8"] is None)


@table("quantized-kinds", "quantized_toy.json", TOY, "python -m benchmarks.quantized --prompts 8 --batch 8")
def quantized_kinds(data: Any) -> Iterator[list[str]]:
    yield from _quality(one for one in data["rows"] if one["in_float8"] or one["dtype"] in ("float8", "int8"))


def _quality(rows: Iterable[Any]) -> Iterator[list[str]]:
    for one in rows:
        psnr, ssim = (
            f"{one[name]:.{digits}f}, {one[f'worst_{name}']:.{digits}f}" for name, digits in (("psnr", 1), ("ssim", 4))
        )
        kinds = one["in_float8"] or (["down"] if one["dtype"] == "float8" else [])
        yield [f"`{one['dtype']}`" if one["in_float8"] is None else "", ", ".join(f"`{x}`" for x in kinds), psnr, ssim]


@table(
    "quantized-steps",
    "quantized_steps_gpu.json",
    "model, size | dtype | weights, GB | peak, GB | dense, ms | by a plan, ms",
)
def quantized_steps(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        for dtype, nbytes in one["weights_gb"].items():
            dense, planned = (
                f"{one['ms_per_step'][name]:.1f} ({one['speedup'][name]:.2f}x)"
                for name in (f"{dtype}, dense", f"{dtype}, planned")
            )
            peak = f"{one['peak_gb'][f'{dtype}, planned']:.1f}"
            yield [f"{case} px", f"`{dtype}`", f"{nbytes:.1f}", peak, dense, planned]


@table(
    "products",
    "products_gpu.json",
    "product | dtype | bfloat16, us | ours, us | XLA's, us | ours, error | XLA's, error",
)
def products(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        name, dtype = case.rsplit(", ", 1)
        times = (f"{1e3 * one['ms'][way]:.0f}" for way in ("bfloat16", "mosaic", "xla"))
        errors = (f"{one['errors'][way]:.4f}" for way in ("mosaic", "xla"))
        yield [name, f"`{dtype}`", *times, *errors]


CHOICES = ("int8", "int8, Hadamard", "int8, blocks", "e4m3", "e4m3, Hadamard", "e4m3, blocks")


@table("outliers", "outliers.json", "model | layers | largest / rms | " + " | ".join(CHOICES))
def outliers(data: Any) -> Iterator[list[str]]:
    for model, kinds in data["rows"].items():
        for kind, one in kinds.items():
            errors = (f"{100 * one[choice][0]:.2f}, {100 * one[choice][1]:.2f}" for choice in CHOICES)
            yield [model, f"`{kind}`", f"{one['peak']:.1f}", *errors]
