"""Claims as detectors of their features: counts of places that fire, that the claim holds at, and both, in one pass over text.

A claim predicts that its feature fires wherever the claim holds. Many claims are matched at once: tables sorted by value lead
from the values of a batch to the claims that look for them, so that the cost grows with the places where claims hold, and not
with claims times places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from replacement.index.claims import Claim, Condition
from replacement.index.contexts import Contexts

_DRIVING = ("name", "word", "current", "last digit", "previous", "ends", "begins", "first", "class", "earlier")
"""Of two conditions, that of the earlier kind here says where to look; the other is checked there."""


def expand(begin_N: np.ndarray, end_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For ranges `[begin, end)`: the number of the range of every element, and the element."""
    size_N = np.maximum(end_N - begin_N, 0)
    number_E = np.repeat(np.arange(len(size_N)), size_N)
    first_N = np.cumsum(size_N) - size_N
    return number_E, np.arange(len(number_E)) - first_N[number_E] + begin_N[number_E]


def is_among(value_N: np.ndarray, sorted_M: np.ndarray) -> np.ndarray:
    """Whether each value is one of some sorted values."""
    if not len(sorted_M):
        return np.zeros(len(value_N), dtype=bool)
    place_N = np.minimum(np.searchsorted(sorted_M, value_N), len(sorted_M) - 1)
    return sorted_M[place_N] == value_N


class _Table:
    """Which claims look for which values in one column."""

    def __init__(self, wanted: Sequence[tuple[int, Condition]]) -> None:
        claim_V = np.repeat([claim for claim, _ in wanted], [len(condition.values) for _, condition in wanted])
        value_V = np.concatenate([condition.hashes for _, condition in wanted])
        order_V = np.lexsort((claim_V, value_V))
        self.claim_V, self.value_V = claim_V[order_V].astype(np.int64), value_V[order_V]

    def matches(self, value_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every claim that looks for each of some values: numbers of the values, and the claims."""
        begin_P, end_P = (np.searchsorted(self.value_V, value_P, side=side) for side in ("left", "right"))
        number_E, place_E = expand(begin_P, end_P)
        return number_E, self.claim_V[place_E]


class Matcher:
    """Finds where each of many claims holds."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.n_claims = len(claims)
        self._is_pair_C = np.array([len(claim.conditions) > 1 for claim in claims], dtype=bool)
        driving: dict[str, list[tuple[int, Condition]]] = {}
        checking: dict[str, list[tuple[int, Condition]]] = {}
        for number, claim in enumerate(claims):
            first, *rest = sorted(claim.conditions, key=lambda condition: _DRIVING.index(condition.kind))
            driving.setdefault(first.column, []).append((number, first))
            for condition in rest:
                checking.setdefault(condition.column, []).append((number, condition))
        self._driving = {column: _Table(wanted) for column, wanted in driving.items()}
        self._checking = {column: _Table(wanted) for column, wanted in checking.items()}

    def find(self, contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
        """Every (claim, place of the flattened rows) where a claim holds, once, in no particular order."""
        claims, places = [], []
        for column, table in self._driving.items():
            claim_E, place_E = _where(contexts, column, table)
            claims.append(claim_E)
            places.append(place_E)
        if not claims:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        claim_E, place_E = np.concatenate(claims), np.concatenate(places)
        to_check_E = self._is_pair_C[claim_E]
        holds_E = ~to_check_E
        for column, table in self._checking.items():
            holds_E[to_check_E] |= self._check(contexts, column, table, claim_E[to_check_E], place_E[to_check_E])
        return claim_E[holds_E], place_E[holds_E]

    def _check(
        self, contexts: Contexts, column: str, table: _Table, claim_E: np.ndarray, place_E: np.ndarray
    ) -> np.ndarray:
        """Whether a claim's second condition, if it looks at this column, holds at each place; False if it does not."""
        size = contexts.tokens_RT.size
        if column:
            values_U, number_P = np.unique(contexts.column(column).ravel(), return_inverse=True)
            number_M, claim_M = table.matches(values_U)
            wanted_M = np.sort(claim_M * size + number_M)
            return is_among(claim_E * size + number_P.ravel()[place_E], wanted_M)
        # `earlier`: after the first of its words in the same sentence.
        claim_M, sentence_M, first_M = _first_in_sentence(contexts, table)
        code_M, code_E = claim_M * size + sentence_M, claim_E * size + contexts.sentence_RT.ravel()[place_E]
        found_E = is_among(code_E, code_M)
        found_E[found_E] = first_M[np.searchsorted(code_M, code_E[found_E])] < place_E[found_E]
        return found_E


def _where(contexts: Contexts, column: str, table: _Table) -> tuple[np.ndarray, np.ndarray]:
    """Claims and places where the conditions of a table hold."""
    if column:
        place_E, claim_E = table.matches(contexts.column(column).ravel())
        return claim_E, place_E
    claim_M, sentence_M, first_M = _first_in_sentence(contexts, table)
    end_M = np.searchsorted(contexts.sentence_RT.ravel(), sentence_M, side="right")
    number_E, place_E = expand(first_M + 1, end_M)
    return claim_M[number_E], place_E


def _first_in_sentence(contexts: Contexts, table: _Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `earlier`: (claim, sentence), sorted, and the place of the first word in that sentence that the claim looks for."""
    place_S, word_S = contexts.earlier()
    number_M, claim_M = table.matches(word_S)
    place_M = place_S[number_M]
    sentence_M = contexts.sentence_RT.ravel()[place_M]
    _, first_M = np.unique(claim_M * contexts.tokens_RT.size + sentence_M, return_index=True)
    return claim_M[first_M], sentence_M[first_M], place_M[first_M]


@dataclass(eq=False)
class DetectorCounts:
    """Counts of claims as detectors, which grow batch by batch.

    Args:
        claims: the claims.
        feature_C: the number of the feature that each is about.
        n_features: features there are.
    """

    claims: Sequence[Claim]
    feature_C: np.ndarray
    n_features: int
    fires_F: np.ndarray = field(init=False)
    """Places where each feature fires."""
    holds_C: np.ndarray = field(init=False)
    """Places where each claim holds."""
    both_C: np.ndarray = field(init=False)
    """Places where a claim holds and its feature fires."""

    def __post_init__(self) -> None:
        self._matcher = Matcher(self.claims)
        self.feature_C = np.asarray(self.feature_C, dtype=np.int64)
        self.fires_F = np.zeros(self.n_features, dtype=np.int64)
        self.holds_C, self.both_C = (np.zeros(len(self.claims), dtype=np.int64) for _ in range(2))

    def add(
        self, contexts: Contexts, feature_S: np.ndarray, place_S: np.ndarray, measured_P: np.ndarray | None = None
    ) -> None:
        """Count one batch.

        Args:
            contexts: of the batch's rows.
            feature_S: features that fire.
            place_S: the places of the flattened rows where they do.
            measured_P: bool, places that count; all by default.
        """
        if measured_P is not None:
            counted_S = measured_P[place_S]
            feature_S, place_S = feature_S[counted_S], place_S[counted_S]
        claim_E, place_E = self._matcher.find(contexts)
        if measured_P is not None:
            counted_E = measured_P[place_E]
            claim_E, place_E = claim_E[counted_E], place_E[counted_E]
        size = contexts.tokens_RT.size
        fired_E = is_among(self.feature_C[claim_E] * size + place_E, np.sort(feature_S * size + place_S))
        self.fires_F += np.bincount(feature_S, minlength=self.n_features)
        self.holds_C += np.bincount(claim_E, minlength=len(self.claims))
        self.both_C += np.bincount(claim_E[fired_E], minlength=len(self.claims))

    def scores(self) -> Scores:
        """Precision, recall and F1 of every claim."""
        return Scores.of(self.fires_F[self.feature_C], self.holds_C, self.both_C)


@dataclass(frozen=True, eq=False)
class Scores:
    """How well claims detect their features; NaN where nothing can be said.

    precision = share of places where the claim holds that fire; recall = share of places that fire where it holds.
    """

    precision_C: np.ndarray
    recall_C: np.ndarray
    f1_C: np.ndarray
    """`2 both / (fires + holds)`; NaN where the feature never fires."""

    @classmethod
    def of(cls, fires_C: np.ndarray, holds_C: np.ndarray, both_C: np.ndarray) -> Scores:
        """Scores from counts (of places, or of weights that estimate them)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            f1_C = np.where(fires_C > 0, 2 * both_C / (fires_C + holds_C), np.nan)
            return cls(both_C / np.where(fires_C > 0, holds_C, 0), both_C / fires_C, f1_C)
