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
        for count in ["1", *one.get("mesh", ())] if "ms_per_step" in one else ():
            names = [f"{kind}, {count}" for kind in ("dense", "planned")]
            times = (f"{one['ms_per_step'][name]:.1f} ({one['speedup'][name]:.2f}x)" for name in names)
            error = max(one["error"][name] for name in names)
            yield [title(case), count, *times, f"{100 * error:.1f} %" if error else ""]
