"""What stands at and before every token of some rows: words, sentences and classes, as columns of numbers.

A feature of a causal model sees no later token, so every column is computed from the token itself and those before it: a word
that the tokenizer splits (`Dal ##las`) is `Dal` at its first piece and `Dallas` at its second. Where a word begins is told
from decoded texts, so that word-level, WordPiece, byte-level and SentencePiece tokenizers need no code of their own.

A value of a column is a 64-bit hash of its text, 0 where there is none (the token before the first). The hash is a polynomial
modulo 2^64 over the text's characters, so that of a joined word follows from those of its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from replacement.token_texts import CLASSES

_BASE = 0x9E3779B97F4A7C15 | 1
_MASK = (1 << 64) - 1
_SENTENCE_ENDS = (".", "?", "!", "…")
_CLOSING = "\"'”’)]»"
_LONGEST_NAME = 3
CONTINUES = "##"
"""Stands in front of a piece that continues a word, whatever the tokenizer's own mark."""
AFFIX_LENGTHS = (1, 2, 3)

FIRST_PIECE, LATER_PIECE = "first piece of a word", "later piece of a word"
"""Two classes of tokens beside those of words, in vocabularies with pieces that continue words."""


def text_hash(text: str) -> int:
    """The polynomial hash of a text, as a signed 64-bit integer; never 0."""
    value, _ = _hash_and_power(text)
    return (value if value < 1 << 63 else value - (1 << 64)) or 1


def _hash_and_power(text: str) -> tuple[int, int]:
    """Hash of a text, and the factor `BASE^length` that a hash is multiplied with when the text is put behind another."""
    value, power = 0, 1
    for character in text:
        value = (value * _BASE + ord(character) + 1) & _MASK
        power = (power * _BASE) & _MASK
    return value, power


class TokenTexts:
    """What is known of each token of a vocabulary whatever stands before it.

    Args:
        texts: what each token adds to a text that it continues, spaces included: ` Dallas`, `las`.
        special: ids of tokens that are no text.

    Attributes:
        pieces: each token's text without spaces around it; in quotes where nothing else is left.
    """

    def __init__(self, texts: Sequence[str], special: Iterable[int] = ()) -> None:
        special = set(special)
        self.pieces = [text.strip() or repr(text) for text in texts]
        hashes = [_hash_and_power(piece) for piece in self.pieces]
        later = [_hash_and_power(CONTINUES + piece)[0] for piece in self.pieces]
        self.hash_V = np.array([value for value, _ in hashes], dtype=np.uint64)
        self.power_V = np.array([power for _, power in hashes], dtype=np.uint64)
        self.later_hash_V = np.array(later, dtype=np.uint64)

        def flags(test: Callable[[int, str], bool]) -> np.ndarray:
            return np.array([test(number, text) for number, text in enumerate(texts)], dtype=bool)

        self.begins_V = flags(lambda n, text: n in special or not text[:1].isalnum())
        self.closes_V = flags(lambda n, text: n in special or not text[-1:].isalnum())
        self.is_space_V = flags(lambda n, text: n not in special and not text.strip(" "))
        self.is_word_V = flags(lambda n, text: n not in special and text.strip()[:1].isalnum())
        self.is_capital_V = flags(lambda n, text: n not in special and text.strip()[:1].isupper())
        self.ends_sentence_V = flags(
            lambda n, text: n in special or text.rstrip(f" {_CLOSING}").endswith((*_SENTENCE_ENDS, "\n"))
        )

    @classmethod
    def of(cls, tokenizer: Any, size: int, special: Iterable[int] = ()) -> TokenTexts:
        """The vocabulary of a tokenizer, of a model with `size` tokens; `#12` stands for a token without a text.

        A token is decoded behind another one, because many tokenizers leave a leading space out at the start of a text.

        Args:
            tokenizer: a Hugging Face tokenizer, or None.
            size: tokens of the model, which may be more than the tokenizer's or fewer.
            special: ids of tokens that are no text.
        """
        if tokenizer is None:
            return cls([f" #{number}" for number in range(size)])

        def decode(*ids: int) -> str:
            return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        special = set(special)
        known = range(min(size, len(tokenizer)))
        words = (number for number in known if number not in special and decode(number).strip().isalpha())
        anchor = next(words, None)
        before = "" if anchor is None else decode(anchor)
        texts = []
        for number in known:
            both = "" if anchor is None else decode(anchor, number)
            text = both[len(before) :] if both.startswith(before) and both != before else decode(number)
            texts.append(str(tokenizer.convert_ids_to_tokens(number)) if "�" in text else text)
        return cls(texts + [f" #{number}" for number in range(len(known), size)], special)

    @property
    def splits_words(self) -> bool:
        """Whether a word may be several tokens."""
        return not bool(self.begins_V.all())


@dataclass(eq=False)
class Contexts:
    """The columns of rows of tokens. Each is computed when it is first asked for.

    Raises:
        ValueError: a token outside the vocabulary.
    """

    tokens_RT: np.ndarray
    texts: TokenTexts
    starts_RT: np.ndarray = field(init=False)
    """Whether a word begins at a token."""
    sentence_RT: np.ndarray = field(init=False)
    """Number of the sentence that a token is in, counted over all rows; the token that ends a sentence is in it."""
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        v, tokens_RT, size = self.texts, np.asarray(self.tokens_RT), len(self.texts.pieces)
        if tokens_RT.size and not 0 <= tokens_RT.min() <= tokens_RT.max() < size:
            raise ValueError(f"expected token ids in [0, {size}), got {tokens_RT.min()} to {tokens_RT.max()}")
        self.tokens_RT = tokens_RT
        self.starts_RT = v.begins_V[tokens_RT]
        self.starts_RT[:, 1:] |= v.closes_V[tokens_RT[:, :-1]]
        self.starts_RT[:, :1] = True
        is_new_RT = np.ones_like(self.starts_RT)
        is_new_RT[:, 1:] = v.ends_sentence_V[tokens_RT[:, :-1]]
        self.sentence_RT = np.cumsum(is_new_RT, dtype=np.int64).reshape(tokens_RT.shape) - 1

    @cached_property
    def _joined(self) -> dict[str, np.ndarray]:
        """Hashes of the word, the name and the sentence's first word at every token; where the first two begin."""
        v, tokens_RT = self.texts, self.tokens_RT
        R, T = tokens_RT.shape
        is_new_RT = np.ones((R, T), dtype=bool)
        is_new_RT[:, 1:] = np.diff(self.sentence_RT, axis=1) > 0
        result = {key: np.zeros((R, T), dtype=np.uint64) for key in ("word", "name", "first")}
        begins = {key: np.zeros((R, T), dtype=np.int64) for key in ("word", "name")}
        space, space_power = (np.full(1, value, dtype=np.uint64) for value in _hash_and_power(" "))
        word_R, name_R, first_R = (np.zeros(R, dtype=np.uint64) for _ in range(3))
        word_begin_R, name_begin_R, n_words_R = (np.zeros(R, dtype=np.int64) for _ in range(3))
        was_capital_R, waits_R, in_first_R = (np.zeros(R, dtype=bool) for _ in range(3))
        for t in range(T):
            token_R, start_R, new_R = tokens_RT[:, t], self.starts_RT[:, t], is_new_RT[:, t]
            hash_R, power_R, is_word_R = v.hash_V[token_R], v.power_V[token_R], v.is_word_V[token_R]
            word_R = np.where(start_R, 0, word_R) * power_R + hash_R
            word_begin_R = np.where(start_R, t, word_begin_R)
            # A name is a run of capitalised words; tokens that are only spaces may stand between them.
            space_R = v.is_space_V[token_R]
            goes_on_R = start_R & was_capital_R & v.is_capital_V[token_R] & ~new_R & (n_words_R < _LONGEST_NAME)
            longer_R = (
                np.where(goes_on_R, name_R * space_power + space, np.where(start_R, 0, name_R)) * power_R + hash_R
            )
            name_R = np.where(space_R, name_R, longer_R)
            name_begin_R = np.where(start_R & ~goes_on_R & ~space_R, t, name_begin_R)
            n_words_R = np.where(goes_on_R, n_words_R + 1, np.where(start_R & ~space_R, 1, n_words_R))
            was_capital_R = np.where(start_R & ~space_R, v.is_capital_V[token_R], was_capital_R & ~new_R)
            waits_R = waits_R | new_R
            in_first_R = np.where(start_R, waits_R & is_word_R, in_first_R)
            waits_R &= ~in_first_R
            first_R = np.where(in_first_R, word_R, np.where(new_R, 0, first_R))
            for key, value_R in (("word", word_R), ("name", np.where(space_R, word_R, name_R)), ("first", first_R)):
                result[key][:, t] = value_R
            begins["word"][:, t], begins["name"][:, t] = word_begin_R, np.where(space_R, t, name_begin_R)
        return {key: value_RT.view(np.int64) for key, value_RT in result.items()} | {
            f"{key} begins": value_RT for key, value_RT in begins.items()
        }

    # Columns ---------------------------------------------------------------------------------------------------------

    def column(self, name: str) -> np.ndarray:
        """Values `[R, T]` of a column: `current`, `previous`, `word`, `name`, `first`, `class CLASS`, `begins N`, `ends N`
        or `last digit`.

        `current` and `previous` are tokens, marked where they continue a word; `word` is joined from its pieces so far; `name`
        is a run of up to three capitalised words; `first` is the sentence's first word.
        """
        if name not in self._columns:
            self._columns[name] = self._compute(name)
        return self._columns[name]

    def _compute(self, name: str) -> np.ndarray:
        if name == "current":
            v, tokens_RT = self.texts, self.tokens_RT
            return np.where(self.starts_RT, v.hash_V[tokens_RT], v.later_hash_V[tokens_RT]).view(np.int64)
        if name == "previous":
            previous_RT = np.zeros(self.tokens_RT.shape, dtype=np.int64)
            previous_RT[:, 1:] = self.column("current")[:, :-1]
            return previous_RT
        if name in ("word", "name", "first"):
            return self._joined[name]
        if name in (f"class {FIRST_PIECE}", f"class {LATER_PIECE}"):
            is_first = name.endswith(FIRST_PIECE)
            return np.where(self.starts_RT == is_first, text_hash(name.removeprefix("class ")), 0)
        values_W, number_P = np.unique(self._joined["word"].ravel(), return_inverse=True)
        words = self.word_texts
        value_W = [_word_value(name, words[int(value)]) for value in values_W]
        return np.array(value_W, dtype=np.int64)[number_P].reshape(self.tokens_RT.shape)

    @cached_property
    def word_texts(self) -> dict[int, str]:
        """The text of every word, complete or not, by its value."""
        values_W, place_W = np.unique(self._joined["word"].ravel(), return_index=True)
        return {int(value): self.text_at("word", int(place)) for value, place in zip(values_W, place_W, strict=True)}

    def text_at(self, name: str, place: int) -> str:
        """The text of a value of `current`, `previous`, `word` or `name`, at a place of the flattened rows."""
        row, t = divmod(place, self.tokens_RT.shape[1])
        t -= name == "previous"
        if name in ("current", "previous"):
            return ("" if self.starts_RT[row, t] else CONTINUES) + self.texts.pieces[self.tokens_RT[row, t]]
        begin = int(self._joined[f"{name} begins"][row, t])
        text = ""
        for s in range(begin, t + 1):
            token = self.tokens_RT[row, s]
            if s == t or not self.texts.is_space_V[token]:
                text += (" " if s > begin and self.starts_RT[row, s] else "") + self.texts.pieces[token]
        return text

    def earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """Whole words, by the place (flattened) of their last piece and their hash, sorted by place.

        The word is earlier in the sentence of every later token of the same `sentence_RT`.
        """
        is_last_RT = np.zeros_like(self.starts_RT)
        is_last_RT[:, :-1] = self.starts_RT[:, 1:]
        place_S = np.flatnonzero(is_last_RT)
        return place_S, self.column("word").ravel()[place_S]


def _word_value(column: str, word: str) -> int:
    """The value that a column of words has for a word."""
    kind, _, rest = column.partition(" ")
    if kind == "class":
        return text_hash(rest) if CLASSES[rest](word) else 0
    if column == "last digit":
        return text_hash(word[-1]) if word.isdigit() else 0
    length = int(rest)
    if not word.isalpha() or len(word) <= length:
        return 0
    return text_hash(word[:length] if kind == "begins" else word[-length:])
