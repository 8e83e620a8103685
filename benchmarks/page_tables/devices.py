"""Several devices for one batch of images."""

from collections.abc import Iterator
from typing import Any

from benchmarks.page_tables.base import table, title

PLANS = {"mixed": "arrows and caching", "reuse": "caching", "arrows": "arrows"}


@table(
    "balance",
    "balance.json",
    "model, size | plan of | 2, 4, 8 devices of a row: the model's order | fixed by cost | dealt anew | bound",
    "python -m benchmarks.balance",
)
def balance(data: Any) -> Iterator[list[str]]:
    """Tiles of the slowest device over the mean."""
    for case, kinds in data["rows"].items():
        for kind, found in kinds.items():
            cells = [
                ", ".join(f"{one[dealing]:.2f}" for one in found.values())
                for dealing in ("contiguous", "fixed", "anew", "bound")
            ]
            yield [title(case), PLANS[kind], *cells]


@table("multigpu", "multigpu_gpu.json", "model, size | GPUs | dense, ms | by a plan, ms | off by")
def multigpu(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        for count in one["mesh"]:
            names = [f"{kind}, {count}" for kind in ("dense", "planned")]
            times = (f"{one['ms_per_step'][name]:.1f} ({one['speedup'][name]:.2f}x)" for name in names)
            error = max(one["error"][name] for name in names)
            yield [title(case), count, *times, f"{100 * error:.1f} %" if error else ""]


@table(
    "multigpu-kernels",
    "multigpu_gpu.json",
    "model, size | step | GPUs | products | attention | exchange | the rest | copies | between kernels",
)
def multigpu_kernels(data: Any) -> Iterator[list[str]]:
    """Milliseconds of a step by kinds of kernels."""
    for case, one in data["rows"].items():
        for name, kernels in one["kernels"].items():
            kinds = ("products", "attention", "exchange", "the rest", "copies")
            ms = (f"{kernels['ms'][kind]:.1f}" if kind in kernels["ms"] else "" for kind in kinds)
            yield [title(case), *name.split(", "), *ms, f"{kernels['gaps_ms']:.1f}"]


@table(
    "collectives",
    "collectives.json",
    "model, size | rows x tokens | exchanges of a dense step | sent, MB | exchange at 350, 144 GB/s, ms | step, ms",
    "python -m benchmarks.collectives",
)
def collectives(data: Any) -> Iterator[list[str]]:
    """What each device sends, and steps that it would make."""
    for case, found in data["rows"].items():
        for one in found.values():
            exchanges = ", ".join(f"{count} {kind}" for kind, count in one["dense"].items())
            ms = (", ".join(f"{one[name][rate]:.1f}" for rate in data["rates"]) for name in ("exchange_ms", "step_ms"))
            yield [title(case), _mesh(one), exchanges, f"{1e-6 * one['sent_bytes']:,.0f}", *ms]


@table(
    "collectives-memory",
    "collectives.json",
    "model, size | rows x tokens | memory of each, GB | kept in place, GB | largest copy, MB | smallest stack, MB",
    "python -m benchmarks.collectives",
)
def collectives_memory(data: Any) -> Iterator[list[str]]:
    """What a plan's attention remembers stays where it is."""
    for case, found in data["rows"].items():
        for one in found.values():
            kept = (f"{1e-9 * one[name]:.2f}" for name in ("memory_bytes", "alias_bytes"))
            copies = (f"{1e-6 * one[name]:,.1f}" for name in ("largest_copy_bytes", "smallest_stack_bytes"))
            yield [title(case), _mesh(one), *kept, *copies]


def _mesh(one: Any) -> str:
    return " x ".join(map(str, one["mesh"]))


@table(
    "exchange",
    "exchange_gpu.json",
    "model, size | devices | sent by each, MB | all-to-all, ms | nothing to itself, ms | each alone, ms | packing "
    "alone, ms",
)
def exchange(data: Any) -> Iterator[list[str]]:
    for case, counts in data["rows"].items():
        for count, one in counts.items():
            ms = (f"{one['ms'][way]:.2f}" for way in ("all-to-all", "permutes", "apart", "packing"))
            yield [title(case), count, f"{one['sent_mb']:.0f}", *ms]
