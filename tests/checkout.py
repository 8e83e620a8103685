"""Where the repository lies that the tests are a part of."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
