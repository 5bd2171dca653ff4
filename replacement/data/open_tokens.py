"""Opening a source of training tokens: text, a dataset, stored token ids, the demo's corpus, or a function."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from replacement.data.aligned_texts import RowLayout, TextReader, no_common_text, pack_aligned, tokenizer_numbers
from replacement.data.documents import (
    HUB_PREFIX,
    Piece,
    dataset_column,
    pack,
    pieces_of_files,
    rows_of,
    special_id,
    whole_documents,
)
from replacement.data.token_files import TOKEN_SUFFIXES, JoinedRows, as_rows, map_ids, resolve
from replacement.data.token_sources import DemoRows, StoredRows, StreamedRows, TokenSource, first_rows
from replacement.files import atomic_file
from replacement.language_model.language_model import LanguageModel

MAX_CONTEXT = 512
"""Tokens per row where neither the caller nor the stored rows say otherwise, if the model reads as many."""


def open_source(
    source: str | Path | Sequence[str | Path] | np.ndarray | Tensor | Callable[[], Iterable[Any]],
    lm: LanguageModel,
    *,
    context: int | None = None,
    default_context: int = MAX_CONTEXT,
    n_held_out: int = 0,
    text_field: str = "text",
    split: str = "train",
    tensor: str | None = None,
    others: Sequence[LanguageModel] = (),
) -> TokenSource:
    """Rows of token ids for a model, from whatever `source` names.

    Stored tokens are shuffled globally in every epoch and can be cached; text is tokenised on the way, comes in its own
    order and is mixed by the shuffle buffer only. `store_rows` turns the one into the other.

    Args:
        source: one of
            - `.npy` files (memory-mapped) or `.safetensors` files, by path, folder, pattern or list: rows `[R, T]` of one
              width, or flat ids `[N]`, cut into rows file by file;
            - text files, by path, folder, pattern (`corpus/*.txt`) or list: a `.txt` file is one document, a `.jsonl` or
              `.parquet` file holds one per entry. Documents are laid end to end, joined by the end-of-sequence token,
              and cut into rows that start with the beginning-of-sequence token where the model was trained with one;
            - a dataset saved with `Dataset.save_to_disk`, or `hf:NAME` or `hf:NAME:CONFIGURATION` on the Hugging Face hub;
            - `"demo"`, the corpus of the demo model, generated without end;
            - an array or tensor like those in files;
            - a function that starts an iteration over texts, or over rows of T token ids, afresh at every call.
        lm: the model whose tokenizer, vocabulary and context the rows must fit.
        context: tokens per row T; by default the width of stored rows, and otherwise the model's context, at most
            `default_context`.
        n_held_out: the first n rows never appear in training (for the demo, rows of an independent random stream).
        text_field: field of the texts in `.jsonl`, `.parquet` and datasets; a dataset's field of token ids gives rows.
        split: split of a dataset that has several.
        tensor: name of the tensor in a `.safetensors` file; by default its first integer tensor.
        others: models that read the same text. Those with other tokenizers get rows of their own beside the first model's,
            aligned by characters (see `aligned_texts`).

    Raises:
        ValueError: names the source, with what was expected and what was found: missing or damaged files, an unknown
            kind of file, text for a model without a tokenizer, token ids for models of several tokenizers, no common text,
            rows longer than the model's context or of several lengths, ids outside its vocabulary, or too few rows.
    """
    opener = _Opener(lm, context, default_context, n_held_out, tuple(others))
    if isinstance(source, np.ndarray | Tensor):
        return opener.stored({"the token array": source}, "the token array")
    if callable(source):
        return opener.items(source, f"the source {getattr(source, '__name__', type(source).__name__)}")
    if isinstance(source, str) and source == "demo":
        return opener.demo()
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return opener.items(dataset_column(source, split=split, column=text_field), source)
    paths = resolve(source)
    name = str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))
    if paths[0].suffix in TOKEN_SUFFIXES:
        return opener.stored({str(path): map_ids(path, tensor) for path in paths}, name)
    if paths[0].suffix == ".parquet" or paths[0].is_dir():
        return opener.items(dataset_column(paths, split=split, column=text_field), name)
    return opener.packed(lambda: pieces_of_files(paths, text_field=text_field), name)


def store_rows(source: TokenSource, path: str | Path, *, n_rows: int | None = None) -> None:
    """Write the rows of a source, held-out ones first, to a `.npy` file, to be opened as stored rows from then on.

    That tokenises a text once for many runs and processes, lets it be shuffled globally, and lets its activations be
    cached. The file is written atomically.

    Args:
        n_rows: most training rows to write; all of one epoch by default, and needed for a source without an end.

    Raises:
        ValueError: another suffix than `.npy`, texts of several tokenizers, an endless source without `n_rows`, less than one
            row, or a file that cannot be written.
    """
    target = Path(path)
    if target.suffix != ".npy":
        raise ValueError(f"{path}: expected a file name that ends in .npy")
    if source.layout is not None:
        raise ValueError(f"{source.name} is read by several tokenizers: only rows of one are stored")
    if n_rows is None and isinstance(source, DemoRows):
        raise ValueError(f"{source.name} has no end: give n_rows, the rows to write")
    if n_rows is not None and n_rows < 1:
        raise ValueError(f"n_rows must be 1 or more, got {n_rows}")
    size = source.vocabulary_size
    dtype = np.dtype(np.uint16 if size is not None and size <= 1 << 16 else np.uint32)
    with atomic_file(target) as scratch, scratch.open("wb") as file:
        n_written = 0
        _write_header(file, dtype, 0, source.context)
        for rows_RT in itertools.chain([source.held_out()], first_rows(source.one_pass(), n_rows)):
            file.write(rows_RT.numpy().astype(dtype).tobytes())
            n_written += len(rows_RT)
        file.seek(0)
        _write_header(file, dtype, n_written, source.context)


def _write_header(file: BinaryIO, dtype: np.dtype, n_rows: int, context: int) -> None:
    """A `.npy` header; NumPy pads it for the first axis to grow, so that every number of rows takes the same room."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n_rows, context)}
    np.lib.format.write_array_header_1_0(file, header)


@dataclass(frozen=True)
class _Opener:
    """Makes sources whose rows fit a model."""

    lm: LanguageModel
    context: int | None
    default_context: int
    n_held_out: int
    others: tuple[LanguageModel, ...] = ()

    def __post_init__(self) -> None:
        for lm in self.readers[0]:
            if self.context is not None and self.context > lm.context_length:
                raise ValueError(f"rows of {self.context} tokens: {lm.name} reads at most {lm.context_length}")

    @cached_property
    def readers(self) -> list[list[LanguageModel]]:
        """The models, parted by tokenizer."""
        models = (self.lm, *self.others)
        numbers = tokenizer_numbers(models)
        return [
            [lm for lm, n in zip(models, numbers, strict=True) if n == number] for number in range(max(numbers) + 1)
        ]

    def stored(self, arrays: Mapping[str, np.ndarray | Tensor], name: str) -> TokenSource:
        """Token ids that can be read in any order; rows keep their width, and flat ids are cut to the same.

        Args:
            arrays: one or more, by what errors call them.
        """
        ids = {file: x.detach().cpu().numpy() if isinstance(x, Tensor) else x for file, x in arrays.items()}
        widths = {file: array.shape[1] for file, array in ids.items() if array.ndim == 2}
        for file, width in widths.items():
            for lm in self.readers[0]:
                if width > lm.context_length:
                    raise ValueError(
                        f"{file} holds rows of {width} tokens: {lm.name} reads at most {lm.context_length}"
                    )
            first, expected = next(iter(widths.items()))
            if self.context is None and width != expected:
                raise ValueError(f"{file} holds rows of {width} tokens, expected {expected} as in {first}")
        context = next(iter(widths.values()), self.width) if self.context is None else self.context
        rows = [as_rows(array, context, file) for file, array in ids.items()]
        return StoredRows(rows[0] if len(rows) == 1 else JoinedRows(rows), **self._options(name))

    def demo(self) -> TokenSource:
        """The demo's corpus."""
        options = self._options("the demo corpus")
        return DemoRows(self._tokenizer(options["name"]), context=self.width, **options)

    def packed(self, pieces: Callable[[], Iterable[Piece]], name: str) -> TokenSource:
        """Texts, tokenised on the way."""
        tokenizer, options = self._tokenizer(name), self._options(name, texts=True)
        bos = options["bos_id"]
        eos = special_id(tokenizer, "eos", vocabulary_size=self.lm.vocabulary_size)
        head = bos if self.lm.parts.bridge.cfg.default_prepend_bos else None

        def start() -> Iterator[np.ndarray]:
            separator = bos if eos is None else eos
            return pack(pieces(), tokenizer, context=self.width, bos=head, separator=separator)

        return (
            StreamedRows(start, context=self.width, **options) if len(self.readers) == 1 else self.aligned(pieces, name)
        )

    def aligned(self, pieces: Callable[[], Iterable[Piece]], name: str) -> TokenSource:
        """Texts in the tokens of several tokenizers."""
        contexts = [min([self.width, *(lm.context_length for lm in part)]) for part in self.readers]
        readers = [TextReader.of(part[0], context) for part, context in zip(self.readers, contexts, strict=True)]
        layout = RowLayout(tuple(contexts))
        options = self._options(name, texts=True) | {
            "vocabulary_size": None,
            "bos_id": readers[0].bos,
            "layout": layout,
        }
        source = StreamedRows(lambda: pack_aligned(pieces(), readers), context=contexts[0], **options)
        if self.n_held_out and not layout.counts(source.held_out())[1]:
            raise ValueError(no_common_text(readers))
        return source

    def items(self, start: Callable[[], Iterable[Any]], name: str) -> TokenSource:
        """Texts or rows of token ids, whichever the first item is."""
        first_pass, second_pass = iter(start()), iter(start())
        if first_pass is second_pass:
            raise ValueError(f"{name} goes on where it stopped: expected a function that starts afresh at every call")
        first = next(first_pass, None)
        if first is None:
            raise ValueError(f"{name} yields nothing: expected texts or rows of token ids")
        if isinstance(first, str):
            return self.packed(lambda: whole_documents(start(), name=name), name)
        return StreamedRows(
            lambda: rows_of(start(), context=self.width, name=name), context=self.width, **self._options(name)
        )

    @property
    def width(self) -> int:
        """Tokens per row where the source has none of its own."""
        if self.context is not None:
            return self.context
        return min([self.default_context, *(lm.context_length for lm in self.readers[0])])

    def _options(self, name: str, *, texts: bool = False) -> dict[str, Any]:
        if len(self.readers) > 1 and not texts:
            names = " and ".join(part[0].name for part in self.readers)
            raise ValueError(
                f"{name} gives token ids of one tokenizer, {names} have several: expected text, which is aligned"
            )
        tokenizer, size = self.lm.tokenizer, min(lm.vocabulary_size for lm in self.readers[0])
        bos = None if tokenizer is None else special_id(tokenizer, "bos", vocabulary_size=size)
        return {"name": name, "n_held_out": self.n_held_out, "vocabulary_size": size, "bos_id": bos}

    def _tokenizer(self, name: str) -> Any:
        if self.lm.tokenizer is None:
            raise ValueError(
                f"{name} is text, but {self.lm.name} has no tokenizer: expected token ids (.npy, .safetensors)"
            )
        return self.lm.tokenizer
