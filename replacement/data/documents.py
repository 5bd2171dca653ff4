"""Texts on disk or in a Hugging Face dataset, and their packing into rows of token ids. T tokens per row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from replacement.language_model.language_model import LanguageModel

_PIECE_CHARACTERS = 1 << 18  # a long file is tokenised in pieces of about this size, cut at line ends
_PIECES_PER_CALL = 32


class Piece(NamedTuple):
    """Part of a document."""

    text: str
    ends_document: bool


def special_id(tokenizer: PreTrainedTokenizerBase, role: Literal["bos", "eos"], *, vocabulary_size: int) -> int | None:
    """Id of the tokenizer's token for a role, or None if it has none of its own.

    TransformerLens gives a tokenizer without one the text `<|endoftext|>`, which then is the unknown token or lies
    outside the model's vocabulary; neither counts.
    """
    token, number = getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")
    if number is None or number >= vocabulary_size:
        return None
    return None if number == tokenizer.unk_token_id and token != tokenizer.unk_token else int(number)


def special_ids(lm: LanguageModel) -> frozenset[int]:
    """Ids of the special and padding tokens, which no crosscoder is trained on or measured on.

    The unknown token stands for a word and is not among them, unless it doubles as BOS, EOS or PAD (GPT-2 has one special
    token for everything).
    """
    tokenizer = lm.tokenizer
    if tokenizer is None:
        return frozenset()
    roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return frozenset(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - roles)


def pack(
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    bos: int | None = None,
    separator: int | None = None,
) -> Iterator[np.ndarray]:
    """Rows `[n, T]` cut from documents laid end to end; the remainder that fills no row is dropped.

    Args:
        bos: token in front of every row, which takes the first of its T places.
        separator: token after every document.

    Raises:
        ValueError: no room for text in a row.
    """
    head = [] if bos is None else [bos]
    ending = [] if separator is None else [separator]
    body = context - len(head)
    if body < 1:
        raise ValueError(f"a context of {context} leaves no room for text after the beginning-of-sequence token")
    ids: list[int] = []
    remaining = iter(pieces)
    while batch := list(itertools.islice(remaining, _PIECES_PER_CALL)):
        encoded = tokenizer([piece.text for piece in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for piece, piece_ids in zip(batch, encoded, strict=True):
            ids.extend(piece_ids)
            if piece.ends_document:
                ids.extend(ending)
        n = len(ids) // body
        if n:
            rows_RT = np.empty((n, context), dtype=np.int64)
            rows_RT[:, : len(head)] = head
            rows_RT[:, len(head) :] = np.array(ids[: n * body]).reshape(n, body)
            yield rows_RT
            del ids[: n * body]


def pieces_of_files(paths: Iterable[Path], *, text_field: str) -> Iterator[Piece]:
    """The documents of text files: a `.txt` file is one document, a `.jsonl` file holds one per line.

    Raises:
        ValueError: names the file and line that is not UTF-8 text, not JSON, or lacks the field.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8") as lines:
                if path.suffix == ".txt":
                    yield from _pieces_of_text(lines)
                else:
                    for number, line in enumerate(lines, start=1):
                        if line.strip():
                            yield Piece(_field(line, text_field, f"{path}, line {number}"), ends_document=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def rows_of(items: Iterable[Any], *, context: int, name: str) -> Iterator[np.ndarray]:
    """Rows of token ids as they stand, `[1, T]` each.

    Raises:
        ValueError: an item that is not a row of `context` integers.
    """
    for number, item in enumerate(items):
        row_T = np.asarray(item)
        if row_T.shape != (context,) or not np.issubdtype(row_T.dtype, np.integer):
            raise ValueError(
                f"{name}, row {number}: expected {context} integer token ids (the context), got {row_T.dtype} of shape "
                f"{list(row_T.shape)}"
            )
        yield row_T[None]


def whole_documents(texts: Iterable[Any], *, name: str) -> Iterator[Piece]:
    """Each text a document.

    Raises:
        ValueError: an item that is not text.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}, item {number}: expected text, got {type(text).__name__}")
        yield Piece(text, ends_document=True)


def _pieces_of_text(lines: Iterable[str]) -> Iterator[Piece]:
    held: list[str] = []
    n_characters = 0
    for line in lines:
        if n_characters >= _PIECE_CHARACTERS:
            yield Piece("".join(held), ends_document=False)
            held, n_characters = [], 0
        held.append(line)
        n_characters += len(line)
    if held:
        yield Piece("".join(held), ends_document=True)


def _field(line: str, text_field: str, place: str) -> str:
    try:
        example = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(example, dict) or text_field not in example:
        given = f"the fields {', '.join(map(str, example))}" if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"{place}: expected a text in the field {text_field!r}, got {given}; see text_field")
    text = example[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected text in the field {text_field!r}, got {type(text).__name__}")
    return text
