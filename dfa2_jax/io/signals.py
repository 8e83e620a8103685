"""Signals that end a program: all of them as Ctrl-C does, so that what is half-made is removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = False
    before = {each: signal.getsignal(each) for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN}

    def end(signum: int, frame: Any) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise Interrupted(signum)

    try:
        for each in before:
            signal.signal(each, end)
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
