"""Checks of the numbers that users give, without torch; every refusal says what was expected and what was given."""

from __future__ import annotations

import numbers
from typing import Any

LARGEST = 1e18
"""Largest magnitude of weights, thresholds and activations: the squares of larger ones do not fit float32."""


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """The value as an int.

    Raises:
        ValueError: no whole number (True and False are none), one below `least`, or one that does not fit 64 bits.
    """
    if not _is_a(numbers.Integral, value):
        raise ValueError(f"{name} must be a whole number, got {value!r:.50}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r:.50}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value!r:.50}")
    return int(value)


def number(name: str, value: Any, *, positive: bool = False, largest: float = LARGEST) -> float:
    """The value as a float.

    Raises:
        ValueError: no number, NaN, below 0 (with `positive`, not above 0), or above `largest`.
    """
    if not _is_a(numbers.Real, value):
        raise ValueError(f"{name} must be a number, got {value!r:.50}")
    if not value >= 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'above 0' if positive else '0 or more'}, got {value!r:.50}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {value!r:.50}")
    return float(value)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
