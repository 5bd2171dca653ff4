"""A sample of text and where features fire in it, laid out for counting: what `labelling` fits claims to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from replacement.index.claims import CONDITIONS, MOST_VALUES
from replacement.index.contexts import AFFIX_LENGTHS, FIRST_PIECE, LATER_PIECE, Contexts
from replacement.index.scoring import expand
from replacement.token_texts import CLASSES

_MOST = {"last digit": 3, "ends": 1, "begins": 1, "class": 1, "earlier": 64}
"""Values that a claim may list, where fewer than `MOST_VALUES`."""
TEXTS = ("name", "word", "current")
"""Conditions of the text that ends at a token, the longest first."""
BEFORE = ("previous", "first", "earlier")
"""Conditions of what stands before a token."""


@dataclass(eq=False)
class Sample:
    """Some rows of text, and the places of the flattened rows where features fire."""

    contexts: Contexts
    feature_S: np.ndarray
    """Number of the feature, sorted."""
    place_S: np.ndarray
    n_features: int
    measured_P: np.ndarray | None = None
    """Places that count; all by default."""

    def __post_init__(self) -> None:
        P = self.contexts.tokens_RT.size
        measured_P = np.ones(P, dtype=bool) if self.measured_P is None else self.measured_P
        counted_S = measured_P[self.place_S]
        code_S = np.sort(self.feature_S[counted_S].astype(np.int64) * P + self.place_S[counted_S])
        self.feature_S, self.place_S = np.divmod(code_S, P)
        is_odd_P = np.repeat(np.arange(len(self.contexts.tokens_RT)) % 2 == 1, self.contexts.tokens_RT.shape[1])
        self.parts = {"fitted": measured_P & ~is_odd_P, "compared": measured_P & is_odd_P, "all": measured_P}
        """Places of even rows, which sets are fitted on, of odd ones, which kinds of claims are compared on, and both."""

    @cached_property
    def columns(self) -> list[Column]:
        """What a condition may look at; no two columns are the same by the vocabulary's nature."""
        pieces = self.contexts.texts.splits_words
        names = ["name", *(["word"] if pieces else []), "current", "last digit", "previous", "first"]
        names += [f"class {name}" for name in (*CLASSES, *((FIRST_PIECE, LATER_PIECE) if pieces else ()))]
        names += [f"{end} {length}" for end in ("ends", "begins") for length in AFFIX_LENGTHS]
        return [Column(name, self.contexts) for name in (*names, "earlier")]


class Column:
    """The values of a column, numbered, and the places where each occurs.

    Attributes:
        kind: of the condition that looks at it.
        most: values that a claim may list.
        n: values there are.
    """

    def __init__(self, name: str, contexts: Contexts) -> None:
        self.name, self._contexts = name, contexts
        self.kind = name if name in CONDITIONS else name.partition(" ")[0]
        self.most = _MOST.get(self.kind, MOST_VALUES)
        if name == "earlier":
            place_E, value_E = _earlier_pairs(contexts)
        else:
            value_P = contexts.column(name).ravel()
            place_E = np.flatnonzero(value_P)
            value_E = value_P[place_E]
        self._value_U, number_E = np.unique(value_E, return_inverse=True)
        self.n = max(1, len(self._value_U))
        by_place, by_value = (np.argsort(key_E, kind="stable") for key_E in (place_E, number_E))
        self._number_E, self._place_E = number_E[by_place], place_E[by_value]
        self._bounds_P = np.searchsorted(place_E[by_place], np.arange(contexts.tokens_RT.size + 1))
        self._bounds_U = np.searchsorted(number_E[by_value], np.arange(self.n + 1))

    def at(self, place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values at places: numbers into `place_N`, and numbers of values."""
        number_E, element_E = expand(self._bounds_P[place_N], self._bounds_P[place_N + 1])
        return number_E, self._number_E[element_E]

    def places_of(self, value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of values: numbers into `value_N`, and places."""
        number_E, element_E = expand(self._bounds_U[value_N], self._bounds_U[value_N + 1])
        return number_E, self._place_E[element_E]

    def occurrences(self, is_counted_P: np.ndarray) -> np.ndarray:
        """How often each value occurs at the places that count."""
        number_E = np.repeat(np.arange(self.n), np.diff(self._bounds_U))
        return np.bincount(number_E[is_counted_P[self._place_E]], minlength=self.n)

    def text(self, number: int) -> str:
        """The text of a value."""
        if self.kind == "class":
            return self.name.removeprefix("class ")
        if self.kind in ("first", "earlier"):
            return self._contexts.word_texts[int(self._value_U[number])]
        place = int(self._place_E[self._bounds_U[number]])
        if self.kind in ("begins", "ends", "last digit"):
            length = 1 if self.kind == "last digit" else int(self.name[-1])
            word = self._contexts.text_at("word", place)
            return word[:length] if self.kind == "begins" else word[-length:]
        return self._contexts.text_at(self.name, place)


def _earlier_pairs(contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """Every place with every distinct whole word earlier in its sentence: places, and hashes of words."""
    place_S, word_S = contexts.earlier()
    sentence_P = contexts.sentence_RT.ravel()
    order_S = np.lexsort((place_S, word_S, sentence_P[place_S]))
    place_S, word_S = place_S[order_S], word_S[order_S]
    sentence_S = sentence_P[place_S]
    is_new_S = np.ones(len(place_S), dtype=bool)
    is_new_S[1:] = (np.diff(sentence_S) != 0) | (np.diff(word_S) != 0)
    place_S, word_S, sentence_S = place_S[is_new_S], word_S[is_new_S], sentence_S[is_new_S]
    number_E, place_E = expand(place_S + 1, np.searchsorted(sentence_P, sentence_S, side="right"))
    return place_E, word_S[number_E]
