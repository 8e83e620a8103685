"""Attention alone."""

from collections.abc import Iterator
from typing import Any

from benchmarks.page_tables.base import span, table

SHAPES = {"FLUX 1K": "FLUX 1024 px", "FLUX 2K": "FLUX 2048 px", "FLUX 4K": "FLUX 4096 px"}
SHAPES |= {"SD3 1K": "SD3 1024 px", "SD3 2K": "SD3 2048 px"}
WINDOWS = ("full", "V/16", "V/32", "V/64", "mixed")


@table(
    "attention", "attention_h100.json", "shape | cuDNN, ms | full | V/16 | V/32 | V/64 | mixed | nested, dense passes"
)
def attention(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        ms, rows = found["milliseconds"], found["rows"]
        gains = [f"{rows[name]['speedup_over']['dense']:.2f}x" for name in WINDOWS]
        yield [SHAPES[found["shape"]], f"{ms['dense']:.2f}", *gains, f"{ms['nested'] / ms['dense']:.2f}"]


@table("attention-tflops", "attention_h100.json", "shape | product | cuDNN | full | V/16 | V/32 | V/64 | mixed")
def attention_tflops(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        cells = [f"{found['rows'][name]['tflops']:.0f}" for name in WINDOWS]
        ceiling = f"{found['ceilings']['product_tflops']:.0f}"
        yield [SHAPES[found["shape"]], ceiling, f"{found['dense_tflops']:.0f}", *cells]


@table("attention-efficiency", "attention_h100.json", "shape | speedup x density | speedup x tile density")
def attention_efficiency(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        narrow = [found["rows"][name] for name in ("V/16", "V/32", "V/64")]
        cells = [span(one[kind]["dense"] for one in narrow) for kind in ("efficiency", "tile_efficiency")]
        yield [SHAPES[found["shape"]], *cells]


@table(
    "attention-rivals",
    "attention_h100.json",
    "shape | Triton by Pallas | Triton by jax-triton | FlexAttention | tokamax, dense | torch SDPA, dense",
)
def attention_rivals(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        ms = found["milliseconds"]
        cells = []
        for prefix in ("triton", "jax_triton", "FlexAttention"):
            ratios = [ms[f"{prefix} {name}"] / ms[f"arrow {name}"] for name in WINDOWS if f"{prefix} {name}" in ms]
            cells.append(span(ratios) if ratios else "")
        cells += [f"{ms[name] / ms['dense']:.2f}" for name in ("tokamax", "torch SDPA")]
        yield [SHAPES[found["shape"]], *cells]


@table("attention-h200", "attention_gpu.json", "shape | cuDNN, ms | full | V/16 | V/64 | mixed | all cached")
def attention_h200(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        ms = found["milliseconds"]
        cells = [ms[f"arrow {name}"] for name in ("full", "V/16", "V/64", "mixed", "cached")]
        yield [SHAPES[found["shape"]], *(f"{one:.2f}" for one in (ms["dense"], *cells))]


@table(
    "attention-cpu",
    "attention_cpu.json",
    "tokens | full heads: speedup over torch SDPA | efficiency over torch SDPA | efficiency over our own dense",
)
def attention_cpu(data: Any) -> Iterator[list[str]]:
    """Four cases of each size: two orders of text, two dtypes."""
    for size in ("512", "1K", "2K"):
        found = [one for one in data["shapes"] if one["shape"].split(",")[0] == size]
        (tokens,) = {sum(int(part.split("=")[1]) for part in one["layout"][7:-1].split(",")[:2]) for one in found}
        full = [one["rows"]["full"]["speedup_over"]["torch SDPA"] for one in found]
        narrow = [one["rows"][name]["efficiency"] for one in found for name in ("V/16", "V/32", "V/64")]
        cells = [span(one[name] for one in narrow) for name in ("torch SDPA", "dense")]
        yield [f"{tokens:,}", span(full), *cells]


@table("leave-out", "leave_out_h100.json", "shape | time / time by steps | without masks | jobs dealt out")
def leave_out(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        ms, windows = found["milliseconds"], found["by_steps"]
        over = [ms[f"as shipped {name}"] / by_steps for name, by_steps in windows.items()]
        others = [
            span(ms[f"{change} {name}"] / ms[f"as shipped {name}"] for name in windows)
            for change in ("no masks", "jobs dealt out")
        ]
        yield [SHAPES[found["shape"]], span(over), *others]


@table("correct", "correct_h100.json", "implementation | right | refused | worst share of the limit: 16 bits | float32")
def correct(data: Any) -> Iterator[list[str]]:
    for name in dict.fromkeys(one["implementation"] for one in data["rows"]):
        rows = [one for one in data["rows"] if one["implementation"] == name]
        ran = [one for one in rows if "refused" not in one]
        worst = []
        for wide in (False, True):
            shares = [one["share_of_limit"] for one in ran if (one["dtype"] == "float32") == wide]
            worst.append(f"{max(shares):.2f}" if shares else "")
        yield [name, f"{sum(one['right'] for one in ran)} of {len(ran)}", str(len(rows) - len(ran)), *worst]


@table(
    "machine-code",
    "attention_aot.json",
    "implementation | head_dim | registers | spilled bytes | clean | masked | share of ceiling: predicted | measured",
    "python -m benchmarks.attention --aot",
)
def machine_code(data: Any) -> Iterator[list[str]]:
    for one in data["kernels"]:
        registers = sorted({one["registers"], one["most_registers"]})
        per_score = one["instructions_per_score"]
        yield [
            one["implementation"],
            str(one["head_dim"]),
            " to ".join(map(str, registers)),
            str(one["spill_bytes"]),
            *(f"{per_score[kind]:.1f}" for kind in ("clean", "masked")),
            *(f"{one[kind]:.0%}" for kind in ("ceiling_share", "measured_share_h100")),
        ]


@table("goals-nested", "attention_h100.json", "nested windows at 1024 px, dense passes | asked | measured")
def goals_nested(data: Any) -> Iterator[list[str]]:
    for found in data["shapes"]:
        if found["shape"].endswith("1K"):
            ms = found["milliseconds"]
            yield [SHAPES[found["shape"]], "1.2", f"{ms['nested'] / ms['dense']:.2f}"]
