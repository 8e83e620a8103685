"""What a table is, and the list of all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Rows = Iterable[list[str]]


@dataclass(frozen=True)
class Table:
    """One table.

    files: in benchmarks/results.
    command: what wrote them.
    rows: makes the cells from a file's content, or from the list of all contents.
    """

    files: tuple[str, ...]
    command: str
    header: tuple[str, ...]
    rows: Callable[[Any], Rows]


TABLES: dict[str, Table] = {}
"""By the name that pages use."""


def table(name: str, files: str, header: str, command: str = "") -> Callable[[Callable[[Any], Rows]], Callable]:
    """Register a table. Columns are separated by `|`, files by blanks. The command is by default the benchmark that the
    file is named after."""
    benchmark = files.removesuffix(".json").rsplit("_", 1)[0]
    columns = tuple(column.strip() for column in header.split("|"))

    def add(rows: Callable[[Any], Rows]) -> Callable[[Any], Rows]:
        TABLES[name] = Table(tuple(files.split()), command or f"python -m benchmarks.{benchmark}", columns, rows)
        return rows

    return add


def title(case: str) -> str:
    """ "FLUX.1-dev 2048" as people say it."""
    return f"{case} px"


def span(values: Iterable[float], digits: int = 2) -> str:
    """From the smallest to the largest."""
    found = sorted(values)
    ends = [f"{found[0]:.{digits}f}", f"{found[-1]:.{digits}f}"]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
