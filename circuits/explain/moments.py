"""Count, mean and spread of figures that come for many keys, graph by graph, in memory that grows with the keys alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_BATCH = 2**18
"""Rows that are collected before they are merged, if there are not more keys than that."""


class Moments(NamedTuple):
    """K keys in rising order, with C figures each."""

    keys: np.ndarray
    """int64[K]."""
    counts: np.ndarray
    """int64[K], how often the key came."""
    mean: np.ndarray
    """float64[K, C]."""
    squares: np.ndarray
    """float64[K, C], sum of squared deviations from the mean."""

    def spread(self, key: int) -> np.ndarray:
        """float64[C], standard deviation (divided by the count) of the figures of one row; 0 for a key that came once."""
        return np.asarray(np.sqrt(self.squares[key] / self.counts[key]))


class MomentsOfMany:
    """Collects figures by key; see Chan, Golub and LeVeque 1979 for how means and squares are merged without cancellation."""

    def __init__(self, n_figures: int) -> None:
        none = np.zeros((0, n_figures))
        self._merged = Moments(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), none, none)
        self._waiting: list[Moments] = []
        self._n_waiting = 0

    def add(self, keys: np.ndarray, figures: np.ndarray) -> None:
        """Take the figures (float64[n, C]) of some keys (int64[n])."""
        self._waiting.append(Moments(keys, np.ones(len(keys), dtype=np.int64), figures, np.zeros_like(figures)))
        self._n_waiting += len(keys)
        if self._n_waiting > max(
            _BATCH, len(self._merged.keys)
        ):  # so that merging costs the same per row however many keys
            self.result()

    def result(self) -> Moments:
        """Everything so far."""
        if self._waiting:
            self._merged = _by_key(*map(np.concatenate, zip(self._merged, *self._waiting, strict=True)))
            self._waiting, self._n_waiting = [], 0
        return self._merged


def _by_key(keys: np.ndarray, counts: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> Moments:
    """One row for each key."""
    order = np.argsort(keys, kind="stable")
    keys, counts, mean, squares = keys[order], counts[order], mean[order], squares[order]
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    n_rows = np.diff(np.append(starts, len(keys)))
    total = np.add.reduceat(counts, starts)
    # Deviations from the first row of a key: those of equal figures are exactly 0.
    shift = mean - np.repeat(mean[starts], n_rows, axis=0)
    offset = np.add.reduceat(shift * counts[:, None], starts) / total[:, None]
    around = squares + counts[:, None] * (shift - np.repeat(offset, n_rows, axis=0)) ** 2
    return Moments(keys[starts], total, mean[starts] + offset, np.add.reduceat(around, starts))
