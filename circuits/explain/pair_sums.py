"""Sums over pairs (target, source) of features, collected in bounded memory.

P pairs, C sums of each pair, F features. The first two sums are effects; their magnitudes together are the size of a pair.

Where all pairs fit, the sums are exact, in whatever order they come. Where they do not, each target keeps its largest pairs and
the others are forgotten. This is lossy counting (Manku and Motwani 2002) with sizes in the place of counts: a pair that is
forgotten with size v has lost exactly v. So a pair of target t has lost at most `lost_F[t]`, the sum over all compactions of
the largest size that was forgotten of t.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BYTES_PER_PAIR = 120
"""Peak memory for every pair of the capacity, while new pairs are merged into the table: key, four sums and their copies."""


class PairSums:
    """A table of sums by pair, and what is not yet merged into it.

    Attributes:
        key_P: int64, `target * F + source`, rising.
        sums_CP: float64 `[C, P]`.
        lost_F: float64, the most that any pair of each target has lost.
    """

    def __init__(self, n_features: int, n_sums: int, *, capacity: int) -> None:
        """
        Args:
            n_features: F, of all parts and layers.
            n_sums: C.
            capacity: most pairs in memory, those not yet merged included.
        """
        self.n_features, self.capacity = n_features, capacity
        self.key_P = np.zeros(0, np.int64)
        self.sums_CP = np.zeros((n_sums, 0))
        self.lost_F = np.zeros(n_features)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

    def add(self, key: np.ndarray, sums_CP: np.ndarray) -> None:
        """Add sums of some pairs; a pair may come again."""
        half = max(1, self.capacity // 2)
        for first in range(0, len(key), half):
            part = slice(first, first + half)
            if self._n_waiting + len(self.key_P) + len(key[part]) > self.capacity:
                self.merge()
                if len(self.key_P) > half:
                    self.keep(self._most_that_fit(half))
            self._waiting.append((key[part], sums_CP[:, part]))
            self._n_waiting += len(key[part])

    def merge(self) -> None:
        """Bring everything into the table."""
        key = np.concatenate([self.key_P, *(key for key, _ in self._waiting)])
        order = np.argsort(key, kind="stable")
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        sums_CP = np.empty((len(self.sums_CP), len(starts)))
        for column, own in enumerate(self.sums_CP if len(key) else ()):
            values = np.concatenate([own, *(waiting_CP[column] for _, waiting_CP in self._waiting)])[order]
            np.add.reduceat(values, starts, out=sums_CP[column])
        self.sums_CP = sums_CP
        self.key_P = key[starts]
        self._waiting, self._n_waiting = [], 0

    def keep(self, most: int) -> None:
        """Keep the pairs of largest size of each target, at most this many; merged pairs only."""
        target = self.key_P // self.n_features
        size = np.abs(self.sums_CP[:2]).sum(0)
        order = np.lexsort((self.key_P, -size, target))
        rank = np.arange(len(order)) - np.searchsorted(target, target[order])
        largest_lost = np.zeros(self.n_features)
        np.maximum.at(largest_lost, target[order[rank >= most]], size[order[rank >= most]])
        self.lost_F = self.lost_F + largest_lost
        kept = np.sort(order[rank < most])
        self.key_P, self.sums_CP = self.key_P[kept], self.sums_CP[:, kept]

    def _most_that_fit(self, n_pairs: int) -> int:
        """The largest number of pairs per target with at most `n_pairs` in all."""
        counts = np.sort(np.bincount(self.key_P // self.n_features))
        below = np.cumsum(counts) - counts  # pairs of targets with fewer
        kept = below + counts * np.arange(len(counts), 0, -1)  # where the limit is that target's number
        fits = np.flatnonzero(kept <= n_pairs)
        place = fits[-1] + 1 if len(fits) else 0  # the first target that cannot keep all of its pairs
        return int((n_pairs - below[place]) // (len(counts) - place)) if place < len(counts) else int(counts[-1])

    # Saving ---------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays; `restore` is the inverse."""
        self.merge()
        return {"key_P": self.key_P, "sums_CP": self.sums_CP, "lost_F": self.lost_F}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what `arrays` gave."""
        self.key_P, self.sums_CP, self.lost_F = arrays["key_P"], arrays["sums_CP"], arrays["lost_F"]
