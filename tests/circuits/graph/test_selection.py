"""Selection by buckets against a plain sort with correctly rounded sums."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from circuits.graph.selection import largest_holding

shares = st.floats(0.0, 1.0)
numbers = st.one_of(
    st.floats(0, 10),
    st.floats(0, 1e-300),
    st.integers(0, 4).map(float),
    st.floats(0.5, 0.5 + 1e-13),
    st.floats(0, 1e300),
)


def by_sorting(values: np.ndarray, share: float) -> np.ndarray:
    """The definition: the largest first, equal ones in order, until their sum reaches the share of the total."""
    mask = np.zeros(len(values), dtype=bool)
    order = np.argsort(-values, kind="stable")
    for place, number in enumerate(order.tolist()):
        if values[number] > 0 and (share == 1.0 or math.fsum(values[order[:place]]) < share * math.fsum(values)):
            mask[number] = True
    return mask


def in_parts(values: np.ndarray, size: int) -> Callable[[], list[np.ndarray]]:
    return lambda: [values[start : start + size] for start in range(0, len(values), size)]


@given(st.lists(numbers, max_size=40), shares, st.integers(1, 50))
@example([1.0, 1.0, 1.0, 1.0], 0.5, 3)
@example([0.9, 0.1], 0.9, 1)
@example([0.0, 0.0], 0.5, 1)
@example([5e-324, 5e-324], 0.4, 2)
@example([], 0.5, 1)
def test_the_same_as_sorting(values, share, size) -> None:
    values = np.array(values, dtype=np.float64)
    assert largest_holding(in_parts(values, size), share).tolist() == by_sorting(values, share).tolist()


@pytest.mark.parametrize("share", [0.1, 0.8, 0.98, 0.999999])
def test_many_log_normal_values(share) -> None:
    """Neighbouring sums differ by far more than their rounding here, so plain cumulative sums serve as the reference."""
    values = np.random.default_rng(0).lognormal(sigma=3, size=100_000)
    ranked = np.sort(values)[::-1]
    least = ranked[np.flatnonzero(np.cumsum(ranked) >= share * values.sum())[0]]
    assert np.array_equal(largest_holding(in_parts(values, 7_000), share), values >= least)
