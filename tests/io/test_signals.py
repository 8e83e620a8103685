"""Signals end a program as Ctrl-C does, once."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from dfa2_jax.io.signals import ENDING, Interrupted, interruptible


@pytest.fixture
def nothing_ignored():
    """Whoever started the tests in the background, or under nohup, had some signals ignored."""
    before = [signal.signal(each, signal.SIG_DFL) for each in ENDING]
    yield
    for each, handler in zip(ENDING, before, strict=True):
        signal.signal(each, handler)


@pytest.mark.usefixtures("nothing_ignored")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_interrupts_and_later_ones_do_not_disturb(signum, code):
    before, cleaned = [signal.getsignal(each) for each in ENDING], False
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        try:
            os.kill(os.getpid(), signum)
            pytest.fail("goes on")
        finally:
            for each in ENDING:
                os.kill(os.getpid(), each)
            cleaned = True
    assert cleaned and isinstance(caught.value, Interrupted) and caught.value.exit_code == code
    assert [signal.getsignal(each) for each in ENDING] == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_are_let_be():
    ended = []

    def work():
        with interruptible():
            ended.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.usefixtures("nothing_ignored")
def test_a_signal_within_a_callback_of_the_garbage_collector_is_not_lost():
    """JAX has such a callback, and Python drops what is raised there."""

    sent = []

    def interrupted(phase, info):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    gc.callbacks.append(interrupted)
    try:
        with pytest.raises(Interrupted), interruptible():
            gc.collect()
            time.sleep(10)
    finally:
        gc.callbacks.remove(interrupted)


@pytest.mark.usefixtures("nothing_ignored")
def test_a_signal_within_a_weak_dictionary_s_callback_is_not_lost(monkeypatch):
    """The collector calls it, too, and JAX has many."""

    class Key:
        def __hash__(self):
            return 1

    weak, key = weakref.WeakKeyDictionary(), Key()
    weak[key] = None
    monkeypatch.setattr(weak, "_iterating", _Sends())
    with pytest.raises(Interrupted), interruptible():
        del key
        time.sleep(10)


class _Sends:
    """What a weak dictionary asks in its callback."""

    def __bool__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return False


IMPORTING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and stays so
from dfa2_jax import cli
class Finder:
    def find_spec(self, name, *_):
        if name == "jax":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException as error:  # as tensorstore does
                raise ImportError("initialization failed") from error
sys.meta_path.insert(0, Finder())
sys.exit(getattr(cli, sys.argv[1])(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [("convert", ["src", "dst"], "dfa2-convert: interrupted\n"), ("main", ["doctor"], "dfa2 doctor: interrupted\n")],
)
def test_ctrl_c_while_jax_is_imported_ends_in_one_line(command, arguments, told, tmp_path):
    line = [sys.executable, "-c", IMPORTING, command, *arguments]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 130 and run.stderr == told
