"""What commands say: in any encoding, to readers that may leave. Imports no JAX."""

import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path


def answered(run: Callable[[], int]) -> int:
    """The exit code of a command; 141 where the reader of stdout has left, its own or 1 where stdout is full."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None where the shell closed it; a notebook's own
            stream.reconfigure(errors="backslashreplace")  # no prompt is beyond an ASCII terminal
    code = 0
    try:
        try:
            code = run()
            return code
        finally:
            print(end="", flush=True)  # here, where a reader that left can still be answered
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's own last flush complains
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"stdout cannot be written: {error.strerror}", file=sys.stderr)
        return code or 1


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
