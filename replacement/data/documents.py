"""Texts on disk or in a Hugging Face dataset, and their packing into rows of token ids."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from replacement.language_model.language_model import LanguageModel
from replacement.language_model.prompts import check_text

HUB_PREFIX = "hf:"
_PIECE_CHARACTERS = 1 << 18  # a long file is tokenised in pieces of about this size, cut at line ends
_PIECES_PER_CALL = 32

Start = Callable[[], Iterable[Any]]
"""Starts the items afresh at every call."""


class Piece(NamedTuple):
    """Part of a document."""

    text: str
    ends_document: bool


# Packing ------------------------------------------------------------------------------------------------------------


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
            ids += piece_ids + (ending if piece.ends_document else [])
        n_rows = len(ids) // body
        if n_rows:
            rows_RT = np.empty((n_rows, context), dtype=np.int64)
            rows_RT[:, : len(head)] = head
            rows_RT[:, len(head) :] = np.array(ids[: n_rows * body]).reshape(n_rows, body)
            yield rows_RT
            del ids[: n_rows * body]


def rows_of(items: Iterable[Any], *, context: int, name: str) -> Iterator[np.ndarray]:
    """Rows of token ids as they stand, `[1, T]` each.

    Raises:
        ValueError: an item that is not a row of `context` integers.
    """
    for number, item in enumerate(items):
        try:
            row_T = np.asarray(item)
        except ValueError:  # lists of several lengths
            row_T = np.asarray(item, dtype=object)
        if row_T.shape != (context,) or not np.issubdtype(row_T.dtype, np.integer):
            raise ValueError(
                f"{name}, row {number}: expected {context} integer token ids (the context), got {row_T.dtype} of shape "
                f"{list(row_T.shape)}"
            )
        yield row_T[None]


# Texts --------------------------------------------------------------------------------------------------------------


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
                    continue
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield Piece(_field(line, text_field, f"{path}, line {number}"), ends_document=True)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def whole_documents(texts: Iterable[Any], *, name: str) -> Iterator[Piece]:
    """One document per text.

    Raises:
        ValueError: an item that is not text.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}, item {number}: expected text, got {type(text).__name__}")
        check_text(f"{name}, item {number}", text)
        yield Piece(text, ends_document=True)


def _pieces_of_text(lines: Iterable[str]) -> Iterator[Piece]:
    pending: list[str] = []
    n_characters = 0
    for line in lines:
        if n_characters >= _PIECE_CHARACTERS:
            yield Piece("".join(pending), ends_document=False)
            pending, n_characters = [], 0
        pending.append(line)
        n_characters += len(line)
    if pending:
        yield Piece("".join(pending), ends_document=True)


def _field(line: str, text_field: str, place: str) -> str:
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(example, dict) or text_field not in example:
        given = f"the fields {', '.join(map(str, example))}" if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"{place}: expected a text in the field {text_field!r}, got {given}; see text_field")
    text = example[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected text in the field {text_field!r}, got {type(text).__name__}")
    check_text(place, text)
    return text


# Hugging Face datasets ----------------------------------------------------------------------------------------------


def dataset_column(source: str | Sequence[Path], *, split: str, column: str) -> Start:
    """A column of a Hugging Face dataset, whose items are texts or rows of token ids.

    Args:
        source: `hf:NAME` or `hf:NAME:CONFIGURATION` on the hub, read while it is downloaded; the folder of a dataset saved
            by `save_to_disk`; or `.parquet` files, read one after the other.
        split: of a dataset that has several.

    Raises:
        ValueError: the dataset cannot be opened, or has no such configuration, split or column.
    """
    name = source if isinstance(source, str) else ", ".join(map(str, source))
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} is read with the `datasets` library: pip install datasets") from None
    try:
        if name.startswith(HUB_PREFIX):
            path, _, configuration = name.removeprefix(HUB_PREFIX).partition(":")
            if not path.strip():
                raise ValueError("expected hf:NAME or hf:NAME:CONFIGURATION")
            dataset: Any = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
        elif not isinstance(source, str) and not source[0].is_dir():
            files = [str(path) for path in source]
            dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        else:
            dataset = datasets.load_from_disk(name)
    except Exception as error:  # the library raises errors of many kinds, of its own and of those it builds on
        raise ValueError(f"cannot open the dataset {name}: {error}") from error
    if isinstance(dataset, dict) and split not in dataset:
        raise ValueError(f"{name} has no split {split!r}: it has {', '.join(dataset)}")
    examples = dataset[split] if isinstance(dataset, dict) else dataset
    if examples.column_names is not None:
        _check_column(examples.column_names, column, name)

    def items() -> Iterator[Any]:
        for example in examples:
            _check_column(example, column, name)
            yield example[column]

    return items


def _check_column(known: Iterable[str], column: str, name: str) -> None:
    if column not in known:
        raise ValueError(f"{name} has no column {column!r}: it has {', '.join(known)}; see text_field")
