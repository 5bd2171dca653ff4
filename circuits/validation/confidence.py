"""Confidence sequences: intervals for a mean that stay valid while observations are added.

A usual 95 % interval may be looked at once, at a number of observations fixed beforehand. One that is watched while prompts are
added, until it is narrow enough, misses the mean more often. With a confidence sequence the chance that any of its intervals
misses is at most `1 - level`, however often one looks and whenever one stops.

The hedged betting sequence of Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting" (Theorem
3), for values between known bounds, scaled to 0..1: for every candidate mean m two gamblers bet on the next observation being
above and below it,

    K+_t(m) = prod_i (1 + l_i (x_i - m))       K-_t(m) = prod_i (1 - l_i (x_i - m))

with stakes `l_i` that depend on the observations before i alone. If m is the mean, their mean wealth is a nonnegative
martingale that starts at 1, and reaches `1 / (1 - level)` with a chance of at most `1 - level` (Ville's inequality). Candidates
that made the gamblers so rich are ruled out for good. Assumed: every observation has the same mean given those before it, as
prompts drawn at random from one distribution have; nothing about the distribution besides its bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CANDIDATES = 1001
"""Means that are tried, evenly spaced between the bounds; intervals reach to the next one outside."""
_CAP = 0.75
"""Largest part of its wealth that a gambler may lose with one observation."""


def confidence_sequence(
    values: Sequence[float] | np.ndarray, *, low: float = 0.0, high: float = 1.0, level: float = 0.95
) -> np.ndarray:
    """Lower and upper bounds of the mean after each observation.

    Args:
        values: observations, in the order in which they came.
        low, high: bounds that no observation can leave.
        level: chance that all intervals hold the mean, at least.

    Returns:
        float64[observations, 2].

    Raises:
        ValueError: bounds in the wrong order, an observation outside them, or a level outside 0 to 1.
    """
    x = np.asarray(values, dtype=np.float64)
    if not low < high:
        raise ValueError(f"expected a lower bound below the upper one, given {low:g} and {high:g}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a chance between 0 and 1, given {level}")
    if not ((x >= low) & (x <= high)).all():
        wrong = x[~((x >= low) & (x <= high))][0]
        raise ValueError(f"expected observations from {low:g} to {high:g}, given {wrong:g}")
    x = (x - low) / (high - low)
    stakes, means = _stakes(x, 1 - level), np.linspace(0, 1, CANDIDATES)
    with np.errstate(divide="ignore"):  # a mean of 0 or 1 allows any stake
        up = np.minimum(stakes[:, None], _CAP / means)
        down = np.minimum(stakes[:, None], _CAP / (1 - means))
    wealth = np.logaddexp(
        np.cumsum(np.log1p(up * (x[:, None] - means)), axis=0),
        np.cumsum(np.log1p(-down * (x[:, None] - means)), axis=0),
    ) - np.log(2)
    possible = np.logical_and.accumulate(wealth < -np.log(1 - level), axis=0)
    # Wealth is convex in the candidate, up to rounding: what is not ruled out is an interval. Reach to its neighbours outside.
    empty = ~possible.any(axis=1)
    first = np.maximum(possible.argmax(axis=1) - 1, 0)
    last = np.minimum(CANDIDATES - possible[:, ::-1].argmax(axis=1), CANDIDATES - 1)
    bounds = np.stack([means[first], means[last]], axis=1)
    bounds[empty] = np.nan  # every candidate ruled out: the assumption does not hold
    return low + (high - low) * bounds


def _stakes(x: np.ndarray, alpha: float) -> np.ndarray:
    """Stakes of the predictable plug-in, from the mean and variance of the observations before each (their equation 26)."""
    t = np.arange(1, len(x) + 1)
    mean = (0.5 + np.cumsum(x)) / (t + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.sqrt(2 * np.log(2 / alpha) / (before * t * np.log(t + 1)))
