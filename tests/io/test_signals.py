"""Signals end a program as Ctrl-C does, once."""

import os
import signal
import threading

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
