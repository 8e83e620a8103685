"""What commands begin with: a device, the cache of compiled programs, prompts from a file, a folder to write to."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import jax

from dfa2_jax.io.atomic import writable
from dfa2_jax.pipeline.pipeline import Pipeline

MAX_PROMPTS = 20_000_000
"""Characters of a file of prompts: a device has no end."""


def devices() -> list[Any]:
    """JAX's.

    Raises:
        OSError: JAX cannot start, with its reason.
    """
    try:
        return jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError where JAX_PLATFORMS names what is not installed
        asked = os.environ.get("JAX_PLATFORMS") or "not set"
        raise OSError(f"JAX finds no device to run on (JAX_PLATFORMS is {asked}): {error!r:.300}") from error


def start() -> None:
    """Finds a device, and keeps compiled programs on disk: the second run of a shape starts at once. The library never
    does this.

    Raises:
        OSError: JAX cannot start.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        jax.config.update("jax_compilation_cache_dir", str(writable(_programs())))
    except (RuntimeError, OSError) as error:
        jax.config.update("jax_compilation_cache_dir", None)
        print(f"compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR: {error}", file=sys.stderr)
    devices()


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The folder, as a command's flags ask for it.

    Raises:
        CheckpointError, ValueError: as `Pipeline.from_pretrained`.
    """
    names = "dtype", "text_encoder_dtype", "devices", "shard_weights", "verify"
    return Pipeline.from_pretrained(args.folder, **{name: getattr(args, name) for name in names})


def _programs() -> Path:
    """The folder of compiled programs.

    Raises:
        RuntimeError: there is neither HOME nor an entry of this user: a container under a number.
    """
    given, cache = os.environ.get("JAX_COMPILATION_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else Path(cache or Path.home() / ".cache") / "dfa2_jax" / "xla"


def read_prompts(path: Path) -> list[str]:
    r"""One per line; empty lines are skipped. Lines end at \n, \r\n and \r; U+2028, U+0085 and \v are text.

    Raises:
        ValueError: there is none, the file is no UTF-8, or it has no end.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # the three ends of lines become \n
            text = file.read(MAX_PROMPTS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not UTF-8: {error}") from error
    if len(text) > MAX_PROMPTS:
        raise ValueError(f"--prompts {path} holds more than {MAX_PROMPTS:,} characters: split it.")
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path} holds no prompt: write one per line.")
    return prompts
