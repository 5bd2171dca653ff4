"""Confidence sequences: the definition by hand, coverage by simulation at every time at once, mistakes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from circuits.validation.confidence import CANDIDATES, confidence_sequence


def test_a_candidate_is_ruled_out_once_its_gamblers_are_rich() -> None:
    """The definition, candidate by candidate and observation by observation."""
    x, alpha = np.random.default_rng(0).beta(2, 5, 25), 0.1
    found = confidence_sequence(x, level=1 - alpha)
    possible = dict.fromkeys(range(CANDIDATES), True)
    wealth = {number: [1.0, 1.0] for number in possible}
    mean, total, squares = 0.5, 0.5, 0.25
    variance = 0.25
    for t, value in enumerate(x, start=1):
        stake = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(t + 1)))
        for number, both in wealth.items():
            m = number / (CANDIDATES - 1)
            both[0] *= 1 + min(stake, 0.75 / m if m else math.inf) * (value - m)
            both[1] *= 1 - min(stake, 0.75 / (1 - m) if m < 1 else math.inf) * (value - m)
            possible[number] &= sum(both) / 2 < 1 / alpha
        total += value
        mean = total / (t + 1)
        squares += (value - mean) ** 2
        variance = squares / (t + 1)
        left = [number / (CANDIDATES - 1) for number, is_left in possible.items() if is_left]
        grid = 1 / (CANDIDATES - 1)
        expected = [max(left[0] - grid, 0), min(left[-1] + grid, 1)]
        np.testing.assert_allclose(found[t - 1], expected, atol=1e-12)


@pytest.mark.parametrize("law", ["rare", "even", "beta"])
def test_all_intervals_together_hold_the_mean(law: str) -> None:
    """Of 400 sequences at level 0.8 at most a fifth may ever miss; usual intervals, looked at each time, miss in most."""
    rng, n = np.random.default_rng(1), 120
    draws = {
        "rare": rng.random((400, n)) < 0.05,
        "even": rng.random((400, n)) < 0.5,
        "beta": rng.beta(0.5, 2, (400, n)),
    }
    x, mean = draws[law].astype(float), {"rare": 0.05, "even": 0.5, "beta": 0.2}[law]
    bounds = np.stack([confidence_sequence(row, level=0.8) for row in x])
    holds = (bounds[..., 0] <= mean) & (bounds[..., 1] >= mean)  # an empty interval is NaN and holds nothing
    assert (~holds).any(axis=1).mean() <= 0.2
    assert not (np.diff(bounds[..., 0]) < 0).any()
    assert not (np.diff(bounds[..., 1]) > 0).any()
    count = np.arange(2, n + 1)
    running = x.cumsum(1)[:, 1:] / count
    spread = np.sqrt(np.maximum((x**2).cumsum(1)[:, 1:] / count - running**2, 0) / count)
    assert (np.abs(running - mean) > 1.2816 * spread)[:, 8:].any(axis=1).mean() > 0.5


def test_intervals_narrow_and_follow_their_bounds() -> None:
    x = np.tile([0.4, 0.6], 200)
    lower, upper = confidence_sequence(x)[-1]
    assert lower < 0.5 < upper
    assert upper - lower < 0.05
    wide = confidence_sequence(10 * x - 3, low=-3.0, high=7.0)
    np.testing.assert_allclose(wide, 10 * confidence_sequence(x) - 3, atol=1e-9)
    assert confidence_sequence([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": [0.5, 1.5]}, "expected observations from 0 to 1, given 1.5"),
        ({"values": [float("nan")]}, "expected observations from 0 to 1, given nan"),
        ({"values": [1.0], "low": 2.0, "high": 2.0}, "expected a lower bound below the upper one, given 2 and 2"),
        ({"values": [1.0], "level": 1.0}, "level: expected a chance between 0 and 1, given 1.0"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confidence_sequence(**options)


def test_bounds_never_cross_where_the_assumption_holds() -> None:
    for value, level in itertools.product((0.0, 0.3, 1.0), (0.5, 0.95)):
        bounds = confidence_sequence(np.full(50, value), level=level)
        assert (bounds[:, 0] <= value).all()
        assert (bounds[:, 1] >= value).all()
