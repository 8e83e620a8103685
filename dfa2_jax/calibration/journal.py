"""Results of network calls by what went in, in a file, so that an interrupted calibration goes on from there."""

import fcntl
import hashlib
import os
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float

HEADER = b"dfa2-calibration 1\n"
HASH = 32
"""Bytes of a sha256."""


class Journal:
    """Arrays of one shape, float32, by key.

    A record is the sha256 of what follows, its key, and the array's bytes. A torn one, and what follows it, is cut off.
    Without a file, nothing is kept.
    """

    def __init__(self, path: str | PathLike[str] | None, digest: str, shape: tuple[int, ...]):
        """Of `path`, or of no file.

        Args:
            digest: of all that the results depend on, beside their keys.

        Raises:
            ValueError: the file is of another calibration, or another process is writing it.
            OSError: it cannot be written.
        """
        self.shape, self.size = shape, 2 * HASH + 4 * int(np.prod(shape))
        self.places: dict[bytes, int] = {}
        self.file: BinaryIO | None = None if path is None else self._open(Path(path), digest)

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
        while (record := file.read(self.size)) and (key := self._key(record)):
            self.places[key] = place
            place += self.size
        file.truncate(place)
        return file

    def _key(self, record: bytes) -> bytes | None:
        """Of a whole record; None of a torn one."""
        whole = len(record) == self.size and hashlib.sha256(record[HASH:]).digest() == record[:HASH]
        return record[HASH : 2 * HASH] if whole else None

    def get(self, key: bytes) -> Float[np.ndarray, "..."] | None:
        if self.file is None or key not in self.places:
            return None
        record = os.pread(self.file.fileno(), self.size, self.places[key])
        if self._key(record) != key:
            raise ValueError(f"{self.file.name}: it was changed by another program. Remove it to start anew.")
        return np.frombuffer(record[2 * HASH :], "<f4").reshape(self.shape)

    def add(self, key: bytes, result: Float[np.ndarray, "..."]) -> None:
        if self.file is None:
            return
        self.places[key] = self.file.seek(0, os.SEEK_END)
        content = key + np.ascontiguousarray(result, "<f4").tobytes()
        self.file.write(hashlib.sha256(content).digest() + content)
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
