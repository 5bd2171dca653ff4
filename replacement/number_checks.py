"""Checks of the numbers that users give, without torch; every refusal says what was expected and what was given."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

LARGEST = 1e18
"""Largest magnitude of weights, thresholds and activations: the squares of larger ones do not fit float32."""


def integer(name: str, value: Any) -> int:
    """The value as an int, of any size and sign.

    Raises:
        ValueError: no whole number; True and False are none.
    """
    if not _is_a(numbers.Integral, value):
        raise ValueError(f"{name} must be a whole number, got {value!r:.50}")
    return int(value)


def integers(name: str, values: Any) -> list[int]:
    """Several whole numbers as a list of ints.

    Raises:
        ValueError: a text, something that is no collection, or one that holds anything else than whole numbers.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of whole numbers, got {values!r:.50}")
    return [integer(f"every number in {name}", value) for value in values]


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """The value as an int.

    Raises:
        ValueError: no whole number (True and False are none), one below `least`, or one that does not fit 64 bits.
    """
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r:.50}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value!r:.50}")
    return value


def real(name: str, value: Any) -> Any:
    """The value, if it is a real number (True and False are none); raises `ValueError` if not."""
    if not _is_a(numbers.Real, value):
        raise ValueError(f"{name} must be a number, got {value!r:.50}")
    return value


def number(name: str, value: Any, *, positive: bool = False, largest: float = LARGEST) -> float:
    """The value as a float.

    Raises:
        ValueError: no number, NaN, below 0 (with `positive`, not above 0), or above `largest`.
    """
    value = real(name, value)
    if not value >= 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'above 0' if positive else '0 or more'}, got {value!r:.50}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {value!r:.50}")
    return float(value)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
