"""When a run saves its state, and when it stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from time import perf_counter
from types import FrameType
from typing import Any

SNAPSHOT_SECONDS = 120.0
"""Work that a killed run loses at most, apart from the time that a snapshot takes."""
SAVING_SHARE = 0.05
"""Share of the time that may go into such snapshots, if the state is so large that they take long."""


class Clock:
    """Time since the last record and the last snapshot."""

    def __init__(self, step_tokens: int, step: int) -> None:
        self._step_tokens, self._step = step_tokens, step
        self._since = self._saved = perf_counter()
        self._saving_seconds = 0.0

    def tokens_per_second(self, step: int) -> float:
        """Speed of the steps since the last call, pauses not counted."""
        now = perf_counter()
        speed = (step - self._step) * self._step_tokens / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time does not count for the speed."""
        started = perf_counter()
        yield
        self._since += perf_counter() - started

    def wants_snapshot(self) -> bool:
        """Whether so much has been done since the last snapshot that it should be saved."""
        return perf_counter() - self._saved >= max(SNAPSHOT_SECONDS, self._saving_seconds / SAVING_SHARE)

    def save(self, save_snapshot: Callable[[], None]) -> None:
        """Write a snapshot, and note how long that takes."""
        started = perf_counter()
        save_snapshot()
        self._saved = perf_counter()
        self._saving_seconds = self._saved - started


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
    """While open, the first SIGINT or SIGTERM sets the event, so that the run stops between two steps; the second one acts as
    usual. Signals reach the main thread only; in another thread nothing sets the event.
    """
    requested = threading.Event()
    handlers: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        requested.set()
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        handlers.clear()

    if threading.current_thread() is threading.main_thread():
        handlers |= {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        restore()
