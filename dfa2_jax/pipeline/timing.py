"""Seconds of the parts of a call, compilation apart."""

import time
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
        self.seconds[name] = now - self._started - compiled
        self.seconds["compile"] += compiled
        self._started, self._compiled = now, Clock.compiled
