"""Sources of training rows: token ids of one length, in an order that is a pure function of (seed, position).

A source has an endless order of rows, counted by position: stored rows are shuffled anew in every epoch, streamed rows come
as they arrive and start over. Whoever asks for positions `first, first + 1, ...` with the same seed gets the same rows, in
whatever process and after whatever interruption.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from replacement.data.aligned_texts import Aligned, RowLayout
from replacement.data.token_files import JoinedRows, as_rows
from replacement.demo.corpus import held_out_rows, sample_rows, vocabulary

_EPOCH_STREAM = 0  # first word of the random seeds of row orders; the shuffle buffers use another
_ROWS_AT_A_TIME = 1024

DEMO_FIRST_SEED = 1_000_000
"""First corpus seed of the demo source, far from the seeds the demo language model was trained on."""
DEMO_ROWS_PER_SEED = 4096
DEMO_HELD_OUT_SEED = 0


class Rows(NamedTuple):
    """Consecutive rows of a source's endless order."""

    tokens_RT: Tensor
    """Token ids, int64."""
    index_R: Tensor
    """Number of each row within its source, counting the held-out rows, from 0; int64."""
    epoch: int
    """Passes over the source completed before the last of these rows."""


@dataclass(kw_only=True, eq=False)
class TokenSource(ABC):
    """Rows of token ids of one length."""

    name: str
    """What errors call the source, such as the file's path."""
    context: int
    """Tokens per row T."""
    n_held_out: int = 0
    """Rows set aside, which never appear in training: the first ones, or for the demo those of a random stream of their own."""
    vocabulary_size: int | None = None
    """Token ids lie below it; None if that is not to be checked."""
    bos_id: int | None = None
    """The beginning-of-sequence token, if there is one."""
    layout: RowLayout | None = None
    """Where the parts of a row are that holds one text in the tokens of several tokenizers; the first part has T tokens."""
    n_rows: int | None = field(default=None, init=False)
    """Training rows of one epoch (held-out rows not counted); None where that is unknown or endless."""

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"{self.name}: the context must be 1 token or more, got {self.context}")
        if self.n_held_out < 0:
            raise ValueError(f"n_held_out must be 0 or more, got {self.n_held_out}")

    def by_tokenizer(self, rows_RT: Int[Tensor, "R _"]) -> list[Aligned]:
        """The rows in the tokens of each tokenizer."""
        return [Aligned(rows_RT)] if self.layout is None else self.layout.split(rows_RT)

    @abstractmethod
    def held_out(self) -> Int[Tensor, "R T"]:
        """The rows that never appear in training."""

    @abstractmethod
    def blocks(self, n: int, *, first: int = 0, seed: int) -> Iterator[Rows]:
        """Endless consecutive blocks of `n` training rows each, from position `first` of the endless order.

        Args:
            n: rows per block; a block may run over the end of an epoch.
            first: rows of the order to pass over.
            seed: seed of the row order, where the source is shuffled.

        Raises:
            ValueError: a token id outside the vocabulary, or a source that yields nothing when it is started again.
        """

    @abstractmethod
    def one_pass(self) -> Iterator[Int[Tensor, "R T"]]:
        """The training rows once, a few at a time, in the source's own order; without end where the source has none."""

    def _checked(self, rows_RT: np.ndarray) -> Tensor:
        """The rows as int64, if the model can read them."""
        if rows_RT.size and self.vocabulary_size is not None:
            low, high = int(rows_RT.min()), int(rows_RT.max())
            if low < 0 or high >= self.vocabulary_size:
                raise ValueError(
                    f"{self.name}: token ids must lie in [0, {self.vocabulary_size}), got {low} to {high}; "
                    "was it written with another tokenizer?"
                )
        return torch.from_numpy(rows_RT.astype(np.int64))

    def _check_enough(self, n_rows: int) -> None:
        if n_rows <= self.n_held_out:
            needed = self.n_held_out + 1
            raise ValueError(
                f"{self.name} has {n_rows} rows: expected at least {needed} (n_held_out and one to train on)"
            )


class StoredRows(TokenSource):
    """Rows that can be read in any order: an array in memory, or arrays mapped from files.

    Rows are shuffled globally, by a new permutation in every epoch.

    Args:
        ids: `[R, T]` rows, or flat ids `[N]` that are cut into rows of `context` tokens as they stand.
        context: tokens per row; needed for flat ids, and the width of 2-D rows otherwise.
        options: the other fields of `TokenSource`.

    Raises:
        ValueError: not integers, another number of dimensions, rows of another length, too few rows for the held-out ones
            and one more, or held-out ids outside the vocabulary.
    """

    n_rows: int

    def __init__(
        self,
        ids: np.ndarray | Tensor | JoinedRows,
        *,
        context: int | None = None,
        name: str = "the token rows",
        **options: Any,
    ) -> None:
        array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids
        self._rows = array if isinstance(array, JoinedRows) else as_rows(array, context, name)
        super().__init__(name=name, context=self._rows.shape[1], **options)
        self._check_enough(len(self._rows))
        self.n_rows = len(self._rows) - self.n_held_out
        self._checked(self._rows[: self.n_held_out + 1])  # a foreign vocabulary is noticed at once

    @property
    def n_stored(self) -> int:
        """All rows, held-out ones included."""
        return len(self._rows)

    def take(self, index_R: Int[Tensor, " R"]) -> Int[Tensor, "R T"]:
        """Rows by their number in the source, from 0 with the held-out rows first."""
        return self._checked(self._rows[index_R.numpy()])

    def held_out(self) -> Int[Tensor, "R T"]:
        """The first `n_held_out` rows."""
        return self._checked(self._rows[: self.n_held_out])

    def blocks(self, n: int, *, first: int = 0, seed: int) -> Iterator[Rows]:
        """Endless blocks of rows, shuffled over the whole source in every epoch."""

        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([_EPOCH_STREAM, seed, epoch]).permutation(self.n_rows)

        for place_R, epoch in _laid_end_to_end(order, self.n_rows, first, n):
            index_R = torch.from_numpy(place_R + self.n_held_out)
            yield Rows(self.take(index_R), index_R, epoch)

    def one_pass(self) -> Iterator[Int[Tensor, "R T"]]:
        """The training rows once, in the order in which they are stored."""
        for first in range(self.n_held_out, self.n_stored, _ROWS_AT_A_TIME):
            yield self._checked(self._rows[first : first + _ROWS_AT_A_TIME])


@dataclass(kw_only=True, eq=False)
class StreamedRows(TokenSource):
    """Rows in the order in which they arrive; the source starts over when it ends.

    Raises:
        ValueError: too few rows for the held-out ones and one more, or ids outside the vocabulary among them.
    """

    start: Callable[[], Iterable[np.ndarray]] = field(kw_only=False)
    """Starts the rows afresh; each item it yields is some rows `[n, T]`."""
    name: str = "the stream of rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        opening = list(islice(self._all_rows(), self.n_held_out + 1))
        self._check_enough(len(opening))
        self._held_out = self._checked(np.stack(opening))[: self.n_held_out]

    def held_out(self) -> Int[Tensor, "R T"]:
        """The first `n_held_out` rows."""
        return self._held_out

    def blocks(self, n: int, *, first: int = 0, seed: int) -> Iterator[Rows]:
        """Endless blocks of rows in order of arrival, whatever the seed; rows passed over are produced and dropped."""
        rows = islice(self._endless(), first, None)
        while True:
            block = list(islice(rows, n))
            tokens_RT = self._checked(np.stack([row for _, _, row in block]))
            yield Rows(tokens_RT, torch.tensor([index for _, index, _ in block]), block[-1][0])

    def one_pass(self) -> Iterator[Int[Tensor, "R T"]]:
        """The training rows once, in order of arrival."""
        rows = islice(self._all_rows(), self.n_held_out, None)
        while chunk := list(islice(rows, _ROWS_AT_A_TIME)):
            yield self._checked(np.stack(chunk))

    def _endless(self) -> Iterator[tuple[int, int, np.ndarray]]:
        epoch = 0
        while True:
            n_seen = 0
            for n_seen, row_T in enumerate(self._all_rows(), start=1):
                if n_seen > self.n_held_out:
                    yield epoch, n_seen - 1, row_T
            if n_seen <= self.n_held_out:
                raise ValueError(f"{self.name} gave only {n_seen} rows when started again: expected the same rows")
            epoch += 1

    def _all_rows(self) -> Iterator[np.ndarray]:
        for rows_nT in self.start():
            yield from rows_nT


@dataclass(kw_only=True, eq=False)
class DemoRows(TokenSource):
    """The corpus of the demo model, generated without end: corpus seeds from 1,000,000 upward, 4096 rows of each.

    Raises:
        ValueError: the tokenizer lacks words of the demo's corpus.
    """

    tokenizer: Any = field(kw_only=False)
    """A tokenizer that knows the words of the corpus."""
    name: str = "the demo corpus"

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(vocabulary()) - self.tokenizer.get_vocab().keys())
        if unknown:
            raise ValueError(
                f"the demo corpus is for the demo model: this tokenizer lacks {len(unknown)} of its words, "
                f"such as {unknown[0]!r}"
            )
        self.bos_id = self.tokenizer.bos_token_id

    def held_out(self) -> Int[Tensor, "R T"]:
        """`n_held_out` rows from a random stream that training never uses."""
        rows_RT = held_out_rows(self.tokenizer, n_rows=self.n_held_out, context=self.context, seed=DEMO_HELD_OUT_SEED)
        return self._checked(rows_RT.reshape(self.n_held_out, self.context))

    def blocks(self, n: int, *, first: int = 0, seed: int) -> Iterator[Rows]:
        """Endless blocks of rows, all of them new, whatever the seed."""

        def drawn(part: int) -> np.ndarray:
            corpus_seed = DEMO_FIRST_SEED + part
            return sample_rows(self.tokenizer, n_rows=DEMO_ROWS_PER_SEED, context=self.context, seed=corpus_seed)

        for rows_RT, _ in _laid_end_to_end(drawn, DEMO_ROWS_PER_SEED, first, n):
            yield Rows(self._checked(rows_RT), torch.arange(first, first + n), 0)
            first += n

    def one_pass(self) -> Iterator[Int[Tensor, "R T"]]:
        """The training rows, without end."""
        return (rows.tokens_RT for rows in self.blocks(_ROWS_AT_A_TIME, seed=0))


def _laid_end_to_end(
    part: Callable[[int], np.ndarray], size: int, first: int, n: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Endless blocks of `n` entries of `part(0), part(1), ...` (`size` entries each), from entry `first`, each with the number
    of the last part it takes entries from."""
    part = lru_cache(maxsize=1)(part)
    for start in count(first, n):
        part_R, place_R = np.divmod(np.arange(start, start + n), size)
        numbers = range(int(part_R[0]), int(part_R[-1]) + 1)
        yield np.concatenate([part(number)[place_R[part_R == number]] for number in numbers]), numbers[-1]


def first_rows(blocks: Iterable[Tensor], n_rows: int | None) -> Iterator[Tensor]:
    """The first `n_rows` rows of some blocks `[R, T]`, 1 or more; all of them if None."""
    for block_RT in blocks:
        yield block_RT[:n_rows]
        if n_rows is not None:
            n_rows -= len(block_RT)
            if n_rows <= 0:
                return
