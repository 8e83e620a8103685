"""What commands say: in any encoding, to readers that may leave. Imports no JAX."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path


def answered(run: Callable[[], int]) -> int:
    """The exit code of a command; 141 where the reader of stdout has left."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None where the shell closed it; a notebook's own
            stream.reconfigure(errors="backslashreplace")  # no prompt is beyond an ASCII terminal
    try:
        try:
            return run()
        finally:
            print(end="", flush=True)  # here, where a reader that left can still be answered
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush complains
        return 141


def print_path(path: str | os.PathLike[str]) -> None:
    """On stdout, byte for byte as the file system has it, whatever stdout's encoding is."""
    if sys.stdout is None:  # the shell closed it
        return
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a notebook's own, or a test's
        print(Path(path))
        return
    sys.stdout.flush()
    buffer.write(os.fsencode(path) + b"\n")
    buffer.flush()
