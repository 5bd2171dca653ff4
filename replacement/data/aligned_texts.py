"""Texts read by several tokenizers at once: rows that hold the same text in the tokens of each, aligned by characters.

Two models know the same text at two tokens if both have read it up to the same character, so tokens are aligned where they END:
a token of the first tokenizer is kept if a token of every other tokenizer ends at the same character. The others are left out,
and counted. All tokens of a row belong to one stretch of text, which begins and ends where tokens of all tokenizers end.

A row is one line of integers, so that rows are shuffled, streamed, divided over processes and fingerprinted like those of one
tokenizer. With T_m the context of tokenizer m it holds

    T_0 | T_1 | ...    token ids of each tokenizer, filled up with zeros
    T_0 | T_0 | ...    for each token of the first tokenizer its counterpart's position in the row of each, -1 if left out
    1   | 1   | ...    tokens of text that each tokenizer made since the row before, and last how many of them are aligned
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor

from replacement.data.documents import Piece, special_id, special_ids
from replacement.language_model.language_model import LanguageModel

_PIECES_PER_CALL = 32


class Aligned(NamedTuple):
    """The rows of one tokenizer, beside those of the first."""

    tokens_RT: Int[Tensor, "R T"]
    """Token ids."""
    place_RT: Int[Tensor, "R T_0"] | None = None
    """Position in this row of the counterpart of each of the first tokenizer's tokens, -1 if there is none; None where both
    tokenizers are one."""


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a row are; see the module's docstring."""

    contexts: tuple[int, ...]
    """Tokens per row of each tokenizer."""

    @property
    def sizes(self) -> list[int]:
        """Integers of each part of a row."""
        n = len(self.contexts)
        return [*self.contexts, *[self.contexts[0]] * n, n + 1]

    def split(self, rows_RX: Int[Tensor, "R X"]) -> list[Aligned]:
        """The rows of each tokenizer."""
        n = len(self.contexts)
        parts = rows_RX.split(self.sizes, dim=1)
        return [Aligned(tokens_RT, place_RT) for tokens_RT, place_RT in zip(parts[:n], parts[n : 2 * n], strict=True)]

    def counts(self, rows_RX: Int[Tensor, "R X"]) -> tuple[list[int], int]:
        """Tokens of text (special tokens are not counted) that each tokenizer made, and how many of them are aligned."""
        *n_text, n_aligned = rows_RX[:, -self.sizes[-1] :].sum(dim=0).tolist()
        return n_text, n_aligned


@dataclass(frozen=True)
class TextReader:
    """One tokenizer and how it packs texts into rows."""

    name: str
    """What messages call the model."""
    tokenizer: Any
    context: int
    """Tokens per row, with the beginning-of-sequence token."""
    vocabulary_size: int
    """Token ids lie below it."""
    bos: int | None
    """Token in front of every row."""
    separator: int | None
    """Token after every document."""
    special: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def of(cls, lm: LanguageModel, context: int) -> TextReader:
        """As texts are packed for this model alone.

        Raises:
            ValueError: a model without a tokenizer, or one that does not say where in the text its tokens end.
        """
        tokenizer = lm.tokenizer
        if tokenizer is None or not tokenizer.is_fast:
            why = "has no tokenizer" if tokenizer is None else "has a tokenizer that does not say where its tokens end"
            raise ValueError(f"texts cannot be aligned: {lm.name} {why}, and other models tokenize otherwise")
        bos, eos = (special_id(tokenizer, role, vocabulary_size=lm.vocabulary_size) for role in ("bos", "eos"))
        head = bos if lm.parts.bridge.cfg.default_prepend_bos else None
        if context - (head is not None) < 1:
            raise ValueError(f"a context of {context} leaves no room for text after the beginning-of-sequence token")
        separator = bos if eos is None else eos
        return cls(lm.name, tokenizer, context, lm.vocabulary_size, head, separator, special_ids(lm))

    @property
    def room(self) -> int:
        """Tokens of text that a row holds."""
        return self.context - (self.bos is not None)

    def read(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, and the number of characters read when each token ends.

        Raises:
            ValueError: a token that the model does not have.
        """
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        encoding = self.tokenizer(list(texts), **options)
        highest = max(itertools.chain.from_iterable(encoding["input_ids"]), default=0)
        if highest >= self.vocabulary_size:
            raise ValueError(
                f"the tokenizer of {self.name} gives the id {highest}, the model has {self.vocabulary_size}"
            )
        offsets = ([end for _, end in pairs] for pairs in encoding["offset_mapping"])
        return list(zip(encoding["input_ids"], offsets, strict=True))


def tokenizer_numbers(models: Iterable[LanguageModel]) -> tuple[int, ...]:
    """Which tokenizer each model reads text with, counted from 0 as they appear.

    One that reads every text as the same token ids is the same; models without any share none, but equally many token ids.
    """
    known: list[object] = []
    numbers = []
    for lm in models:
        reads = lm.vocabulary_size if lm.tokenizer is None else _how_it_reads(lm.tokenizer)
        known += [] if reads in known else [reads]
        numbers.append(known.index(reads))
    return tuple(numbers)


def _how_it_reads(tokenizer: Any) -> list[object]:
    parts = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    return [tokenizer.get_vocab(), *(parts.get(name) for name in ("model", "normalizer", "pre_tokenizer"))]


def pack_aligned(pieces: Iterable[Piece], readers: Sequence[TextReader]) -> Iterator[np.ndarray]:
    """Rows `[n, X]` (see `RowLayout`) cut from documents laid end to end; the remainder that fills no row is dropped.

    A row ends at the last character at which all tokenizers end a token, or a text ends, before one of its parts is full. A
    stretch between two such characters that fits no row is left out, and counted with the row behind it.

    Raises:
        ValueError: a whole pass over the documents in which no tokens are aligned.
    """
    pending = [_Tokens() for _ in readers]
    text_ends: list[int] = []
    n_characters = n_aligned = 0
    remaining = iter(pieces)
    while batch := list(itertools.islice(remaining, _PIECES_PER_CALL)):
        read = [reader.read([piece.text for piece in batch]) for reader in readers]
        for number, piece in enumerate(batch):
            for tokens, reader, texts in zip(pending, readers, read, strict=True):
                tokens.add(*texts[number], n_characters, reader.special)
                if piece.ends_document and reader.separator is not None:
                    tokens.add([reader.separator], [len(piece.text) + 1], n_characters, {reader.separator})
            n_characters += len(piece.text) + piece.ends_document
            text_ends.append(n_characters)
        for tokens in pending:
            tokens.join()
        common_C = reduce(np.intersect1d, [tokens.ends_N for tokens in pending])
        first = min((int(tokens.ends_N[0]) for tokens in pending if len(tokens.ends_N)), default=n_characters)
        text_ends = [end for end in text_ends if end >= first]
        rows = list(_cut_rows(pending, readers, np.union1d(common_C, np.array(text_ends, np.int64))))
        n_aligned += sum(int(row_X[-1]) for row_X in rows)
        if rows:
            yield np.stack(rows)
    if n_characters and not n_aligned:
        raise ValueError(no_common_text(readers))


def no_common_text(readers: Sequence[TextReader]) -> str:
    """What is said where no tokens are aligned."""
    names = " and ".join(reader.name for reader in readers)
    return f"no common text: the tokenizers of {names} never end a token at the same character"


class _Tokens:
    """Tokens of one tokenizer that are in no row yet."""

    def __init__(self) -> None:
        self.ids_N, self.ends_N, self.is_text_N = (np.empty(0, dtype) for dtype in (np.int64, np.int64, bool))
        self.n_text = 0
        self._new: list[tuple[np.ndarray, ...]] = []

    def add(self, ids: Sequence[int], ends: Sequence[int], offset: int, special: Iterable[int]) -> None:
        """Tokens behind those there are, whose ends are counted from `offset`."""
        if ids:
            ids_N = np.array(ids, np.int64)
            self._new.append((ids_N, offset + np.array(ends, np.int64), ~np.isin(ids_N, list(special))))

    def join(self) -> None:
        """Take up what was added. An end never comes before that of an earlier token (some tokens have no characters)."""
        columns = zip((self.ids_N, self.ends_N, self.is_text_N), *self._new, strict=True)
        self.ids_N, self.ends_N, self.is_text_N = (np.concatenate(parts) for parts in columns)
        self.ends_N = np.maximum.accumulate(self.ends_N)
        self._new = []

    def take(self, end: int) -> tuple[np.ndarray, ...]:
        """Remove the tokens that end at a character or before, and return their ids, ends and whether they are text."""
        n = int(np.searchsorted(self.ends_N, end, side="right"))
        taken = self.ids_N[:n], self.ends_N[:n], self.is_text_N[:n]
        self.ids_N, self.ends_N, self.is_text_N = self.ids_N[n:], self.ends_N[n:], self.is_text_N[n:]
        self.n_text += int(taken[2].sum())
        return taken


def _cut_rows(pending: Sequence[_Tokens], readers: Sequence[TextReader], ends_C: np.ndarray) -> Iterator[np.ndarray]:
    """As many rows as pending tokens fill; `ends_C` are the characters at which a row may end, in order."""
    while True:
        fulls = [
            int(tokens.ends_N[reader.room])
            for tokens, reader in zip(pending, readers, strict=True)
            if len(tokens.ends_N) > reader.room
        ]
        if not fulls:
            return
        next_end = min(int(tokens.ends_N[0]) for tokens in pending if len(tokens.ends_N))
        # The first end behind a token that is left, and the first at which some part would be too long.
        begin, place = (int(np.searchsorted(ends_C, end)) for end in (next_end, min(fulls)))
        if place > begin:
            yield _row([tokens.take(int(ends_C[place - 1])) for tokens in pending], pending, readers)
        elif place < len(ends_C):
            for tokens in pending:  # no end fits: this stretch is in no row
                tokens.take(int(ends_C[place]))
        else:
            return


def _row(
    parts: Sequence[tuple[np.ndarray, ...]], pending: Sequence[_Tokens], readers: Sequence[TextReader]
) -> np.ndarray:
    """One row of taken tokens."""
    layout = RowLayout(tuple(reader.context for reader in readers))
    row_X = np.zeros(sum(layout.sizes), np.int64)
    pieces = np.split(row_X, np.cumsum(layout.sizes)[:-1])
    n = len(readers)
    last: list[dict[int, int]] = []
    for row_T, reader, (ids_N, ends_N, is_text_N) in zip(pieces[:n], readers, parts, strict=True):
        head = int(reader.bos is not None)
        row_T[:head] = reader.bos or 0
        row_T[head : head + len(ids_N)] = ids_N
        # Of several tokens that end at one character (parts of one letter) the last has read all of it.
        by_end = {int(end): place + head for place, end in enumerate(ends_N)}
        last.append({end: place for end, place in by_end.items() if is_text_N[place - head]})
    shared = sorted(set(last[0]).intersection(*last[1:]))
    positions = [[places[end] for end in shared] for places in last]
    if all(reader.bos is not None for reader in readers):
        positions = [[0, *places] for places in positions]
    for place_T, places in zip(pieces[n : 2 * n], positions, strict=True):
        place_T[:] = -1
        place_T[positions[0]] = places
    pieces[-1][:] = [*(tokens.n_text for tokens in pending), len(shared)]
    for tokens in pending:
        tokens.n_text = 0
    return row_X
