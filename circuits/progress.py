"""The line that shows how far a trace is."""

from __future__ import annotations

import time
from collections.abc import Callable


class ProgressText:
    """Turns what `trace` tells its progress callback into a line: features expanded, share left, speed and time to go.

    The time to go is that until `max_nodes` features are expanded; a trace that reaches its coverage ends earlier.
    """

    def __init__(self, max_nodes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without a clock reading: the first call does that.

        Args:
            max_nodes: most features that the trace expands.
            clock: seconds from any start.
        """
        self._max_nodes, self._clock = max_nodes, clock
        self._first: tuple[int, float] | None = None

    def __call__(self, expanded: int, share: float) -> str:
        """The line after a round.

        Args:
            expanded: features expanded so far.
            share: share of influence that ends in features without a row.
        """
        now = self._clock()
        text = (
            f"{expanded:,} of at most {self._max_nodes:,} features expanded, {100 * share:.2g} % of the influence left"
        )
        if self._first is None:
            self._first = expanded, now
        first, started = self._first
        if expanded <= first or now <= started:
            return text
        rate = (expanded - first) / (now - started)
        return f"{text}, {rate:.3g} features/s, at most {_duration((self._max_nodes - expanded) / rate)} to go"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
