"""What is wrong with a checkpoint, said by name: file, field, both values, and the way out."""

import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

MAX_JSON_BYTES = 10_000_000  # FLUX.1's index of 1,160 keys has 120 kB


KINDS = {"p": "FIFO", "s": "socket", "c": "device", "b": "device", "d": "folder"}
"""By the first letter of `ls -l`, what is no file."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

LARGEST_SIZE = 2**20
"""The largest width or vocabulary of a config. Gemma's vocabulary of 262,144 is the largest that a text encoder has."""


class CheckpointError(ValueError):
    """A checkpoint folder or file cannot be used. The message names file, field, both values and the way out."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text that a terminal only shows: control characters and what no encoding knows are escaped, line breaks stay."""
    return "".join(x if x.isprintable() or x == "\n" else x.encode("unicode_escape").decode() for x in text)


@contextmanager
def blame(culprit: str) -> Iterator[None]:
    """Files that make the code within fail, in whatever way, are at fault: the error says so."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:  # tokenizers raises bare ones, and a panic of Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{culprit}: {reason:.500}") from error


def raise_faults(headline: str, faults: Mapping[str, Sequence[str]], shown: int = 8) -> None:
    """One error for all faults, `shown` of each kind; nothing where there are none."""
    lines = []
    for kind, messages in faults.items():
        if messages:
            more = [f"... and {len(messages) - shown} more"] if len(messages) > shown else []
            prefix = f"{len(messages)} {kind}: " if kind else ""
            lines.append(prefix + "; ".join([*(f"{fault:.300}" for fault in messages[:shown]), *more]))
    if lines:
        raise CheckpointError(f"{headline}.\n" + "\n".join(lines))


def check_file(path: Path) -> None:
    """Seen before a file is opened: a FIFO would wait for its writer, a device has no end. Links are followed.

    Raises:
        CheckpointError: it is absent, empty, no regular file, or the pointer that git without LFS leaves.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.filemode(status.st_mode)[0], "special file")
            raise CheckpointError(f"{path} is a {kind}, not a file: put the file itself there.")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not start:
        raise CheckpointError(f"{path} is empty: download or save it again.")
    if start == LFS_POINTER:
        raise CheckpointError(f"{path} is a git-lfs pointer to the file: run `git lfs pull` in the clone.")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file, refusing what a damaged or hostile file can hold; a byte order mark is passed over."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"duplicate key {max(names, key=names.count)!r:.200}")
        return fields

    check_file(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes, more than the {max_bytes} that such a file may have.")
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid JSON: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def check_fields(config: Any) -> None:
    """Types as declared, and sizes within bounds: they size loops and shapes before any weight is seen.

    Published models have at most 57 layers, and 2 in a block.

    Raises:
        ValueError: names the field and its value.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not of_type(value, kind):
            raise ValueError(f"{name}={value!r:.100} is not {getattr(kind, '__name__', kind)}")
        if isinstance(value, tuple):
            if len(value) > 999:
                raise ValueError(f"{name} has {len(value)} entries, more than 999")
            continue
        most = 99 if name.endswith("layers_per_block") else 999 if name.endswith("_layers") else LARGEST_SIZE
        if kind is int and not name.endswith("_token_id") and not 0 < value <= most:
            raise ValueError(f"{name}={value!r:.100} is not a number from 1 to {most}")
        if name.endswith(("_eps", "_epsilon")) and not 0 <= value < 1:
            raise ValueError(f"{name}={value!r:.100} is not from 0 to 1")


def of_type(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of the type of a field: numbers are finite, and no number is a bool."""
    if args := get_args(kind):
        if get_origin(kind) is tuple:
            return isinstance(value, tuple) and all(of_type(item, args[0]) for item in value)
        return any(of_type(value, kind) for kind in args)
    if kind in (int, float):
        return type(value) in (int, kind) and math.isfinite(value)
    return isinstance(value, kind)
