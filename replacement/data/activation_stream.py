"""From rows of tokens to shuffled batches of activations, in an order fixed by (seed, step) alone.

R rows, T tokens per row, B rows of one read, D site width, N tokens held in the buffer, K tokens kept.

The endless row order of a source is cut into blocks. Row j of a block belongs to shard `j % shards`; every shard mixes
the tokens of its rows with a generator seeded by (seed, block, shard), and batch i of the block is the i-th slice of every
shard. How many batches a block holds follows from the token ids, so processes that serve different shards agree on it
without talking, a run on n processes sees the batches of one process, and step k is reached again without a saved buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replacement.crosscoder.sites import Site
from replacement.data.activation_cache import ActivationCache
from replacement.data.token_sources import Rows, TokenSource

_SHUFFLE_STREAM = 1  # first word of the random seeds of shuffles; the row orders use another

ReadActivations = Callable[[Tensor], dict[Site, Tensor]]
"""Maps rows of a source, such as tokens `[B, T]`, to activations `{site: [B, T, D]}`, such as a forward pass with hooks."""


class RowBatch(NamedTuple):
    """Whole rows of one step."""

    tokens_RT: Tensor
    """Token ids."""
    kept_RT: Tensor
    """Which tokens count: not an excluded one, not among the undecomposed positions."""


class ActivationStream:
    """Endless shuffled batches `{site: [batch_tokens, D]}` of the activations of a source's tokens.

    One block of activations of all sites is held at a time, where `read_activations` puts them (GPU or CPU). Tokens of a
    block that fill no whole batch are dropped. Rows are read shard by shard, so the numbers too are the same for any
    number of processes.

    Attributes:
        epoch: passes over the source completed when the last block was begun; 0 before.
        counts: tokens of text that each tokenizer of the source made up to the end of the last block, and how many of them
            are aligned; None where there is one tokenizer.
        rows_per_block: rows whose tokens are mixed with each other.
    """

    def __init__(
        self,
        source: TokenSource,
        read_activations: ReadActivations | ActivationCache,
        *,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
        shards: int = 8,
        my_shards: Sequence[int] | None = None,
        excluded_ids: Collection[int] = (),
        undecomposed_positions: int = 0,
        rows_per_read: int = 32,
    ) -> None:
        """Describe the stream; nothing is read before the first batch.

        Args:
            read_activations: a forward pass, or a cache of what it gives.
            batch_tokens: tokens per step over all shards.
            buffer_tokens: tokens per block over all shards, rounded down to whole rows, equally many for each shard.
            seed: seed of the row order and of the shuffles.
            shards: independent shuffle buffers; the most processes that can share the work.
            my_shards: the shards that this process serves; all by default.
            excluded_ids: special and padding tokens, left out wherever they stand; but where no position is
                undecomposed, a beginning-of-sequence token at position 0 is a token like any other.
            undecomposed_positions: the first n positions of each row are left out.
            rows_per_read: most rows per call of `read_activations`.

        Raises:
            ValueError: a batch that the shards do not divide, a buffer of less than two batches or without a row per
                shard, shards that do not exist, every position left out, a cache of another source, or another value
                outside its range.
        """
        if isinstance(read_activations, ActivationCache) and read_activations.source is not source:
            raise ValueError(f"the cache was opened for {read_activations.source.name}, not for {source.name}")
        self.source, self.read_activations = source, read_activations
        self.batch_tokens, self.seed, self.shards = batch_tokens, seed, shards
        self.my_shards = list(range(shards)) if my_shards is None else sorted(my_shards)
        self.excluded_ids = torch.tensor(sorted(excluded_ids), dtype=torch.int64)
        self.undecomposed_positions, self.rows_per_read = undecomposed_positions, rows_per_read
        self._check_ranges(buffer_tokens)
        self.rows_per_block = buffer_tokens // source.context // shards * shards
        if not self.rows_per_block:
            raise ValueError(
                f"buffer_tokens={buffer_tokens} hold {buffer_tokens // source.context} rows of {source.context} tokens: "
                f"expected at least one for each of {shards} shards"
            )
        self.epoch = 0
        self.counts: tuple[list[int], int] | None = None

    def batches(self, *, start: int = 0) -> Iterator[dict[Site, Tensor]]:
        """Endless batches `{site: [batch_tokens * len(my_shards) / shards, D]}`, from step `start`.

        Blocks before `start` are counted by their token ids and never read. Each iterator holds a buffer of its own.

        Raises:
            ValueError: a block whose kept tokens fill no batch, or activations that do not match the tokens or change
                their sites, width or dtype.
        """
        _check_start(start)
        block, left = self._first_block(start)
        size = self.batch_tokens // self.shards
        n_mine = self.rows_per_block // self.shards * len(self.my_shards)
        buffer = _Buffer(n_mine * (self.source.context - self.undecomposed_positions))
        blocks = self.source.blocks(self.rows_per_block, first=block * self.rows_per_block, seed=self.seed)
        self.counts = None
        for number, rows in enumerate(blocks, start=block):
            self._count(rows.tokens_RT)
            kept_RT = self.kept(rows.tokens_RT)
            n_batches = self._n_batches(kept_RT)
            if left < n_batches:
                self.epoch = rows.epoch
                self._fill(buffer, rows, kept_RT)
                orders = self._order(number, kept_RT)
                for i in range(left, n_batches):
                    index_N = torch.cat([order_K[i * size : (i + 1) * size] for order_K in orders])
                    yield {site: x_ND[index_N.to(x_ND.device)] for site, x_ND in buffer.acts.items()}
            left = max(0, left - n_batches)

    def row_batches(self, *, start: int = 0) -> Iterator[RowBatch]:
        """Endless batches of whole rows, from step `start`: `batch_tokens // T` rows a step, `len(my_shards) / shards` of
        them here, in the order of the source.

        Raises:
            ValueError: a number of rows that the shards do not divide.
        """
        _check_start(start)
        n = self.batch_tokens // self.source.context
        if not n or n % self.shards:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} hold {n} rows of {self.source.context} tokens: expected a multiple of "
                f"shards={self.shards} for batches of whole rows"
            )
        for rows in self.source.blocks(n, first=start * n, seed=self.seed):
            self.epoch = rows.epoch
            # Shard by shard, as in `batches`: the rows of all processes in their order are those of one process.
            tokens_RT = torch.cat([rows.tokens_RT[shard :: self.shards] for shard in self.my_shards])
            yield RowBatch(tokens_RT, self.kept(tokens_RT))

    def kept(self, rows_RT: Int[Tensor, "R _"]) -> Bool[Tensor, "R T"]:
        """Which tokens (of the first tokenizer) count; see `RowBatch`. Those that are not aligned with all others do not."""
        tokens_RT, place_RT = self.source.by_tokenizer(rows_RT)[0]
        kept_RT = ~torch.isin(tokens_RT, self.excluded_ids)
        if self.undecomposed_positions:
            kept_RT[:, : self.undecomposed_positions] = False
        elif self.source.bos_id is not None:
            kept_RT[:, 0] |= tokens_RT[:, 0] == self.source.bos_id
        return kept_RT if place_RT is None else kept_RT & (place_RT >= 0)

    def _count(self, rows_RT: Tensor) -> None:
        if self.source.layout is None:
            return
        n_text, n_aligned = self.source.layout.counts(rows_RT)
        before, aligned_before = self.counts or ([0] * len(n_text), 0)
        self.counts = [sum(pair) for pair in zip(before, n_text, strict=True)], aligned_before + n_aligned

    # Counting ---------------------------------------------------------------------------------------------------

    def _first_block(self, start: int) -> tuple[int, int]:
        """Where every token of a block is known to count: the block that holds step `start`, and the step within it."""
        if len(self.excluded_ids) or self.source.layout is not None:
            return 0, start
        n_kept = self.rows_per_block // self.shards * (self.source.context - self.undecomposed_positions)
        n_batches = n_kept // (self.batch_tokens // self.shards)
        return divmod(start, n_batches) if n_batches else (0, start)

    def _n_batches(self, kept_RT: Tensor) -> int:
        """Batches of a block: as many as its poorest shard can fill its part of."""
        fewest = int(kept_RT.sum(dim=1).view(-1, self.shards).sum(dim=0).min())
        needed = self.batch_tokens // self.shards
        if fewest < needed:
            raise ValueError(
                f"{self.source.name}: a block of {self.rows_per_block} rows of {self.source.context} tokens keeps only "
                f"{fewest} tokens in one of {self.shards} shards, fewer than the {needed} of one batch: raise "
                "buffer_tokens, or lower batch_tokens"
            )
        return fewest // needed

    # Reading ----------------------------------------------------------------------------------------------------

    def _fill(self, buffer: _Buffer, rows: Rows, kept_RT: Tensor) -> None:
        """Read my shards' rows of a block, one shard after the other."""
        buffer.empty()
        for shard in self.my_shards:
            mine = slice(shard, None, self.shards)
            parts = (x_R[mine].split(self.rows_per_read) for x_R in (rows.tokens_RT, rows.index_R, kept_RT))
            for tokens_BT, index_B, kept_BT in zip(*parts, strict=True):
                buffer.append(self._read(tokens_BT, index_B), kept_BT)

    @torch.no_grad()
    def _read(self, tokens_BT: Tensor, index_B: Tensor) -> dict[Site, Tensor]:
        if isinstance(self.read_activations, ActivationCache):
            return self.read_activations.read_rows(index_B)
        return self.read_activations(tokens_BT)

    def _order(self, block: int, kept_RT: Tensor) -> list[Tensor]:
        """For each of my shards, the places of its tokens in the buffer, shuffled."""
        orders, first = [], 0
        for shard in self.my_shards:
            n_kept = int(kept_RT[shard :: self.shards].sum())
            generator = np.random.default_rng([_SHUFFLE_STREAM, self.seed, block, shard])
            orders.append(torch.from_numpy(first + generator.permutation(n_kept)))
            first += n_kept
        return orders

    def _check_ranges(self, buffer_tokens: int) -> None:
        for name in ("batch_tokens", "shards", "rows_per_read"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"the seed must be 0 or more, got {self.seed}")
        if self.batch_tokens % self.shards:
            raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of shards={self.shards}")
        if buffer_tokens < 2 * self.batch_tokens:
            raise ValueError(
                f"the buffer must hold at least two batches: batch_tokens={self.batch_tokens}, "
                f"buffer_tokens={buffer_tokens}"
            )
        if not 0 <= self.undecomposed_positions < self.source.context:
            raise ValueError(
                f"undecomposed_positions={self.undecomposed_positions} leaves nothing of rows of "
                f"{self.source.context} tokens: expected 0 to {self.source.context - 1}"
            )
        mine = self.my_shards
        if not mine or len(set(mine)) < len(mine) or not 0 <= mine[0] <= mine[-1] < self.shards:
            raise ValueError(f"my_shards must be different shards of 0 to {self.shards - 1}, at least one; got {mine}")


class _Buffer:
    """Kept activations of one block, `{site: [N, D]}`, each block written over the one before."""

    def __init__(self, capacity: int) -> None:
        self.acts: dict[Site, Tensor] = {}
        self._capacity, self._filled = capacity, 0

    def empty(self) -> None:
        self._filled = 0

    def append(self, acts: dict[Site, Tensor], kept_BT: Tensor) -> None:
        """Take the kept tokens of some rows, in order."""
        self._check(acts, kept_BT)
        if not self.acts:
            self.acts = {site: x_BTD.new_empty(self._capacity, x_BTD.shape[2]) for site, x_BTD in acts.items()}
        end = self._filled + int(kept_BT.sum())
        for site, x_BTD in acts.items():
            self.acts[site][self._filled : end] = x_BTD[kept_BT.to(x_BTD.device)]
        self._filled = end

    def _check(self, acts: dict[Site, Tensor], kept_BT: Tensor) -> None:
        if not acts:
            raise ValueError("read_activations returned no sites")
        if self.acts and acts.keys() != self.acts.keys():
            raise ValueError(f"read_activations returned {_names(acts)} after {_names(self.acts)}")
        for site, x_BTD in acts.items():
            if x_BTD.dim() != 3 or x_BTD.shape[:2] != kept_BT.shape:
                expected = f"[{kept_BT.shape[0]}, {kept_BT.shape[1]}, width]"
                raise ValueError(f"the activations at {site} must have shape {expected}, got {list(x_BTD.shape)}")
            if not self.acts:
                continue
            before, now = self.acts[site], x_BTD
            if before.shape[1] != now.shape[2]:
                raise ValueError(f"the width at {site} changed from {before.shape[1]} to {now.shape[2]}")
            if before.dtype != now.dtype:
                raise ValueError(f"the dtype at {site} changed from {before.dtype} to {now.dtype}")


def _check_start(start: int) -> None:
    if start < 0:
        raise ValueError(f"start must be 0 or more, got {start}")


def _names(acts: dict[Site, Tensor]) -> str:
    return ", ".join(map(str, acts))
