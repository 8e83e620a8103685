"""The tables of README.md and docs/: functions from a committed JSON file to rows of text (benchmarks/pages.py)."""

from benchmarks.page_tables import (  # noqa: F401 each registers its tables
    attention,
    costs,
    devices,
    quality,
    quantized,
    sampling,
    videos,
)
from benchmarks.page_tables.base import TABLES as TABLES
from benchmarks.page_tables.base import Table as Table
