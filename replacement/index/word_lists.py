"""Lists of words under a name, such as the cities of Texas: a claim about the words of a list begins with its name."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from replacement.demo import corpus
from replacement.index.claims import Claim, Condition

WordLists = Mapping[str, frozenset[str]]
"""Name -> words, in lower case."""

_LEAST_SHARED = 2
_LEAST_PRECISION, _LEAST_RECALL = 0.8, 0.5
"""Share of a condition's values that are in the list, and of the list's words that are among the values."""
_HEADS = {"previous": "after {}", "first": "in {} sentences", "earlier": "with {} earlier"}


def word_lists(file: str | None, data: str) -> WordLists:
    """The lists of a file with one list on each line, `name,word,word,...`; without a file, those of the demo's corpus for
    the demo's data and none for other data.

    Raises:
        ValueError: a file that cannot be read, or a line that does not name a list with at least two words.
    """
    if file is None:
        return _as_lists(corpus.word_lists()) if data == "demo" else {}
    try:
        lines = list(csv.reader(Path(file).read_text(encoding="utf-8").splitlines(), skipinitialspace=True))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"word lists: {file} cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line and (not line[0].strip() or len(set(line[1:])) < _LEAST_SHARED):
            raise ValueError(f"{file}, line {number}: expected `name,word,word,...`, got {','.join(line)!r:.60}")
    return _as_lists({line[0].strip(): line[1:] for line in lines if line})


def _as_lists(lists: Mapping[str, Iterable[str]]) -> WordLists:
    return {name: frozenset(word.strip().lower() for word in words) for name, words in lists.items()}


def heading(claim: Claim, lists: WordLists) -> str:
    """`Texas: ` or `thing in question sentences: ` for a claim about the words of lists of these names; else empty."""
    names = [(condition, _name(condition, lists)) for condition in claim.conditions]
    heads = [_HEADS.get(condition.kind, "{}").format(name) for condition, name in names if name]
    return f"{' '.join(heads)}: " if heads else ""


def _name(condition: Condition, lists: WordLists) -> str:
    """Name of the list that a condition's values are most like, if they are like one."""
    values = {value.lower() for value in condition.values}
    likeness = {}
    for name, words in lists.items():
        shared = len(values & words)
        if shared >= max(_LEAST_SHARED, _LEAST_PRECISION * len(values), _LEAST_RECALL * len(words)):
            likeness[name] = shared / len(values | words)
    return max(likeness, key=lambda name: likeness[name], default="")
