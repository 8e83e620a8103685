"""Files and folders appear whole or not at all, beside other writers, and leftovers of killed ones go."""

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from dfa2_jax.io import atomic
from dfa2_jax.io.atomic import NameTaken, appearing, remove_leftovers, replaceable, replacing


def write(path, data):
    with replacing(path) as file:
        file.write(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def no_locks(monkeypatch):
    """As on a file system that has none."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_block_that_fails_changes_nothing(tmp_path):
    write(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_save_within_another_save_of_the_same_file_disturbs_neither(tmp_path, monkeypatch):
    fsync, busy = os.fsync, []

    def interfere(descriptor):
        if not busy:
            busy.append(1)
            write(tmp_path / "file", b"second")
        return fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interfere)
    write(tmp_path / "file", b"first")
    assert (tmp_path / "file").read_bytes() == b"first" and names(tmp_path) == ["file"]


def test_many_writers_of_one_file_are_never_seen_in_part(tmp_path):
    contents = [bytes([65 + number]) * 300_000 for number in range(3)]
    write(tmp_path / "file", contents[0])
    writers = [
        threading.Thread(target=lambda data=data: [write(tmp_path / "file", data) for _ in range(25)])
        for data in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert (tmp_path / "file").read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_data_is_on_the_disk_before_its_name_and_then_the_name(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("name"), replace(*paths)))
    write(tmp_path / "file", b"x")
    assert steps == [False, "name", True]
    monkeypatch.setattr(os, "rename", lambda *paths: (steps.append("name"), replace(*paths)))
    steps.clear()
    with appearing(tmp_path / "folder") as folder:
        (folder / "file").write_bytes(b"x")
    assert steps == [False, True, "name", True]


def test_the_mode_of_a_replaced_file_stays_and_a_new_one_has_the_users(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tmp_path / "file", b"1")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        (tmp_path / "file").chmod(0o604)
        write(tmp_path / "file", b"2")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604
        with appearing(tmp_path / "folder"):
            pass
        assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    finally:
        os.umask(mask)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(there, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "file"
    if there:
        target.write_bytes(b"old")
    link.symlink_to("elsewhere/file")
    write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert names(tmp_path) == ["elsewhere", "link"] and names(tmp_path / "elsewhere") == ["file"]


def test_what_is_no_regular_file_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is no regular file"),
        (tmp_path / "pipe", "pipe is no regular file"),
        (Path("/dev/null"), "/dev/null is no regular file"),
        (tmp_path / "missing" / "file", "there is no folder .*missing"),
    ):
        with pytest.raises(OSError, match=message):
            write(path, b"x")
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="file is read-only"):
        replaceable(tmp_path / "file")
    assert names(tmp_path) == ["file", "pipe"] and (tmp_path / "file").read_bytes() == b"old"


def test_leftovers_go_and_files_of_living_writers_and_of_others_stay(tmp_path):
    dead, alive = f".plan.json.partial-dfa2-{'0' * 16}", f".plan.json.partial-dfa2-{'1' * 16}"
    others = [".plan.json.partial", ".partial-dfa2", "plan.partial-dfa2-0123456789abcdef"]
    for name in (dead, alive, *others):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".old.partial-dfa2" / "weights").mkdir(parents=True)
    (tmp_path / ".old.partial-dfa2.lock").touch()
    os.mkfifo(tmp_path / f".x.partial-dfa2-{'2' * 16}")  # blocks whoever opens it without care
    with open(tmp_path / alive, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(tmp_path / "other.json", b"x")
        assert names(tmp_path) == sorted([alive, *others, "other.json"])
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "other.json"])
    remove_leftovers(tmp_path / "missing")


def test_a_file_that_is_taken_for_a_leftover_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "file", b"x")
    assert removed and names(tmp_path) == ["file"]


def test_without_locks_files_are_written_and_leftovers_stay(tmp_path, no_locks):
    leftover = f".file.partial-dfa2-{'0' * 16}"
    (tmp_path / leftover).touch()
    write(tmp_path / "file", b"x")
    assert names(tmp_path) == [leftover, "file"]
    with appearing(tmp_path / "folder"):
        with pytest.raises(
            NameTaken, match="folder.partial-dfa2 is another process's, or a killed one's: in that case"
        ):
            with appearing(tmp_path / "folder"):
                pass
    assert names(tmp_path) == [leftover, "file", "folder"]


def test_the_longest_names_are_written(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        write(tmp_path / name, b"x")
        with pytest.raises(NameTaken), appearing(tmp_path / name):
            pass
    assert len(names(tmp_path)) == 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), appearing(tmp_path / "a" / "folder") as partial:
        (partial / "file").touch()
        raise RuntimeError
    assert names(tmp_path / "a") == []
    with appearing(tmp_path / "a" / "folder") as partial:
        (partial / "file").touch()
        assert not (tmp_path / "a" / "folder").exists()
        with pytest.raises(NameTaken, match="folder is being made by another process: wait for it"):
            with appearing(tmp_path / "a" / "folder"):
                pass
    assert names(tmp_path / "a") == ["folder"] and names(tmp_path / "a" / "folder") == ["file"]
    with pytest.raises(NameTaken, match="folder exists already: remove it, or choose another destination"):
        with appearing(tmp_path / "a" / "folder"):
            pass
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(NameTaken, match="link exists already"), appearing(tmp_path / "link"):
        pass
    assert names(tmp_path) == ["a", "link"]


def test_the_leftover_of_the_same_folder_goes_first(tmp_path):
    (tmp_path / ".folder.partial-dfa2").mkdir()
    (tmp_path / ".folder.partial-dfa2" / "old").touch()
    (tmp_path / ".folder.partial-dfa2.lock").touch()
    with appearing(tmp_path / "folder") as partial:
        (partial / "new").touch()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["new"]


def test_a_file_system_that_cannot_sync_a_folder_is_let_be(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    code = errno.EINVAL
    atomic.sync(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        atomic.sync(tmp_path)
