"""Writes the tables of README.md and docs/ from benchmarks/results/*.json.

    python -m benchmarks.pages            # write them
    python -m benchmarks.pages --check    # exit code 1, and the pages' names, where one is stale

A page says where a table goes, and nothing else of it:

    <!-- table: sampling-mixed -->
    <!-- end of table -->

What lies between the two lines is made by the function of that name in benchmarks/page_tables/. Every table ends with
a line that names its machine, versions, command and JSON file.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.page_tables import TABLES, Table
from dfa2_jax.io.atomic import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REGION = re.compile(
    r"(?P<start><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end of table -->)", re.DOTALL
)
NAMED = ("jax", "torch", "diffusers")
"""Versions that a caption gives: ours, and those of what it compares with."""


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(page: Path) -> str:
    """The page's text with its tables made anew.

    Raises:
        KeyError: the page names a table that does not exist.
    """

    def fill(found: re.Match[str]) -> str:
        return f"{found['start']}{render(TABLES[found['name']], page.parent)}\n{found['end']}"

    return REGION.sub(fill, page.read_text())


def render(table: Table, folder: Path) -> str:
    """The table and its caption, for a page in this folder."""
    contents = [json.loads((RESULTS / file).read_text()) for file in table.files]
    data = contents if len(contents) > 1 else contents[0]
    lines = [row(table.header), row("---" for _ in table.header), *(row(cells) for cells in table.rows(data))]
    links = [f"[{file}]({os.path.relpath(RESULTS / file, folder)})" for file in table.files]
    caption = [*sorted(machines(data)), *links, f"`{table.command}`"]
    return "\n".join([*lines, "", f"*{'; '.join(caption)}.*"])


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def machines(data: Any) -> set[str]:
    """Where the numbers come from. A file says it once, or in each of its rows."""
    if isinstance(data, list):
        return set().union(*map(machines, data))
    if "machine" in data or "device" in data:
        return {machine(data)}
    rows = data["rows"] if "rows" in data else data["shapes"]
    return machines(list(rows.values()) if isinstance(rows, dict) else rows)


def machine(facts: dict[str, Any]) -> str:
    """Device, Python and versions of one measurement, as `describe_machine` or a report tells them."""
    host = facts.get("machine", {})
    device = host.get("device") or facts.get("device", "cpu")
    if device.startswith("cpu"):
        device = f"{host['cores']} cores of an {host['processor']} CPU" if host else "CPU"
    versions = facts.get("versions") or host.get("versions") or facts
    found = [f"Python {host['python']}"] if host else []
    found += [f"{name} {versions[name].split('+')[0]}" for name in NAMED if name in versions]
    return ", ".join([device, *found])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages are stale")
    check = parser.parse_args().check
    stale = {page: text for page in pages() if (text := written(page)) != page.read_text()}
    for page, text in stale.items():
        if not check:
            write_whole(page, text)
        print(f"{page.relative_to(ROOT)} {'is stale: run `python -m benchmarks.pages`' if check else 'is written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
