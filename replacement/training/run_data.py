"""What a run reads: rows of tokens in their order, and the activations of its models on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.data.activation_cache import ActivationCache
from replacement.data.activation_stream import ActivationStream
from replacement.data.documents import special_ids
from replacement.data.token_sources import TokenSource
from replacement.training.build import Models
from replacement.training.config import RunConfig
from replacement.training.parallel import Parallel
from replacement.training.scaling import Batch, sites_of

SCALE_TOKENS = 16_384
"""Tokens that measure the scale, mean and variance of every site."""


class RunData:
    """The tokens of a run and what its models show on them; `open_stream` prepares the batches of one crosscoder.

    Attributes:
        held_out_RT: rows to measure on, which are never trained on.
        first_rows_RT: the first training rows, which measure scales and thresholds.
        sites: those that the crosscoder reads or writes.
        stream: batches of activations at these sites, or of rows.
    """

    sites: tuple[Site, ...]
    stream: ActivationStream

    def __init__(self, models: Models, source: TokenSource, *, names: Sequence[str], seed: int) -> None:
        """Read the first rows.

        Args:
            names: of the models, as the settings say them.
            seed: of the order of the rows.
        """
        self.models, self.source, self._names = models, source, names
        self.held_out_RT = source.held_out()
        n_rows = -(-SCALE_TOKENS // source.context)
        self.first_rows_RT = next(source.blocks(n_rows, seed=seed)).tokens_RT

    def open_stream(self, config: RunConfig, crosscoder: Crosscoder, parallel: Parallel) -> None:
        """Prepare this process's share of the batches.

        Raises:
            ValueError: shards that the processes cannot share equally, or text without a word that the models know.
        """
        data, training, n_data = config.data, config.training, parallel.n_data
        assert data.shards is not None
        if data.shards % n_data:
            raise ValueError(
                f"shards={data.shards} is not a multiple of the {n_data} processes that share the rows: set data.shards and "
                "training.batch_tokens to multiples of it"
            )
        share = data.shards // n_data
        first = share * parallel.data_rank
        self.sites = sites_of(crosscoder)
        self.stream = ActivationStream(
            self.source,
            self.read,
            batch_tokens=training.step_tokens,
            buffer_tokens=data.buffer_tokens,
            shards=data.shards,
            my_shards=range(first, first + share),
            seed=training.seed,
            excluded_ids=special_ids(self.models.first),
            undecomposed_positions=crosscoder.undecomposed_positions,
        )
        self._check_text()

    def read_from_cache(self, folder: Path, parallel: Parallel) -> None:
        """Take activations from disk, where the first process computes those of all rows if they are not there yet."""
        fingerprint = self.models.fingerprint
        if parallel.is_first:
            ActivationCache.build(folder, self.source, self.read, self.sites, fingerprint=fingerprint)
        parallel.barrier()
        self.stream.read_activations = ActivationCache.open(
            folder, self.source, fingerprint=fingerprint, sites=self.sites
        )

    def read(self, rows_RT: Tensor, *, first_model: int = 0) -> dict[Site, Tensor]:
        """Activations `[R, T, D]` of the models, from one of them on, on some rows."""
        sites = [site for site in self.sites if site.model >= first_model]
        with torch.no_grad():
            return self.models.read(self.source.by_tokenizer(rows_RT), sites)

    def first_batches(self, *, part: int = 0, n_parts: int = 1) -> Iterator[Batch]:
        """Activations of the first rows of the data, or a part of them."""
        for chunk_RT in self.first_rows_RT[part::n_parts].split(32):
            kept_RT = self.stream.kept(chunk_RT)
            yield {site: x_RTD[kept_RT.to(x_RTD.device)] for site, x_RTD in self.read(chunk_RT).items()}

    def alignment(self, counts: tuple[list[int], int] | None) -> dict[str, Any]:
        """Tokens of text that each tokenizer made, and which of them no other tokenizer ends at the same character.

        Args:
            counts: of each tokenizer's tokens, and of those aligned; None where there is one tokenizer.
        """
        if counts is None:
            return {}
        n_text, n_aligned = counts
        names = [self._names[self.models.tokenizers.index(number)] for number in range(len(n_text))]
        return {
            "text_tokens": dict(zip(names, n_text, strict=True)),
            "not_aligned": {name: n - n_aligned for name, n in zip(names, n_text, strict=True)},
        }

    def _check_text(self) -> None:
        """Refuse text of unknown words only: a crosscoder would learn a constant, or nothing at all."""
        kept_RT = self.stream.kept(self.first_rows_RT)
        for number, (tokens_RT, place_RT) in enumerate(self.source.by_tokenizer(self.first_rows_RT)):
            lm = self.models.all[self.models.tokenizers.index(number)]
            unknown = getattr(lm.tokenizer, "unk_token_id", None)
            counterpart_RT = tokens_RT if place_RT is None else tokens_RT.gather(1, place_RT.clamp(min=0))
            if not set(counterpart_RT[kept_RT].tolist()) - {unknown}:
                raise ValueError(
                    f"{self.source.name}: none of the first {tokens_RT.numel():,} tokens is a word that {lm.name} knows; all "
                    "are special, padding or unknown tokens: is the text in a language and spelling that the model was made "
                    "for?"
                )
