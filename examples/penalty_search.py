"""Which coefficient of a sparsity penalty leaves a wanted number of features active? Found by a few runs.

`log L0` is nearly linear in `log c`, so every run tells where to look next: between the two nearest runs on both sides of the
level, or past the nearest ones by their slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

TOLERANCE = 0.05
"""Relative distance from the level at which a search ends."""
MOST_RUNS = 6
"""Runs after which the nearest one is taken as it is."""
_LARGEST_STEP = 8.0
"""No coefficient is more than this many times away from every one tried."""


def next_coefficient(tried: Sequence[tuple[float, float]], level: float) -> float:
    """The coefficient to try next.

    Args:
        tried: (coefficient, L0) of the runs so far, at least one.
        level: the L0 wanted.
    """
    points = sorted((math.log(c), math.log(max(l0, 1e-3) / level)) for c, l0 in tried)
    below = [point for point in points if point[1] > 0]  # coefficients that are too small
    above = [point for point in points if point[1] <= 0]
    if below and above:
        (x0, y0), (x1, y1) = max(below), min(above)
        share = min(0.75, max(0.25, y0 / (y0 - y1)))  # L0 may fall off a cliff: close in on it from both sides
        return math.exp(x0 + share * (x1 - x0))
    nearest, *others = sorted(points, key=lambda point: abs(point[1]))
    slope = -1.0
    if others and others[0][0] != nearest[0]:
        slope = min(-0.2, (others[0][1] - nearest[1]) / (others[0][0] - nearest[0]))
    step = max(-math.log(_LARGEST_STEP), min(math.log(_LARGEST_STEP), -nearest[1] / slope))
    return math.exp(nearest[0] + step)


def search(
    run: Callable[[float], float], *, level: float, first: float, known: Sequence[tuple[float, float]] = ()
) -> float:
    """The coefficient whose L0 is nearest to the level.

    Args:
        run: trains with a coefficient and returns the L0.
        level: the L0 wanted.
        first: what to try first where nothing is known.
        known: (coefficient, L0) of runs for other levels.
    """
    tried = list(known)
    for _ in range(MOST_RUNS):
        if tried and min(abs(l0 / level - 1) for _, l0 in tried) <= TOLERANCE:
            break
        c = next_coefficient(tried, level) if tried else first
        tried.append((c, run(c)))
    return min(tried, key=lambda one: abs(math.log(max(one[1], 1e-3) / level)))[0]
