"""Files and folders that appear whole or not at all; the next run removes what a killed one leaves.

A writer holds a lock (flock) for as long as it lives, so that what nobody locks has lost its writer. File systems
without locks give up that removal alone.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = re.compile(r"\..*\.partial-dfa2(-[0-9a-f]{16}|\.lock)", re.DOTALL)
"""Names of what writers lock: a file to be, or what stands for a folder to be, whose name lacks the suffix."""

LOCK_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""No link is followed, and a FIFO of such a name blocks nobody."""


class NameTaken(FileExistsError):
    """A folder's name is taken. The message says by what, and the way out."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place when the block ends well; else nothing changes.

    A link stays, and its target is replaced; the mode of a replaced file stays as well.

    Raises:
        OSError: as `replaceable`, or the disk refuses.
    """
    target = _target(path)
    remove_leftovers(target.parent)
    temporary, descriptor = _create(target)
    with os.fdopen(descriptor, "wb") as file:
        try:
            yield file
            file.flush()
            with suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            os.fsync(descriptor)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """A file of text, by `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


def replaceable(path: Path) -> Path:
    """The file that `replacing(path)` would write: `path`, or what it links to.

    Raises:
        OSError: a folder, a device or a pipe is there, or a file that may not be written; or its folder takes none.
    """
    target = _target(path)
    writable(target.parent)
    return target


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {target.parent}.")
    if target.exists():
        if not target.is_file():
            raise OSError(f"{path} is no regular file: choose another name.")
        if not os.access(target, os.W_OK):
            raise PermissionError(f"{path} is read-only: choose another name, or make it writable.")
    return target


def writable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        OSError: it cannot be made, or a file in it cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe, descriptor = _create(folder / "probe")  # bits of a mode say little, to root and in /proc
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): choose another folder.") from error
    probe.unlink()
    os.close(descriptor)
    return folder


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in a folder whose writers are gone."""
    with suppress(OSError):  # a folder that cannot be listed
        for name in os.listdir(folder):
            if TEMPORARY.fullmatch(name):
                with suppress(OSError):  # another user's, or its writer lives
                    descriptor = os.open(folder / name, LOCK_FLAGS)
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if name.endswith(".lock"):
                            shutil.rmtree(folder / name.removesuffix(".lock"), ignore_errors=True)
                        os.unlink(folder / name)
                    finally:
                        os.close(descriptor)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its name when the block ends well; else nothing stays of it.

    What a killed process left of the same folder is removed first.

    Raises:
        NameTaken: something has the name, or another process is making it.
        OSError: the parent folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path) as partial:
        check_free(path)
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            os.rename(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # after the rename it is gone


def check_free(path: Path) -> None:
    """
    Raises:
        NameTaken: something has this name, be it a dangling link.
        OSError: there can be no such name: it is too long, or lies below a file.
    """
    with suppress(FileNotFoundError):
        os.lstat(path)
        raise NameTaken(f"{path} exists already: remove it, or choose another destination.")


@contextmanager
def alone(path: Path) -> Iterator[Path]:
    """The name of a folder to fill, while no other process makes `path`; what a killed one left there is gone.

    Raises:
        NameTaken: another process makes it.
    """
    hidden = f".{_shortened(path.name)}.partial-dfa2"
    lock, partial = path.with_name(f"{hidden}.lock"), path.with_name(hidden)
    while True:
        descriptor = os.open(lock, LOCK_FLAGS | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            os.close(descriptor)
            raise NameTaken(f"{path} is being made by another process: wait for it, or stop it.") from error
        except OSError:
            locked = False
        if _names(lock, descriptor):
            break
        os.close(descriptor)  # removed between opening and locking: another process ended
    try:
        if locked:
            shutil.rmtree(partial, ignore_errors=True)
        if os.path.lexists(partial):
            raise NameTaken(f"{partial} is another process's, or a killed one's: in that case, remove it.")
        yield partial
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _create(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, locked, and its descriptor."""
    while True:
        temporary = target.with_name(f".{_shortened(target.name)}.partial-dfa2-{secrets.token_hex(8)}")
        descriptor = os.open(temporary, LOCK_FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # no locks here
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _names(temporary, descriptor):
            return temporary, descriptor
        os.close(descriptor)  # taken for a leftover between creation and lock


def _names(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _shortened(name: str) -> str:
    """So much of a name that a longer one of it fits the 255 bytes of a file system."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and all that it holds are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
