"""Claims: short, checkable statements about where a feature fires, from a small grammar and without any language model.

A claim is one condition or two that hold together; a condition says that something at a token, or before it, is one of some
values. As JSON it is an object of conditions: `{"current": ["horse", "boat"], "first": ["which", "who"]}`.

| condition | what has to be one of the values |
|---|---|
| `current` | the token; `##las` continues a word |
| `word` | the word joined from its pieces up to the token: `Dallas` at the last piece of `Dal ##las` |
| `name` | the same of a run of up to three capitalised words: `El Paso` |
| `class` | `number`, `capitalised word`, `lower-case word`, `punctuation`, `first piece of a word`, `later piece of a word` |
| `begins`, `ends` | the first or last 1 to 3 letters of a longer word |
| `last digit` | the last digit of a number |
| `previous` | the token before |
| `first` | the first word of the sentence |
| `earlier` | some whole word earlier in the sentence |
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from replacement.index.contexts import AFFIX_LENGTHS, FIRST_PIECE, LATER_PIECE, Contexts, text_hash
from replacement.token_texts import CLASSES, quoted

CONDITIONS = ("name", "word", "current", "last digit", "ends", "begins", "class", "previous", "first", "earlier")
"""Kinds of conditions: first those of the token, then those of what stands before it."""
SHORT = 60
"""Characters of a claim's short form, where its words allow it."""
MOST_VALUES = 256
"""Values of a condition."""
LONGEST_VALUE = 100
_SHOWN_IN_FULL = 12


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a claim.

    Raises:
        ValueError: an unknown kind, no values or too many, a value twice, an unknown class, or affixes of several lengths.
    """

    kind: str
    """One of `CONDITIONS`."""
    values: tuple[str, ...]
    """Any of them will do; the most frequent first."""

    def __post_init__(self) -> None:
        if self.kind not in CONDITIONS:
            raise ValueError(f"expected a condition among {', '.join(CONDITIONS)}, got {self.kind!r:.50}")
        if not 1 <= len(self.values) <= MOST_VALUES:
            raise ValueError(f"{self.kind}: expected 1 to {MOST_VALUES} values, got {len(self.values)}")
        if any(not 1 <= len(value) <= LONGEST_VALUE for value in self.values):
            raise ValueError(f"{self.kind}: expected values of 1 to {LONGEST_VALUE} characters")
        classes = (*CLASSES, FIRST_PIECE, LATER_PIECE)
        if self.kind == "class" and (len(self.values) > 1 or self.values[0] not in classes):
            raise ValueError(f"class: expected one of {', '.join(classes)}, got {', '.join(self.values)!r:.50}")
        if len(set(self.values)) < len(self.values):
            raise ValueError(f"{self.kind}: a value is given twice")
        lengths = {len(value) for value in self.values}
        if self.kind in ("begins", "ends") and not (len(lengths) == 1 and lengths <= set(AFFIX_LENGTHS)):
            raise ValueError(f"{self.kind}: expected values of one length, 1 to {max(AFFIX_LENGTHS)} letters")

    @property
    def column(self) -> str:
        """The column of `Contexts` that it looks at; empty for `earlier`, which looks at several tokens."""
        if self.kind == "earlier":
            return ""
        suffix = {"class": f" {self.values[0]}", "begins": f" {len(self.values[0])}", "ends": f" {len(self.values[0])}"}
        return self.kind + suffix.get(self.kind, "")

    @property
    def is_of_token(self) -> bool:
        """Whether it is about the token itself, not about what stands before it."""
        return CONDITIONS.index(self.kind) < CONDITIONS.index("previous")

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the values, int64."""
        return np.array([_cached_hash(value) for value in self.values], dtype=np.int64)

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Where it holds, bool `[R, T]`."""
        if self.column:
            return np.isin(contexts.column(self.column), self.hashes)
        place_S, word_S = contexts.earlier()
        sentence_P = contexts.sentence_RT.ravel()
        seen_P = np.zeros(len(sentence_P) + 1, dtype=np.int64)
        seen_P[place_S[np.isin(word_S, self.hashes)] + 1] = 1
        seen_P = np.cumsum(seen_P)[:-1]  # among the tokens before
        at_start_P = seen_P[np.searchsorted(sentence_P, sentence_P)]
        return (seen_P > at_start_P).reshape(contexts.tokens_RT.shape)

    def text(self, n_shown: int) -> str:
        """In words, with this many of the values."""
        shown = map(printable, self.values[:n_shown])
        if self.kind not in _PATTERNS:  # patterns have quotes of their own
            shown = map(quoted, shown)
        listed = " | ".join(shown) + (" …" if len(self.values) > n_shown else "")
        if self.kind == "class":
            noun, of, rest = listed.partition(" of ")  # first piece of a word
            return f"{noun if noun == 'punctuation' else noun + 's'}{of}{rest}"
        return _PATTERNS.get(self.kind, "{}").format(listed)


_PATTERNS = {
    "last digit": "numbers ending in {}",
    "ends": 'words ending in "{}"',
    "begins": 'words beginning with "{}"',
    "previous": 'after "{}"',
    "first": 'in "{}" sentences',
    "earlier": 'with "{}" earlier',
}
_cached_hash = functools.lru_cache(maxsize=1 << 17)(text_hash)


@dataclass(frozen=True, slots=True)
class Claim:
    """One condition, or two that hold together.

    Raises:
        ValueError: no condition, more than two, or the same kind twice.
    """

    conditions: tuple[Condition, ...]

    def __post_init__(self) -> None:
        kinds = [condition.kind for condition in self.conditions]
        if not 1 <= len(kinds) <= 2 or len(set(kinds)) < len(kinds):
            raise ValueError(f"expected one condition or two of different kinds, got {', '.join(kinds) or 'none'}")
        in_order = sorted(self.conditions, key=lambda condition: CONDITIONS.index(condition.kind))
        object.__setattr__(self, "conditions", tuple(in_order))

    @classmethod
    def of(cls, **conditions: Sequence[str]) -> Claim:
        """A claim by its conditions.

        >>> Claim.of(current=["horse", "boat"], first=["which"]).short()
        'horse | boat in "which" sentences'
        """
        return cls.from_json(conditions)

    @classmethod
    def from_json(cls, given: Any) -> Claim:
        """A claim from its object of conditions.

        Raises:
            ValueError: anything else, with what was expected.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"expected an object of conditions, got {type(given).__name__}")
        for kind, values in given.items():
            is_list = isinstance(values, Sequence) and not isinstance(values, str)
            if not is_list or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{kind!r:.50}: expected a list of texts, got {values!r:.50}")
        return cls(tuple(Condition(str(kind), tuple(dict.fromkeys(values))) for kind, values in given.items()))

    def to_json(self) -> dict[str, list[str]]:
        """The object of conditions."""
        return {condition.kind: list(condition.values) for condition in self.conditions}

    def holds(self, contexts: Contexts) -> np.ndarray:
        """Where it holds, bool `[R, T]`. For many claims at once see `scoring.Matcher`."""
        return np.logical_and.reduce([condition.holds(contexts) for condition in self.conditions])

    def short(self, width: int = SHORT) -> str:
        """In words, with as many values as fit in a width, at most three of each condition and at least one.

        Both conditions stay, and no word is cut: where one value of each is too long already, that is what is returned.
        """
        texts = [self.text(*n_shown) for n_shown in ((3, 3), (3, 2), (2, 2), (3, 1), (2, 1), (1, 1))]
        return next((text for text in texts if len(text) <= width), texts[-1])

    def text(self, n_shown: int = _SHOWN_IN_FULL, n_shown_before: int = _SHOWN_IN_FULL) -> str:
        """In words, with at most this many values of a condition on the token, and of one on what stands before it."""
        of_token = [condition.text(n_shown) for condition in self.conditions if condition.is_of_token]
        before = [condition.text(n_shown_before) for condition in self.conditions if not condition.is_of_token]
        return " ".join([*filter(None, [" and ".join(of_token)]), *before])


def printable(text: str) -> str:
    """The text with every character that a terminal would act on, or not show, written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
