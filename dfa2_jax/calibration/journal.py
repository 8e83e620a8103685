"""Results of forwards by what went in, in a file, so that an interrupted calibration goes on from there."""

import fcntl
import hashlib
import os
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

HEADER = b"dfa2-calibration 2\n"
HASH, COUNT = 32, 8
"""Bytes of a sha256, and of a number of values."""

HEAD = 2 * HASH + COUNT
"""Bytes of a record before its values."""


class Journal:
    """Arrays, float32, by key.

    A record is the sha256 of what follows, its key, how many values there are, and their bytes. A torn one, and what
    follows it, is cut off. Without a file, nothing is kept.
    """

    def __init__(self, path: str | PathLike[str] | None, digest: str):
        """Opens the journal in `path`; None: no file.

        Args:
            digest: of all that the results depend on, beside their keys.

        Raises:
            ValueError: the file is of another calibration, or another process is writing it.
            OSError: it cannot be written.
        """
        self.places: dict[bytes, int] = {}
        self.path = None if path is None else Path(path)
        self.file: BinaryIO | None = None if self.path is None else self._open(self.path, digest)

    def _open(self, path: Path, digest: str) -> BinaryIO:
        head = HEADER + digest.encode() + b"\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ValueError(f"{path}: another calibration writes it: wait for it, or give another file.") from error
        start = file.read(len(head)) or file.write(head) and head
        if start != head:
            file.close()
            raise ValueError(
                f"{path}, remove it to start anew: it starts with {start!r:.100}, and the progress of this calibration "
                f"starts with {head!r}."
            )
        place = len(head)
        end = os.fstat(file.fileno()).st_size
        while record := self._record(file, place, end):
            self.places[record[HASH : 2 * HASH]] = place
            place += len(record)
        file.truncate(place)
        return file

    @staticmethod
    def _record(file: BinaryIO, place: int, end: int) -> bytes | None:
        """A whole one; None of a torn one."""
        head = os.pread(file.fileno(), HEAD, place)
        size = HEAD + 4 * int.from_bytes(head[-COUNT:], "little")
        if len(head) < HEAD or place + size > end:
            return None
        record = os.pread(file.fileno(), size, place)
        return record if hashlib.sha256(record[HASH:]).digest() == record[:HASH] else None

    def get(self, key: bytes, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
        """The array of a key; None where it is not known."""
        if self.file is None or key not in self.places:
            return None
        place = self.places[key]
        record = self._record(self.file, place, os.fstat(self.file.fileno()).st_size)
        if record is None or record[HASH : 2 * HASH] != key or len(record) != HEAD + 4 * int(np.prod(shape)):
            raise ValueError(f"{self.path}: it was changed by another program. Remove it to start anew.")
        return np.frombuffer(record[HEAD:], "<f4").reshape(shape)

    def add(self, key: bytes, result: Float[np.ndarray, "..."]) -> None:
        if self.file is None:
            return
        self.places[key] = self.file.seek(0, os.SEEK_END)
        content = key + int(result.size).to_bytes(COUNT, "little") + np.ascontiguousarray(result, "<f4").tobytes()
        self.file.write(hashlib.sha256(content).digest() + content)
        os.fsync(self.file.fileno())

    def kept(self, key: bytes, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Float[np.ndarray, "..."]:
        """The array of a key; where it is not known, it is made and added."""
        result = self.get(key, shape)
        if result is None:
            result = np.asarray(make(), np.float32)
            self.add(key, result)
        return result

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
