"""The largest of many numbers that together hold a share of their sum, found without sorting them all.

Numbers are counted by exponent and the first bits of their mantissa. The counts tell in which of these buckets the
threshold lies, and only that bucket is sorted. Sums are exact: mantissas are added as integers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from circuits.graph.edges import joined

REST = 49
"""Low bits of a float64 that a bucket leaves open; above them are three bits of mantissa, and the exponent."""
HALF = 25
"""The rest is summed in two parts, the lower of this many bits, so that no sum of up to 2^28 numbers is rounded."""
BUCKETS = 2 ** (63 - REST)

Values = Callable[[], Iterable[np.ndarray]]
"""Gives float64 arrays of numbers >= 0, the same ones at every call."""


def largest_holding(values: Values, share: float) -> np.ndarray:
    """bool mask of the smallest set of values whose sum is at least `share` of the total; never a zero.

    The largest are taken first, equal ones in order, until their sum, correctly rounded, has reached `share` times the
    correctly rounded total. The mask is that of all arrays one after the other.
    """
    if share == 1.0:  # exact, however small a value is beside the total's rounding
        return np.concatenate([np.zeros(0, dtype=bool), *(array > 0 for array in values())])
    count, high, low = (np.zeros(BUCKETS, dtype=np.int64) for _ in range(3))
    for array in values():
        bucket, rest_high, rest_low = _split(array)
        count += np.bincount(bucket, minlength=BUCKETS)
        high += np.bincount(bucket, rest_high, minlength=BUCKETS).astype(np.int64)
        low += np.bincount(bucket, rest_low, minlength=BUCKETS).astype(np.int64)

    used = np.flatnonzero(count)[::-1].tolist()
    sums = {bucket: _units(bucket, int(count[bucket]), int(high[bucket]), int(low[bucket])) for bucket in used}
    enough, held, last = share * _number(sum(sums.values())), 0, BUCKETS
    for last in used:
        if _number(held + sums[last]) >= enough:
            break
        held += sums[last]

    inside = np.concatenate([np.zeros(0), *(array[_split(array)[0] == last] for array in values())])
    order = np.argsort(-inside, kind="stable")
    _, rest_high, rest_low = _split(inside[order])
    cumulative = [np.concatenate([[0], np.cumsum(rest)]).tolist() for rest in (rest_high, rest_low)]
    n_taken = bisect_left(
        range(len(inside) + 1),
        enough,
        key=lambda taken: _number(held + _units(last, taken, *(rest[taken] for rest in cumulative))),
    )
    taken = np.zeros(len(inside), dtype=bool)
    taken[order[:n_taken]] = True
    return joined(_masks(values, last, taken), int(count.sum()), np.dtype(np.bool_))


def _masks(values: Values, last: int, taken: np.ndarray) -> Iterator[np.ndarray]:
    """The mask of each array: values of buckets above the last one, and those of the last that are `taken`."""
    begin = 0
    for array in values():
        bucket = _split(array)[0]
        mask, here = bucket > last, np.flatnonzero(bucket == last)
        mask[here] = taken[begin : begin + len(here)]
        begin += len(here)
        yield mask


def _split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bucket of each value, and the two parts of the bits below."""
    bits = np.abs(values).view(np.int64)
    return bits >> REST, (bits >> HALF) & (2 ** (REST - HALF) - 1), bits & (2**HALF - 1)


def _units(bucket: int, count: int, high: int, low: int) -> int:
    """Exact sum of `count` values of a bucket in units of 2^-1074, the smallest float64.

    `high` and `low` are the sums of their rests.
    """
    exponent, leading = divmod(bucket, 2 ** (52 - REST))
    leading += 2 ** (52 - REST) * (exponent > 0)  # the mantissa's implicit bit
    return (count * (leading << REST) + (high << HALF) + low) << max(exponent - 1, 0)


def _number(units: int) -> float:
    """Units of 2^-1074 as the nearest float64."""
    return units / 2**1074
