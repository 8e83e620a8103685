"""What commands begin with: devices and processes, the cache of compiled programs, prompts from a file, a folder."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import jax

from dfa2_jax import __version__
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.atomic import writable
from dfa2_jax.io.digest import digest_of, file_sha256
from dfa2_jax.io.hub import find_model
from dfa2_jax.parallel.processes import check_alike, is_first, join
from dfa2_jax.pipeline.pipeline import Pipeline
from dfa2_jax.plan.plan import Plan

OWN = ("run", "folder", "verify", "prompts", "plan", "lora", "out", "format")
"""Arguments that each process may have its own of. What the files hold that they name is compared."""

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


def start(args: argparse.Namespace | None = None) -> None:
    """Finds a device, and keeps compiled programs on disk: the second run of a shape starts at once. The library never
    does this.

    Args:
        args: of a command that processes of a launcher run as one, where --devices is "all".

    Raises:
        OSError: JAX cannot start, or the other processes cannot be reached.
        ValueError: the processes were told different things.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        jax.config.update("jax_compilation_cache_dir", str(writable(_programs())))
    except (RuntimeError, OSError) as error:
        jax.config.update("jax_compilation_cache_dir", None)
        print(f"compiled programs are not kept; set JAX_COMPILATION_CACHE_DIR: {error}", file=sys.stderr)
    joined = args is not None and args.devices == "all" and join()
    devices()
    if joined:
        assert args is not None
        _lead()
        _check_alike(args)


def _lead() -> None:
    """The first process speaks for all; the others say what is wrong with them, and no more."""
    out = os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(out, "w", errors="backslashreplace")
    os.dup2(2, 1)  # Gloo, which connects processes, speaks there
    if not is_first():  # it runs what the first one runs, progress included, and shows none of it
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        logging.getLogger("dfa2_jax").setLevel(logging.ERROR)


def _check_alike(args: argparse.Namespace) -> None:
    """Raises ValueError where processes were told different things, or one cannot read what it was told to."""
    facts = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN}
    facts |= {"dfa2-jax": __version__, "jax": jax.__version__}
    try:
        facts["weights"] = open_checkpoint(find_model(args.folder), verify=args.verify).fingerprint
        facts["--prompts"] = args.prompts and digest_of({"prompts": read_prompts(args.prompts)})
        facts["--lora"] = [(file_sha256(file), scale) for file, scale in args.lora]
        facts["--plan"] = getattr(args, "plan", None) and Plan.load(args.plan).digest
    except (ValueError, OSError) as error:
        check_alike(facts | {"error": str(error)})
        raise
    check_alike(facts)


def together(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that several processes may run as one (`start`), each of which says when it lost the others."""

    @wraps(run)
    def of_all(args: argparse.Namespace) -> int:
        stderr = sys.stderr
        try:
            return run(args)
        except jax.errors.JaxRuntimeError as error:
            if not jax.distributed.is_initialized():
                raise
            raise OSError(
                f"process {jax.process_index()} of {jax.process_count()} cannot go on, or has lost another: "
                f"{error!s:.300}. Start all of them again: the same command goes on."
            ) from error
        finally:
            sys.stderr = stderr

    return of_all


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The folder, as a command's flags ask for it.

    Raises:
        CheckpointError, ValueError: as `Pipeline.from_pretrained`.
    """
    names = "dtype", "text_encoder_dtype", "devices", "shard_weights", "verify"
    pipeline = Pipeline.from_pretrained(args.folder, **{name: getattr(args, name) for name in names})
    for number, (file, scale) in enumerate(args.lora):
        pipeline.load_lora(file, scale, f"{number} {file.stem}")
    return pipeline


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
