"""What lies in place of a file: FIFOs, sockets, devices, folders, git-lfs pointers, nothing. None is waited for."""

import os
import shutil
import socket

import pytest
from damage import WEIGHTS, copy_model, load, refuses

INDEX = WEIGHTS + ".index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"


@pytest.fixture
def folder(tiny_flux_schnell, tmp_path):
    return copy_model(tiny_flux_schnell, tmp_path / "model")


def put(kind, path):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = os.getcwd()
            os.chdir(path.parent)  # the name of a socket is short
            try:
                server.bind(path.name)
            finally:
                os.chdir(before)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(POINTER if kind == "pointer" else b"")


MESSAGES = {
    "FIFO": "is a FIFO, not a file",
    "socket": "is a socket, not a file",
    "device": "is a device, not a file",
    "folder": "is a folder, not a file",
    "pointer": "is a git-lfs pointer to the file: run `git lfs pull`",
    "empty": "is empty: download or save it again",
}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", WEIGHTS, INDEX]
)
def test_what_is_no_file_is_named(kind, file, folder):
    (folder / file).unlink(missing_ok=True)
    put(kind, folder / file)
    with refuses(folder, f"{file} {MESSAGES[kind]}"):
        load(folder)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
def test_byte_order_marks_are_passed_over(file, folder):
    (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    load(folder)


def test_a_link_to_itself_is_named(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    with refuses(folder, "cannot be read: Too many levels"):
        load(folder)
    shutil.rmtree(folder)
