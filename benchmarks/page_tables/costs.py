"""Calibration, the exact choice, compilation, conversion, and damaged files."""

from collections.abc import Iterator
from typing import Any

from benchmarks.page_tables.base import table, title


def calibration(data: Any) -> Iterator[list[str]]:
    for case, found in data["rows"].items():
        cells = [f"{found['in_dense_runs'][name]:.2f}" for name in ("calibration", "official scheme")]
        yield [title(case) if "tokens" not in case else case, *cells, f"{found['choices_share']:.1%}"]


COSTS = "model | calibration, dense steps | the paper's scheme, dense steps | share of the choice"
table("calibration-h100", "calibration_h100.json", COSTS)(calibration)
table("calibration-h200", "calibration_gpu.json", COSTS)(calibration)
table("calibration-cpu", "calibration_cpu.json", COSTS)(calibration)


@table("caches", "calibration_h100.json", "one image of | outputs kept, GB")
def caches(data: Any) -> Iterator[list[str]]:
    for case, found in data["rows"].items():
        guided = ", guided" if found["shape"]["batch"] == 2 else ""
        yield [f"{title(case)}{guided}", f"{1e-9 * found['memory']['caches']:.1f}"]


def search(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        yield [str(one["heads"]), str(one["methods"]), f"{one['ms']:.1f}", f"{one['highs_ms']:.1f}"]


CHOICES = "heads | methods | ours, ms | HiGHS, ms"
table("search-gpu", "search_gpu.json", CHOICES)(search)
table("search-cpu", "search_cpu.json", CHOICES)(search)


@table(
    "compile",
    "compile_h200.json",
    "model | layers | compile, CPU s | peak, GB | weights copied a step, GB | share of the weights",
)
def compilation(data: Any) -> Iterator[list[str]]:
    for one in sorted(data["rows"], key=lambda one: (one["model"], one["pixels"], one["layers"])):
        yield [
            f"{one['model']} {one['pixels']} px",
            one["layers"],
            f"{one['cpu_seconds']:.0f}",
            f"{1e-9 * one['peak_bytes']:.1f}",
            f"{1e-9 * one['copied_per_step']:.2f}",
            f"{one['copied_per_step'] / one['weight_bytes']:.0%}",
        ]


@table(
    "convert", "convert.json", "what | weights, GB | GB/s | peak above the arrays, GB", "python -m benchmarks.convert"
)
def convert(data: Any) -> Iterator[list[str]]:
    for one in data["rows"]:
        above = one.get("peak_above_arrays_gb", one["peak_anonymous_gb"])
        yield [one["contender"], f"{one['weights_gb']:.1f}", f"{one['gb_per_second']:.2f}", f"{above:.3f}"]


@table("fuzz", "fuzz.json", "damaged | read as they are | refused | other errors", "python -m benchmarks.fuzz")
def fuzz(data: Any) -> Iterator[list[str]]:
    names = {
        "weights": "safetensors files and indexes",
        "plans": "plans",
        "tokenizers": "tokenizers",
        "configs": "configs of components",
        "progress": "progress of calibrations",
    }
    for kind, counts in data["kinds"].items():
        yield [names[kind], f"{counts['read']:,}", f"{counts['refused']:,}", str(data["other_exceptions"])]


@table("checksums", "checksums.json", "what | GB for each second of a core")
def checksums(data: Any) -> Iterator[list[str]]:
    for name, rate in data["digests_gb_per_cpu_second"].items():
        yield [name, f"{rate:.2f}"]
    for name, row in data["rows"].items():
        yield [name, f"{data['weights_gb'] / row['cpu_seconds']:.2f}"]


KILLED = {
    "plan": "saving plans",
    "convert": "converting",
    "calibrate": "calibrating heads",
    "calibrate steps": "calibrating steps",
    "sample": "sampling",
    "report": "reporting",
}


@table("kills", "kills.json", "command | kills | left something for the next run | faults | machine")
def kills(data: Any) -> Iterator[list[str]]:
    for row in data["rows"]:
        numbers = (row["kills"], row["left_something"], len(row["faults"]))
        yield [KILLED[row["case"]], *map(str, numbers), row["machine"]]
