"""The demo model's activations, computed once and kept on disk for any number of runs on the same tokens in the same order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from replacement import LanguageModel
from replacement.crosscoder.sites import Site
from replacement.data.activation_cache import ActivationCache
from replacement.data.activation_stream import ActivationStream
from replacement.data.open_tokens import open_source, store_rows
from replacement.data.token_sources import TokenSource

HELD_OUT_ROWS = 512
BUFFER_TOKENS = 131_072


class DemoActivations:
    """Batches of activations at some sites of the demo model, the same for every run.

    Attributes:
        held_out_RT: rows of tokens to measure on, `[R, T]`, from a random stream that training never uses.
    """

    def __init__(
        self,
        folder: Path,
        lm: LanguageModel,
        sites: Sequence[Site],
        *,
        n_tokens: int,
        held_out_rows: int = HELD_OUT_ROWS,
        buffer_tokens: int = BUFFER_TOKENS,
    ) -> None:
        """Compute what the folder does not hold yet: `n_tokens` tokens, rounded up to whole shuffle buffers, in float16."""
        self._buffer_tokens = buffer_tokens
        n_rows = -(-n_tokens // buffer_tokens) * (buffer_tokens // lm.context_length)
        folder = folder / f"{n_rows}_rows"
        tokens = folder / "tokens.npy"
        if not tokens.exists():
            store_rows(open_source("demo", lm, n_held_out=held_out_rows), tokens, n_rows=n_rows)
        self._source: TokenSource = open_source(tokens, lm, n_held_out=held_out_rows)
        self._cache = ActivationCache.build(
            folder / "activations",
            self._source,
            torch.no_grad()(lambda rows_RT: lm.read(rows_RT, sites)),
            sites,
            fingerprint=lm.fingerprint,
            dtype=torch.float16,
        )
        self.held_out_RT = self._source.held_out()

    def batches(self, n: int, *, batch_tokens: int) -> Iterator[dict[Site, Tensor]]:
        """The first `n` batches `{site: [batch_tokens, D]}`."""
        stream = ActivationStream(
            self._source, self._cache, batch_tokens=batch_tokens, buffer_tokens=self._buffer_tokens, seed=0
        )
        return itertools.islice(stream.batches(), n)
