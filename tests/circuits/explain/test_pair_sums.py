"""Sums over pairs in bounded memory: exact where they fit, and off by no more than they say where they do not."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.explain.pair_sums import BYTES_PER_PAIR, PairSums

F = 12
BATCHES = st.lists(
    st.dictionaries(st.integers(0, F * F - 1), st.floats(-8, 8, allow_subnormal=False), max_size=20), max_size=12
)


def added(batches: list[dict[int, float]], capacity: int) -> PairSums:
    """Every value as the first sum; the second is its double, with the other sign."""
    pairs = PairSums(F, 2, capacity=capacity)
    for batch in batches:
        key = np.array(sorted(batch), np.int64)
        value = np.array([batch[k] for k in key.tolist()])
        pairs.add(key, np.stack([value, -2 * value]))
    pairs.merge()
    return pairs


def dense(batches: list[dict[int, float]]) -> np.ndarray:
    """The true first sums `[F, F]`."""
    true = np.zeros(F * F)
    for batch in batches:
        for key, value in batch.items():
            true[key] += value
    return true.reshape(F, F)


def kept(pairs: PairSums) -> np.ndarray:
    """The first sums that are in the table, `[F, F]`; 0 for others."""
    table = np.zeros(F * F)
    table[pairs.key_P] = pairs.sums_CP[0]
    return table.reshape(F, F)


@given(BATCHES)
def test_exact_in_any_order_where_all_pairs_fit(batches: list[dict[int, float]]) -> None:
    pairs, backwards = added(batches, 2 * F * F), added(batches[::-1], 2 * F * F)
    assert (np.diff(pairs.key_P) > 0).all()
    np.testing.assert_allclose(kept(pairs), dense(batches), atol=1e-12)
    np.testing.assert_allclose(kept(backwards), kept(pairs), atol=1e-12)
    np.testing.assert_array_equal(pairs.sums_CP[1], -2 * pairs.sums_CP[0])
    assert not pairs.lost_F.any()


@given(BATCHES, st.integers(2, 60), st.integers(1, 3))
def test_what_is_forgotten_is_within_the_bound(batches: list[dict[int, float]], capacity: int, most: int) -> None:
    pairs, true = added(batches, capacity), dense(batches)
    assert len(pairs.key_P) <= capacity
    lost = 3 * np.abs(kept(pairs) - true)  # the size of a pair is the sum of both magnitudes
    assert (lost <= pairs.lost_F[:, None] * (1 + 1e-12) + 1e-9).all()
    pairs.keep(most)
    assert (np.bincount(pairs.key_P // F, minlength=F) <= most).all()
    missing = kept(pairs) == 0
    assert (3 * np.abs(true)[missing] <= np.broadcast_to(pairs.lost_F[:, None], true.shape)[missing] + 1e-9).all()


def test_keep_holds_the_largest_pairs_of_each_target() -> None:
    pairs = added([{0: 1.0, 1: -5.0, 2: 3.0, F: 0.5, F + 7: 0.25}], 100)
    pairs.keep(2)
    assert pairs.key_P.tolist() == [1, 2, F, F + 7]
    np.testing.assert_array_equal(pairs.lost_F[:3], [3.0, 0.0, 0.0])


@pytest.mark.parametrize("capacity", [24, 30, 41])
def test_as_many_pairs_are_kept_as_fit(capacity: int) -> None:
    """The same number of each target, the largest that fits in half of the capacity."""
    rng = np.random.default_rng(0)
    batches = [{int(k): float(rng.normal()) for k in rng.choice(F * F, 20, replace=False)} for _ in range(6)]
    pairs = PairSums(F, 2, capacity=10**6)
    for batch in batches:
        key = np.array(sorted(batch), np.int64)
        pairs.add(key, np.stack([np.array([batch[k] for k in key.tolist()])] * 2))
    pairs.merge()
    counts = np.bincount(pairs.key_P // F, minlength=F)
    most = pairs._most_that_fit(capacity)
    assert np.minimum(counts, most).sum() <= capacity < np.minimum(counts, most + 1).sum()


def test_peak_memory_is_the_one_stated() -> None:
    capacity, n_features = 200_000, 1000
    rng = np.random.default_rng(0)
    batches = [np.unique(rng.integers(0, n_features**2, 40_000)) for _ in range(20)]
    pairs = PairSums(n_features, 4, capacity=capacity)
    tracemalloc.start()
    for key in batches:
        pairs.add(key, np.ones((4, len(key))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert capacity * 40 < peak < capacity * BYTES_PER_PAIR
