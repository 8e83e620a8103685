"""A folder against the checksums that it carries: what changed since it was written, by name."""

import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path

from dfa2_jax.io.digest import file_sha256
from dfa2_jax.io.errors import CheckpointError, raise_faults
from dfa2_jax.weights.chunks import THREADS
from dfa2_jax.weights.orbax import Contents, array_folder, check_zarr, convert_again

BLOB = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""Names in the hub's cache: a large file's sha256, a small one's git hash."""


def verify_folder(folder: str | PathLike[str], progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Compare all files of a pipeline folder with their checksums, in threads. Files added to a tokenizer are changes.

    A folder that `dfa2-convert` wrote has checksums of everything. A snapshot in the hub's cache has those of the files
    that are links to blobs, which are named by them.

    Args:
        progress: called with (bytes compared, bytes in all).

    Returns:
        Files without a checksum, by their paths in the folder.

    Raises:
        CheckpointError: names every array or file that differs, or says that the folder carries no checksums.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").exists():
        return _verify_converted(folder, progress)
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    blobs = {path: blob for path in files if BLOB.fullmatch((blob := path.resolve()).name) and path.is_symlink()}
    if not blobs:
        raise CheckpointError(
            f"{folder} carries no checksums: it is a plain diffusers folder. What dfa2-convert writes has some, and "
            "so has a snapshot in the hub's cache."
        )
    checks = {path: (lambda path=path, blob=blob: _check_blob(path, blob)) for path, blob in blobs.items()}
    sizes = {path: blob.stat().st_size if blob.exists() else 0 for path, blob in blobs.items()}
    faults = _run(checks, sizes, progress)
    raise_faults(f"{folder} has changed since it was fetched; fetch these files again", {"": faults}, len(faults))
    return [str(path.relative_to(folder)) for path in files if path not in blobs]


def _verify_converted(folder: Path, progress: Callable[[int, int], None] | None) -> list[str]:
    contents = Contents.read(folder)
    checks: dict[Path, Callable[[], object]] = {}
    sizes = {}
    for component, arrays in contents.arrays.items():
        for name, array in arrays.items():
            path = array_folder(folder, component, name)
            checks[path], sizes[path] = (lambda path=path, array=array: check_zarr(path, array)), 0
            for chunk in array.chunks(folder, component, name):
                checks[chunk.path], sizes[chunk.path] = chunk.check, chunk.nbytes
    unknown = contents.unknown_files(folder)
    added = [name for name in unknown if name.startswith("tokenizer")]  # its library reads whatever is there
    faults = {"": _run(checks, sizes, progress)} | contents.changed_files(folder) | {"files unknown": added}
    headline = f"{folder} has changed since it was converted. {convert_again(folder)}"
    raise_faults(headline, faults, shown=len(checks) + len(contents.files))
    return unknown


def _run(
    checks: Mapping[Path, Callable[[], object]],
    sizes: Mapping[Path, int],
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Messages of the checks that fail, in their order."""
    faults, done, total = [], 0, sum(sizes.values())
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for path, future in [(path, threads.submit(check)) for path, check in checks.items()]:
                if error := future.exception():
                    if not isinstance(error, CheckpointError | OSError):
                        raise error
                    faults.append(str(error))
                done += sizes[path]
                if progress is not None:
                    progress(done, total)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return faults


def _check_blob(path: Path, blob: Path) -> None:
    if not blob.exists():
        raise CheckpointError(f"{path} is missing: it links to {blob.name}, which is not there")
    if len(blob.name) == 64:
        kind, digest = "sha256", file_sha256(blob)
    else:
        content = blob.read_bytes()
        kind, digest = (
            "git hash",
            hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
        )
    if digest != blob.name:
        raise CheckpointError(f"{path} has the {kind} {digest}, the hub's is {blob.name}")
