"""Moments by key against numpy, however the figures are cut into batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.explain import moments
from circuits.explain.moments import MomentsOfMany


@given(st.lists(st.lists(st.integers(0, 6), unique=True, max_size=7), min_size=1, max_size=12), st.integers(0, 8))
def test_equal_to_numpy_in_batches_of_any_size(batches, batch_size) -> None:
    rng, collected, by_key = np.random.default_rng(0), MomentsOfMany(2), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_BATCH", batch_size)
        for keys in batches:
            figures = 1e6 + rng.normal(size=(len(keys), 2))  # far from 0: sums of squares would lose the spread
            collected.add(np.array(keys, dtype=np.int64), figures)
            for key, row in zip(keys, figures, strict=True):
                by_key.setdefault(key, []).append(row)
        found = collected.result()
    assert found.keys.tolist() == sorted(by_key)
    for row, key in enumerate(found.keys.tolist()):
        values = np.array(by_key[key])
        assert found.counts[row] == len(values)
        np.testing.assert_allclose(found.mean[row], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.spread(row), values.std(0), atol=1e-6)


def test_equal_figures_have_no_spread_at_all() -> None:
    collected = MomentsOfMany(1)
    for _ in range(7):
        collected.add(np.array([3]), np.array([[0.1]]))
        collected.result()
    assert collected.result().spread(0).tolist() == [0.0]
    assert collected.result().mean.tolist() == [[0.1]]


def test_nothing_was_added() -> None:
    assert len(MomentsOfMany(3).result().keys) == 0
    collected = MomentsOfMany(3)
    collected.add(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))
    assert len(collected.result().keys) == 0
