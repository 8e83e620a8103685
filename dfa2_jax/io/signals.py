"""Signals that end a program: all of them as Ctrl-C does, so that what is half-made is removed."""

import _weakrefset
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

WEAK = (weakref.__file__, _weakrefset.__file__)
"""Files of the callbacks of weak dictionaries and sets."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; `exit_code` is what a shell expects of it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """The first of `ENDING` raises `Interrupted` within; later ones are ignored, so that cleaning up ends.

    Signals that are ignored already stay so (nohup), and other threads than the main one cannot be interrupted.
    """
    ended = False

    def end(signum: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended and _is_collecting(frame):  # Python drops what is raised there, and JAX has a callback there
            threading.Timer(0.01, os.kill, (os.getpid(), signum)).start()
        elif not ended:
            ended = True
            raise Interrupted(signum)

    with _handled_by(end):
        yield


@contextmanager
def exiting(line: str) -> Iterator[None]:
    """The first of `ENDING` ends the process within, with a line on stderr.

    It is for imports, which leave nothing behind: there tensorstore makes an ImportError of what is raised.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        os.write(2, f"{line}\n".encode())  # print may be what was interrupted
        os._exit(128 + signum)

    with _handled_by(end):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN}
    try:
        for each in before:
            signal.signal(each, handler)
        yield
    finally:
        for each, handler_before in before.items():
            signal.signal(each, handler_before)


def _is_collecting(frame: FrameType | None) -> bool:
    """Whether a callback of the garbage collector runs, or one of a weak dictionary or set, which it may call."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame.f_code not in callbacks and frame.f_code.co_filename not in WEAK:
        frame = frame.f_back
    return frame is not None
