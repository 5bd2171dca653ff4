"""Histograms of activations in one pass, without knowing their range: when a value does not fit, bins are joined in pairs.

The bins of a feature have the width 2^e, with the smallest e for which `N_BINS` of them hold its largest activation. As widths
are powers of two, joined bins count exactly what wider ones would have counted, whatever the order in which values come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

N_BINS = 32
"""Bins of a feature; the largest activation lies in the upper half of them."""
_EMPTY = -(2**30)


@dataclass(eq=False)
class Histograms:
    """One histogram for each of F features, of B bins."""

    counts_FB: np.ndarray
    exponent_F: np.ndarray
    """Binary logarithm of the width of a bin."""
    largest_F: np.ndarray
    """Largest activation, 0 before there is one."""

    @classmethod
    def empty(cls, n_features: int) -> Histograms:
        """Histograms of nothing."""
        exponent_F = np.full(n_features, _EMPTY, dtype=np.int64)
        return cls(np.zeros((n_features, N_BINS), np.int64), exponent_F, np.zeros(n_features, np.float32))

    def widths(self) -> np.ndarray:
        """Width of the bins of each feature; 0 where nothing was counted."""
        return np.ldexp(1.0, self.exponent_F.clip(-1074).astype(np.int32)) * (self.exponent_F > _EMPTY)

    def add(self, feature_S: np.ndarray, activation_S: np.ndarray) -> None:
        """Count activations above 0 of features, sorted by feature."""
        if not len(feature_S):
            return
        begins = np.flatnonzero(np.diff(feature_S, prepend=-1))
        features, largest = feature_S[begins], np.maximum.reduceat(activation_S, begins)
        self.largest_F[features] = np.maximum(self.largest_F[features], largest)
        self._widen(features, np.frexp(largest / N_BINS)[1])
        number_S = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(feature_S)))
        bin_S = np.ldexp(activation_S, -self.exponent_F[feature_S].astype(np.int32)).astype(np.int64)
        counts = np.bincount(number_S * N_BINS + bin_S, minlength=len(begins) * N_BINS)
        self.counts_FB[features] += counts.reshape(-1, N_BINS)

    def merge(self, other: Histograms) -> None:
        """Add what another pass counted; the other is changed, too."""
        features = np.arange(len(self.exponent_F))
        self._widen(features, other.exponent_F)
        other._widen(features, self.exponent_F)
        self.counts_FB += other.counts_FB
        np.maximum(self.largest_F, other.largest_F, out=self.largest_F)

    def _widen(self, features: np.ndarray, exponent_N: np.ndarray) -> None:
        """Let bins have at least this width."""
        steps_N = exponent_N - self.exponent_F[features]
        wider = steps_N > 0
        features, steps_N = features[wider], steps_N[wider].clip(max=N_BINS.bit_length())
        joined_NB = np.zeros((len(features), N_BINS), np.int64)
        bin_NB = np.arange(N_BINS) >> steps_N[:, None]
        np.add.at(joined_NB, (np.arange(len(features))[:, None], bin_NB), self.counts_FB[features])
        self.counts_FB[features] = joined_NB
        self.exponent_F[features] = exponent_N[wider]
