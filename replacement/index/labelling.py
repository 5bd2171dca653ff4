"""The claim that fits each feature best, found by counting on a sample of text and the places where features fire in it.

For one condition (say, the previous token) every value gets the share of its places that fire; the values in falling order of
that share, cut where F1 is largest, are the best set there is. A second condition is fitted in the same way among the places
where a wider first one holds (cut where F2 is largest); the first is then fitted again among the places where the second holds.

Many kinds of conditions are tried, and sets of rare values fit noise. So sets are fitted on the even rows of the sample and
claims are compared by F1 on the odd ones: of all whose F1 there is within `SIMPLER_WITHIN` of the best, the one with the fewest
values wins (a second condition counts as one more). Its sets are then fitted again on all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from replacement.index.claims import Claim, Condition
from replacement.index.evidence import BEFORE, TEXTS, Column, Sample
from replacement.index.scoring import is_among

SIMPLER_WITHIN = 0.02
"""Differences of F1 that a simpler claim is preferred across."""
GOOD_ENOUGH = 0.95
"""A second condition is looked for where F1 is below it."""
FEW = 5
"""A feature that fires at fewer places for comparison gets a claim about words alone."""
_FIRST_TRIED = 2
"""Kinds of conditions that a second one is added to."""
_FIRINGS_AT_A_TIME = 2_000_000
_PLACES_AT_A_TIME = 16_000_000
"""Bounds of memory; nothing is added to the widest first conditions, where all together hold at more places than this."""


def propose_claims(sample: Sample) -> list[Claim | None]:
    """The best claim about every feature; None for one that does not fire in the sample.

    Args:
        sample: a fair sample of the text: rows drawn as they come, with every place where a feature fires.
    """
    claims: list[Claim | None] = [None] * sample.n_features
    bounds_F = np.searchsorted(sample.feature_S, np.arange(sample.n_features + 1))
    first = 0
    while first < sample.n_features:
        end = int(np.searchsorted(bounds_F, bounds_F[first] + _FIRINGS_AT_A_TIME, side="right")) - 1
        end = min(max(end, first + 1), sample.n_features)
        chosen = slice(int(bounds_F[first]), int(bounds_F[end]))
        search = _Search(sample, sample.feature_S[chosen] - first, sample.place_S[chosen], end - first)
        for feature, claim in search.claims():
            claims[first + feature] = claim
        first = end
    return claims


# Counting ----------------------------------------------------------------------------------------------------------------


class _Sets(NamedTuple):
    """A set of values per feature, as (feature, value) pairs sorted by feature."""

    column: Column
    feature_E: np.ndarray
    value_E: np.ndarray
    fires_E: np.ndarray
    """How often the feature fires at the value."""

    def of(self, keep_F: np.ndarray) -> _Sets:
        """Those of some features."""
        keep_E = keep_F[self.feature_E]
        return _Sets(self.column, *(values_E[keep_E] for values_E in self[1:]))

    def codes(self) -> np.ndarray:
        """Sorted numbers of the (feature, value) pairs."""
        return np.sort(self.feature_E * self.column.n + self.value_E)

    def condition(self, feature: int) -> Condition | None:
        """The condition of one feature; None if it has no values."""
        here = slice(*np.searchsorted(self.feature_E, [feature, feature + 1]))
        if here.start == here.stop:
            return None
        by_count = np.argsort(-self.fires_E[here], kind="stable")
        return Condition(
            self.column.kind, tuple(self.column.text(value) for value in self.value_E[here][by_count].tolist())
        )


class _Places(NamedTuple):
    """(feature, place) pairs to which a first condition has narrowed the search; all places if there is none."""

    sample: Sample
    fires: tuple[np.ndarray, np.ndarray]
    """Features that fire, and the places."""
    all: tuple[np.ndarray, np.ndarray] | None = None

    def tally(self, column: Column, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted codes `feature * n + value` of the values where features fire in a part; how often they fire, and occur."""
        code_U, fires_U = _count(*self.fires, column, self.sample.parts[part])
        if self.all is None:
            return code_U, fires_U, column.occurrences(self.sample.parts[part])[code_U % column.n]
        code_V, holds_V = _count(*self.all, column, self.sample.parts[part])
        return code_U, fires_U, holds_V[np.searchsorted(code_V, code_U)]

    def where(self, sets: _Sets) -> _Places:
        """Narrowed to where the sets' conditions hold."""
        column, size = sets.column, self.sample.contexts.tokens_RT.size
        if self.all is None:
            number_E, place_E = column.places_of(sets.value_E)
            feature_E = sets.feature_E[number_E]
        else:
            number_E, value_E = column.at(self.all[1])
            number_E = number_E[is_among(self.all[0][number_E] * column.n + value_E, sets.codes())]
            feature_E, place_E = (values_N[number_E] for values_N in self.all)
        code_N = np.sort(feature_E * size + place_E)
        code_N = code_N[np.diff(code_N, prepend=-1) > 0]  # faster than np.unique, which hashes
        fires_N = is_among(code_N, self.fires[0] * size + self.fires[1])
        feature_N, place_N = np.divmod(code_N, size)
        return _Places(self.sample, (feature_N[fires_N], place_N[fires_N]), (feature_N, place_N))


def _count(
    feature_N: np.ndarray, place_N: np.ndarray, column: Column, is_in_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    is_in_N = is_in_P[place_N]
    number_E, value_E = column.at(place_N[is_in_N])
    return np.unique(feature_N[is_in_N][number_E] * column.n + value_E, return_counts=True)


def _best_sets(
    column: Column, tally: tuple[np.ndarray, np.ndarray, np.ndarray], fires_F: np.ndarray, *, beta: float = 1.0
) -> _Sets:
    """For every feature the set of values of largest F-beta.

    F-beta is a ratio of sums over the values, so that the best set (of values that do not overlap) is a head of the list sorted
    by the share of places that fire.
    """
    code_U, fires_U, holds_U = tally
    feature_U, value_U = np.divmod(code_U, column.n)
    share_U = fires_U / holds_U
    if column.most == 1:
        share_U = fires_U / (beta**2 * fires_F[feature_U] + holds_U)  # the best one, not the head of the list
    order_U = np.lexsort((-fires_U, -share_U, feature_U))
    feature_U, value_U, fires_U, holds_U = (x_U[order_U] for x_U in (feature_U, value_U, fires_U, holds_U))
    begin_U = np.searchsorted(feature_U, feature_U)
    rank_U = np.arange(len(feature_U)) - begin_U
    sum_fires_U, sum_holds_U = (np.cumsum(x_U) - (np.cumsum(x_U) - x_U)[begin_U] for x_U in (fires_U, holds_U))
    score_U = np.minimum(sum_fires_U, fires_F[feature_U]) / (beta**2 * fires_F[feature_U] + sum_holds_U)
    score_U[rank_U >= column.most] = 0.0
    best_F = np.zeros(len(fires_F))
    np.maximum.at(best_F, feature_U, score_U)
    is_best_U = score_U == best_F[feature_U]
    cut_F = np.full(len(fires_F), len(feature_U))
    np.minimum.at(cut_F, feature_U[is_best_U], rank_U[is_best_U])
    kept_U = rank_U <= cut_F[feature_U]
    return _Sets(column, feature_U[kept_U], value_U[kept_U], fires_U[kept_U])


# Choosing ----------------------------------------------------------------------------------------------------------------

_Recipe = tuple[int, ...]
"""Columns that a claim's conditions look at, by number."""


class _Search:
    """The search for claims about some features, by number; `place_S` are the places where `feature_S` fire."""

    def __init__(self, sample: Sample, feature_S: np.ndarray, place_S: np.ndarray, n_features: int) -> None:
        self.columns, self.parts, self.n_features = sample.columns, sample.parts, n_features
        self.everywhere = _Places(sample, (feature_S, place_S))
        self.fires = {part: self._per_feature(feature_S[is_in_P[place_S]]) for part, is_in_P in self.parts.items()}
        self.offers: list[tuple[_Recipe, np.ndarray, np.ndarray]] = []
        """Recipe, and for every feature its F1 on the rows for comparison and how many values it lists."""
        self._word = next(number for number, column in enumerate(self.columns) if column.kind in ("word", "current"))

    def claims(self) -> Iterator[tuple[int, Claim]]:
        """The best claim about every feature that fires."""
        for number, column in enumerate(self.columns):
            single = self._single(column, "fitted")
            self.offers.append(((number,), self._f1_of_single(single), self._per_feature(single.feature_E)))
        is_open_F = (np.max([f1_F for _, f1_F, _ in self.offers], 0) < GOOD_ENOUGH) & (self.fires["fitted"] > 0)
        leading_KF = self._leading()
        for number in np.unique(leading_KF[:, is_open_F]).tolist():
            tried_F = is_open_F & (leading_KF == number).any(0)
            for other, sets, both in self._pairs(number, tried_F, "fitted"):
                size_F = self._per_feature(np.concatenate([x.feature_E for x in sets])) + 1
                self.offers.append(((number, other), np.where(tried_F, self._f1(both), 0.0), size_F))
        choice_F, is_left_F = self._choice(), self.fires["all"] > 0
        for number in np.unique(choice_F[is_left_F]).tolist():
            for feature, claim in self._fit((choice_F == number) & is_left_F, self.offers[number][0]):
                is_left_F[feature] = False
                yield feature, claim
        yield from self._fit(is_left_F, (self._word,))  # whose conditions fit no value on all rows

    def _leading(self) -> np.ndarray:
        """Numbers `[k, F]` of the columns of the best conditions, to which another is added: at most one of the token's text,
        and not `earlier`, the last."""
        f1_KF = np.stack([f1_F for _, f1_F, _ in self.offers[:-1]])
        texts = [number for number, column in enumerate(self.columns) if column.kind in TEXTS]
        best_F = f1_KF[texts].argmax(0)
        f1_KF[texts] = np.where(np.arange(len(texts))[:, None] == best_F, f1_KF[texts], -1.0)
        return np.argsort(-f1_KF, axis=0, kind="stable")[:_FIRST_TRIED]

    def _choice(self) -> np.ndarray:
        """Number of the offer to take for every feature."""
        f1_NF, size_NF = (np.stack([offer[place] for offer in self.offers]) for place in (1, 2))
        is_near_NF = (f1_NF >= f1_NF.max(0) - SIMPLER_WITHIN) & (size_NF > 0)
        # Fewest values, then largest F1, then the kind tried first.
        choice_F = np.lexsort((-f1_NF, np.where(is_near_NF, size_NF, np.iinfo(np.int64).max)), axis=0)[0]
        return np.where(self.fires["compared"] < FEW, self._word, choice_F)

    def _fit(self, chosen_F: np.ndarray, recipe: _Recipe) -> Iterator[tuple[int, Claim]]:
        """Claims of a recipe about some features, fitted on all rows."""
        if len(recipe) == 1:
            fitted = [self._single(self.columns[recipe[0]], "all")]
        else:
            fitted = next(sets for other, sets, _ in self._pairs(recipe[0], chosen_F, "all", partners=recipe[1:]))
        for feature in np.flatnonzero(chosen_F).tolist():
            conditions = tuple(filter(None, (sets.condition(feature) for sets in fitted)))
            if len(conditions) == len(recipe):
                yield feature, Claim(conditions)

    def _per_feature(self, feature_N: np.ndarray, weight_N: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(feature_N, weight_N, self.n_features)

    # One condition ---------------------------------------------------------------------------------------------------

    def _single(self, column: Column, part: str) -> _Sets:
        return _best_sets(column, self.everywhere.tally(column, part), self.fires[part])

    def _f1_of_single(self, sets: _Sets) -> np.ndarray:
        if sets.column.kind == "earlier":  # its values overlap
            return self._f1(self.everywhere.where(sets))
        code_U, fires_U, _ = self.everywhere.tally(sets.column, "compared")
        code_E = sets.feature_E * sets.column.n + sets.value_E
        known_E = is_among(code_E, code_U)
        fires_E = np.zeros(len(code_E))
        fires_E[known_E] = fires_U[np.searchsorted(code_U, code_E[known_E])]
        holds_E = sets.column.occurrences(self.parts["compared"])[sets.value_E]
        both_F, holds_F = (self._per_feature(sets.feature_E, x_E) for x_E in (fires_E, holds_E))
        return 2 * both_F / np.maximum(self.fires["compared"] + holds_F, 1)

    def _f1(self, places: _Places) -> np.ndarray:
        """F1 on the rows for comparison of the conditions that led to some places."""
        assert places.all is not None
        is_in_P = self.parts["compared"]
        both_F, holds_F = (self._per_feature(f_N[is_in_P[place_N]]) for f_N, place_N in (places.fires, places.all))
        return 2 * both_F / np.maximum(self.fires["compared"] + holds_F, 1)

    # Two -------------------------------------------------------------------------------------------------------------

    def _pairs(
        self, number: int, tried_F: np.ndarray, part: str, partners: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[_Sets], _Places]]:
        """Second conditions beside that of a column: the number of its column, both sets, and where both hold."""
        column, fires_F = self.columns[number], self.fires[part]
        tally = self.everywhere.tally(column, part)
        wide = _best_sets(column, tally, fires_F, beta=2.0).of(tried_F)
        holds_F = self._per_feature(wide.feature_E, column.occurrences(self.parts[part])[wide.value_E])
        widest_last_F = np.argsort(holds_F / np.maximum(fires_F, 1), kind="stable")
        kept_F = np.zeros(self.n_features, dtype=bool)
        kept_F[widest_last_F[np.cumsum(holds_F[widest_last_F]) <= _PLACES_AT_A_TIME]] = True
        places = self.everywhere.where(wide.of(kept_F))
        for other in self._partners(number) if partners is None else partners:
            second = _best_sets(self.columns[other], places.tally(self.columns[other], part), fires_F)
            both = places.where(second)
            first = _best_sets(column, both.tally(column, part), fires_F)
            yield other, [first, second], both.where(first)

    def _partners(self, number: int) -> list[int]:
        """Columns of conditions to add to that of a column: of what stands before, or of the token for one of these."""
        kind = self.columns[number].kind
        wanted = (*BEFORE, *((*TEXTS, "class", "last digit") if kind in BEFORE else ()))
        return [other for other, column in enumerate(self.columns) if column.kind in wanted and column.kind != kind]
