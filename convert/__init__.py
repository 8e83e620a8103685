"""diffusers folders to folders of ours: `python -m convert SRC DST`, the script of this checkout.

An installed dfa2-jax has the same as `dfa2-convert` and `dfa2_jax.convert_checkpoint`.
"""

from typing import Any

import dfa2_jax
from dfa2_jax import cli

main = cli.convert


def __getattr__(name: str) -> Any:
    """`convert_checkpoint`, imported when it is asked for: Ctrl-C ends the script while JAX is imported, too."""
    if name != "convert_checkpoint":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return dfa2_jax.convert_checkpoint
