"""What a pass over text keeps of every feature, in memory that grows with features and not with tokens.

Two sets of examples are kept, both of them the `n` best by a score, which makes the result independent of the order in which
firings come, of the batches and of how many processes share them:

- top examples: the score is the activation; one of each row, and one of those whose last tokens agree, because a corpus repeats
  itself;
- a sample: the score is a pseudo-random number that follows from (row, position, feature), so that the n largest are a uniform
  sample of all firings. Its ranks by activation say which quantile each is from.

F features of all layers, K examples kept of a feature, W tokens of an example's window, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from replacement.index.firings import Firings
from replacement.index.histogram import Histograms

SAME_CONTEXT = 8
"""Top examples of a feature whose last tokens, this many, are the same count as one."""
_MULTIPLIER, _ODD = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_LARGEST_RATIO = 6e4


class Window(NamedTuple):
    """Tokens around an example's peak that are kept."""

    before: int
    after: int

    @property
    def width(self) -> int:
        """All of them, the peak included."""
        return self.before + 1 + self.after


class Candidates(NamedTuple):
    """Examples that may be kept, a column for each."""

    feature: np.ndarray
    score: np.ndarray
    activation: np.ndarray
    row: np.ndarray
    """Number of the row in the data."""
    position: np.ndarray
    key: np.ndarray
    """Of two examples of a feature with the same key only the better one is kept."""

    def at(self, chosen: np.ndarray) -> Candidates:
        """Some of them."""
        return Candidates(*(column[chosen] for column in self))


@dataclass(eq=False)
class Kept:
    """The examples of largest score of every feature, the best first; ties are broken by (row, position)."""

    score_FK: np.ndarray
    """-inf in places that are empty."""
    activation_FK: np.ndarray
    row_FK: np.ndarray
    position_FK: np.ndarray
    key_FK: np.ndarray
    window_FKW: np.ndarray
    """Activations around the peak, in multiples of the peak's."""

    @classmethod
    def empty(cls, n_features: int, n_kept: int, window: Window) -> Kept:
        """Nothing kept yet."""
        shape = (n_features, n_kept)
        return cls(
            np.full(shape, -np.inf),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.uint64),
            np.zeros((*shape, window.width), np.float16),
        )

    def offer(
        self, candidates: Candidates, place: np.ndarray, windows: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Keep those that are among the best; returns the numbers of the rows that these are from.

        Args:
            place: a number of each candidate.
            windows: gives the windows `[n, W]` of candidates with some of these numbers.
        """
        hopeful = np.flatnonzero(candidates.score >= self.score_FK[candidates.feature, -1])
        new = candidates.at(hopeful)
        features = np.unique(new.feature)
        old, old_windows = self.of(features)
        both = Candidates(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))
        best = self._best(both)
        chosen = both.at(best)
        begins = np.searchsorted(chosen.feature, features)
        rank = np.arange(len(best)) - np.repeat(begins, np.diff(begins, append=len(best)))
        is_new = best >= len(old.feature)
        kept_windows = np.empty((len(best), self.window_FKW.shape[-1]), np.float16)
        kept_windows[~is_new] = old_windows[best[~is_new]]
        kept_windows[is_new] = windows(place[hopeful[best[is_new] - len(old.feature)]])
        self.score_FK[features] = -np.inf
        for values_FK, column in zip(self._columns(), (*chosen[1:], kept_windows), strict=True):
            values_FK[chosen.feature, rank] = column
        return chosen.row[is_new]

    def merge(self, other: Kept) -> None:
        """Keep the best of two passes over different rows."""
        theirs, windows = other.of(np.arange(len(self.score_FK)))
        self.offer(theirs, np.arange(len(windows)), windows.__getitem__)

    def of(self, features: np.ndarray) -> tuple[Candidates, np.ndarray]:
        """Examples of some features, the best of each first, and their windows."""
        number_N, place_N = np.nonzero(self.score_FK[features] > -np.inf)
        *columns, windows = (values_FK[features[number_N], place_N] for values_FK in self._columns())
        return Candidates(features[number_N], *columns), windows

    def _best(self, both: Candidates) -> np.ndarray:
        """Numbers of the best of each feature, the best first, features in order."""
        order = np.lexsort((both.position, both.row, -both.score, both.key, both.feature))
        feature, key = both.feature[order], both.key[order]
        order = order[np.flatnonzero((np.diff(feature, prepend=-1) != 0) | _changes(key))]
        order = order[np.lexsort((both.position[order], both.row[order], -both.score[order], both.feature[order]))]
        feature = both.feature[order]
        rank = np.arange(len(order)) - np.searchsorted(feature, feature)
        return order[rank < self.score_FK.shape[1]]

    def _columns(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)]


def _changes(values: np.ndarray) -> np.ndarray:
    """Where an entry differs from the one before it; the first does."""
    changes = np.ones(len(values), dtype=bool)
    changes[1:] = values[1:] != values[:-1]
    return changes


class SortedFirings:
    """The firings of a batch sorted by (feature, row, position)."""

    def __init__(self, firings: Firings, feature_S: np.ndarray, *, first_row: int, window: Window) -> None:
        order_S = np.argsort(feature_S, kind="stable")  # firings are in the order of rows and positions
        self.tokens_RT, self.first_row, self.window = firings.tokens_RT, first_row, window
        self.feature, self.row, self.position = feature_S[order_S], firings.row[order_S], firings.position[order_S]
        self.activation = firings.activation[order_S]
        n_rows, self.context = firings.tokens_RT.shape
        self._code = (self.feature * n_rows + self.row) * self.context + self.position

    def peaks(self, worst_F: np.ndarray) -> tuple[Candidates, np.ndarray]:
        """The largest activation of each feature in each row, where it is at least `worst_F`; and the firings' numbers."""
        begins = np.flatnonzero(_changes(self._code // self.context))
        largest = np.maximum.reduceat(self.activation, begins) if len(begins) else self.activation
        hopeful = np.flatnonzero(largest >= worst_F[self.feature[begins]])
        ends = np.append(begins[1:], len(self.activation))
        chosen_S = np.zeros(len(self.activation) + 1, dtype=np.int64)
        np.add.at(chosen_S, begins[hopeful], 1)
        np.add.at(chosen_S, ends[hopeful], -1)
        places = np.flatnonzero(np.cumsum(chosen_S[:-1]))
        segment = np.searchsorted(begins, places, side="right") - 1
        is_peak = self.activation[places] == largest[segment]
        places, segment = places[is_peak], segment[is_peak]
        places = places[_changes(segment)]
        return self._candidates(places, self.activation[places].astype(np.float64), self._contexts(places)), places

    def draws(self, worst_F: np.ndarray) -> tuple[Candidates, np.ndarray]:
        """Every firing with a pseudo-random score in [0, 1), where that is at least `worst_F`; and the firings' numbers."""
        place_S = ((self.row + self.first_row) * self.context + self.position).astype(np.uint64)
        bits_S = place_S * _STEP + self.feature.astype(np.uint64) * _ODD
        for shift, factor in ((30, _MULTIPLIER), (27, _ODD)):  # splitmix64
            bits_S = (bits_S ^ (bits_S >> np.uint64(shift))) * factor
        score_S = ((bits_S ^ (bits_S >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        places = np.flatnonzero(score_S >= worst_F[self.feature])
        return self._candidates(places, score_S[places], place_S[places]), places

    def windows(self, places: np.ndarray) -> np.ndarray:
        """Activations `[n, W]` around some firings, in multiples of theirs."""
        window, position, code = self.window, self.position[places], self._code[places]
        begin = np.searchsorted(self._code, code - np.minimum(window.before, position))
        end = np.searchsorted(self._code, code + np.minimum(window.after, self.context - 1 - position), side="right")
        number = np.repeat(np.arange(len(places)), end - begin)
        near = np.arange(len(number)) + np.repeat(begin - np.cumsum(end - begin) + (end - begin), end - begin)
        windows = np.zeros((len(places), window.width), np.float16)
        ratio = self.activation[near] / self.activation[places[number]]
        windows[number, self._code[near] - code[number] + window.before] = ratio.clip(max=_LARGEST_RATIO)
        return windows

    def _candidates(self, places: np.ndarray, score: np.ndarray, key: np.ndarray) -> Candidates:
        row = self.row[places] + self.first_row
        return Candidates(self.feature[places], score, self.activation[places], row, self.position[places], key)

    def _contexts(self, places: np.ndarray) -> np.ndarray:
        """Hashes of the tokens up to some firings."""
        row, position = self.row[places], self.position[places]
        hashes = np.zeros(len(places), np.uint64)
        for distance in range(SAME_CONTEXT):
            token = np.where(position >= distance, self.tokens_RT[row, (position - distance).clip(min=0)] + 1, 0)
            hashes = (hashes + token.astype(np.uint64)) * _STEP
            hashes ^= hashes >> np.uint64(32)
        return hashes


@dataclass(eq=False)
class Evidence:
    """Everything that a pass over text keeps: counts, histograms, examples and the rows that these are from."""

    n_tokens: int
    """Tokens that count."""
    n_active_F: np.ndarray
    """Of them, those where each feature fires."""
    histograms: Histograms
    top: Kept
    sample: Kept
    rows: dict[int, np.ndarray]
    """Tokens of the rows of examples, by number in the data; a few more than needed."""

    @classmethod
    def empty(cls, n_features: int, *, window: Window, n_top: int, n_sampled: int) -> Evidence:
        """Before the first row."""
        top, sample = (Kept.empty(n_features, n_kept, window) for n_kept in (n_top, n_sampled))
        return cls(0, np.zeros(n_features, np.int64), Histograms.empty(n_features), top, sample, {})

    def add(self, firings: Firings, feature_S: np.ndarray, *, first_row: int, window: Window) -> None:
        """Add a batch of rows.

        Args:
            feature_S: number of the feature of every firing.
            first_row: number of the batch's first row in the data.
        """
        batch = SortedFirings(firings, feature_S, first_row=first_row, window=window)
        self.n_tokens += firings.n_tokens
        features, counts = np.unique(batch.feature, return_counts=True)
        self.n_active_F[features] += counts
        self.histograms.add(batch.feature, batch.activation)
        for kept, choose in ((self.top, batch.peaks), (self.sample, batch.draws)):
            candidates, places = choose(kept.score_FK[:, -1])
            rows = kept.offer(candidates, places, batch.windows)
            for row in np.unique(rows).tolist():
                self.rows[row] = firings.tokens_RT[row - first_row]

    def merge(self, other: Evidence) -> None:
        """Add what a pass over other rows has kept; the other is changed, too."""
        self.n_tokens += other.n_tokens
        self.n_active_F += other.n_active_F
        self.histograms.merge(other.histograms)
        self.top.merge(other.top)
        self.sample.merge(other.sample)
        self.rows |= other.rows

    def drop_rows(self) -> None:
        """Forget the rows that no example is from any more."""
        used = [kept.row_FK[kept.score_FK > -np.inf] for kept in (self.top, self.sample)]
        self.rows = {row: self.rows[row] for row in np.unique(np.concatenate(used)).tolist()}

    # Saving -----------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a file; `from_arrays` is the inverse."""
        self.drop_rows()
        return {
            "n_tokens": np.array(self.n_tokens),
            "n_active_F": self.n_active_F,
            "row_number_R": np.array(list(self.rows), dtype=np.int64),
            "row_tokens_RT": np.array(list(self.rows.values())),
            **{
                f"{part}.{f.name}": getattr(getattr(self, part), f.name)
                for part, kind in _PARTS.items()
                for f in fields(kind)
            },
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Evidence:
        """What `arrays` gave."""
        parts = {
            part: kind(**{f.name: arrays[f"{part}.{f.name}"] for f in fields(kind)}) for part, kind in _PARTS.items()
        }
        rows = dict(zip(arrays["row_number_R"].tolist(), arrays["row_tokens_RT"], strict=True))
        return cls(int(arrays["n_tokens"]), arrays["n_active_F"], rows=rows, **parts)


_PARTS = {"histograms": Histograms, "top": Kept, "sample": Kept}
