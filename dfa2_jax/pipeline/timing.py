"""Seconds of the parts of a call, compilation apart, and parts told while they last."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Clock:
    """Seconds between laps, and the seconds that XLA compiled meanwhile (`jax.monitoring`)."""

    compiled = 0.0
    listening = False

    def __init__(self) -> None:
        if not Clock.listening:
            Clock.listening = True
            jax.monitoring.register_event_duration_secs_listener(Clock._on_event)
        self._started, self._compiled = time.perf_counter(), Clock.compiled
        self.seconds: dict[str, float] = {"compile": 0.0}

    @staticmethod
    def _on_event(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            Clock.compiled += duration_secs

    def lap(self, name: str) -> None:
        """Since the last lap; compilation is counted apart, not in the lap."""
        now, compiled = time.perf_counter(), Clock.compiled - self._compiled
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started - compiled
        self.seconds["compile"] += compiled
        self._started, self._compiled = now, Clock.compiled


@contextmanager
def told(name: str, shown: bool = True) -> Iterator[None]:
    """Says on stderr what goes on, then how long it took, and how much of that XLA compiled; nothing if not `shown`."""
    if not shown:
        yield
        return
    clock = Clock()
    print(f"{name} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(file=sys.stderr)
        raise
    clock.lap(name)
    compiled = clock.seconds["compile"]
    within = f" ({compiled:.1f} s of it compiling)" if compiled >= 0.05 and name != "compiling" else ""
    print(f"\r{name} {clock.seconds[name] + compiled:.1f} s{within}", file=sys.stderr, flush=True)
