"""Files of a converted folder's arrays: mapped, and compared with their checksums by threads ahead of their reader."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.io.hub import links_end_in

THREADS = min(8, os.cpu_count() or 1)
"""A core takes the sha256 of 1.5 GB/s (docs/performance-rest.md): eight are faster than a disk."""


@dataclass(frozen=True)
class Chunk:
    """Rows of an array as one uncompressed file.

    array: its name, with the component's.
    sha256: hexadecimal, of the file.
    root: the converted folder. The file must lie in it, or in the repository of the hub's cache that it is of.
    """

    array: str
    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    sha256: str
    root: Path

    def __str__(self) -> str:
        return f"{self.root}: {self.array}, chunk {self.path.name},"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The file's bytes as they lie there, unchecked. TensorStore would copy them twice.

        Raises:
            CheckpointError: the file is missing, of another size, or a link out of the folder.
        """
        try:
            real = self.path.resolve(strict=True)
            if not real.is_relative_to(links_end_in(self.root)):
                raise CheckpointError(f"{self} is a link out of the folder, to {real}: convert again.")
            if (size := real.stat().st_size) != self.nbytes:
                raise CheckpointError(f"{self} cannot be read: it has {size} bytes, not {self.nbytes}. Convert again.")
            return np.memmap(real, self.dtype, "r", shape=self.shape)
        except OSError as error:
            raise CheckpointError(f"{self} cannot be read: {error.strerror or error}. Convert again.") from error

    def check(self) -> np.ndarray:
        """The same, compared with the checksum.

        Raises:
            CheckpointError: as `map`, or the bytes are not those that were written.
        """
        rows = self.map()
        digest = hashlib.sha256(rows.view(np.uint8).data).hexdigest()
        if digest != self.sha256:
            raise CheckpointError(
                f"{self} has changed since it was written: its sha256 is {digest}, config.json says {self.sha256}. "
                f"`dfa2 verify {self.root}` names all such arrays; convert again."
            )
        return rows


class CheckedAhead:
    """Chunks that are mostly read in this order: while one is in use, threads check the next ones."""

    def __init__(self, chunks: Sequence[Chunk]):
        self._chunks = list(chunks)
        self._places = {chunk.path: place for place, chunk in enumerate(chunks)}
        self._threads = ThreadPoolExecutor(THREADS)
        self._begun: dict[int, Future[np.ndarray]] = {}

    def read(self, chunk: Chunk) -> np.ndarray:
        """
        Raises:
            CheckpointError: as `Chunk.check`.
        """
        place = self._places[chunk.path]
        for number in range(place, min(place + 1 + THREADS, len(self._chunks))):
            if number not in self._begun:
                self._begun[number] = self._threads.submit(self._chunks[number].check)
        return self._begun.pop(place).result()
