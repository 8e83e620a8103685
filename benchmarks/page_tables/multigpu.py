"""The table of steps in docs/devices.md."""

from collections.abc import Iterator
from typing import Any

from benchmarks.page_tables.base import table, title


@table("multigpu", "multigpu_gpu.json", "model, size | GPUs | dense, ms | by a plan, ms | off by")
def multigpu(data: Any) -> Iterator[list[str]]:
    for case, one in data["rows"].items():
        for count in ["1", *one.get("mesh", ())] if "ms_per_step" in one else ():
            names = [f"{kind}, {count}" for kind in ("dense", "planned")]
            times = (f"{one['ms_per_step'][name]:.1f} ({one['speedup'][name]:.2f}x)" for name in names)
            error = max(one["error"][name] for name in names)
            yield [title(case), count, *times, f"{100 * error:.1f} %" if error else ""]
