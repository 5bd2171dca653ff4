"""The token rows a replacement is measured on: a stream, the demo's behaviours, one template, shuffled words.

A slice yields its batches afresh at every iteration and never holds more than a few.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.crosscoder.sites import Site
from replacement.data.documents import special_ids
from replacement.data.token_sources import DEMO_HELD_OUT_SEED, DemoRows, TokenSource, first_rows
from replacement.demo.corpus import behaviours, cities_of, held_out_rows, states, two_hop_probe
from replacement.language_model.language_model import LanguageModel

DEMO_ROWS_PER_SEED = 512
LOGITS_PER_PASS = 2**23
"""Logits of one forward pass, 64 MiB in float64; a few such tensors exist at a time."""
MAX_ROWS_PER_PASS = 64
_SHUFFLE_SEED = 0
_PROMPTS_PER_PROBE = 5


class Batch(NamedTuple):
    """Rows of token ids, all of one length, that run together."""

    tokens_BT: Int[Tensor, "B T"]
    keep_BT: Bool[Tensor, "B T"] | None = None
    """Tokens that may be replaced; None for all. The others (padding, special tokens) keep the model's own output."""
    asked_BT: Bool[Tensor, "B T"] | None = None
    """Tokens that are measured, of those replaced; None for all."""
    answers: Sequence[Sequence[int]] | None = None
    """For every row the token ids that are right after its one measured token; None where only the next token is."""
    others: Mapping[Site, Float[Tensor, "B T D"]] | None = None
    """What a crosscoder over several models reads of the others at these tokens."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A named set of rows."""

    name: str
    about: str
    """One line: what the rows are and which of their tokens count."""
    batches: Callable[[], Iterable[Batch]]
    """Starts the batches afresh."""
    n_tokens: int
    """About how many tokens an iteration runs, for a progress bar."""

    def after(self, start: Slice) -> Slice:
        """Without the rows that another slice begins this one with."""

        def batches() -> Iterator[Batch]:
            left = sum(len(batch.tokens_BT) for batch in start.batches())
            for batch in self.batches():
                skipped = min(left, len(batch.tokens_BT))
                left -= skipped
                if skipped < len(batch.tokens_BT):
                    keep_BT = None if batch.keep_BT is None else batch.keep_BT[skipped:]
                    yield Batch(batch.tokens_BT[skipped:], keep_BT)

        about, n_tokens = f"{self.about}, after the first rows", self.n_tokens - start.n_tokens
        return Slice(name=self.name, about=about, batches=batches, n_tokens=n_tokens)


def rows_that_fit(lm: LanguageModel, context: int) -> int:
    """Rows of one forward pass, few enough for their logits to stay small."""
    return max(1, min(MAX_ROWS_PER_PASS, LOGITS_PER_PASS // (context * lm.vocabulary_size)))


def batches_of(
    rows_RT: Tensor,
    lm: LanguageModel,
    *,
    keep_RT: Tensor | None = None,
    rows_per_pass: int | None = None,
    others: Callable[[slice], Mapping[Site, Tensor]] | None = None,
) -> Iterator[Batch]:
    """Rows and the mask of their tokens that may be replaced, some rows at a time.

    Args:
        others: reads sites of other models, `[B, T, D]`, at some of the rows.

    Raises:
        ValueError: no token, or a mask of another shape or dtype.
    """
    if rows_RT.ndim != 2 or not rows_RT.numel():
        raise ValueError(f"expected token rows [R, T] with at least one token, got {list(rows_RT.shape)}")
    if keep_RT is not None and (keep_RT.shape != rows_RT.shape or keep_RT.dtype != torch.bool):
        got = f"{keep_RT.dtype} of {list(keep_RT.shape)}"
        raise ValueError(f"the mask must be bool of shape {list(rows_RT.shape)}, got {got}")
    size = rows_per_pass or rows_that_fit(lm, rows_RT.shape[1])
    for first in range(0, len(rows_RT), size):
        chosen = slice(first, first + size)
        acts = None if others is None else others(chosen)
        yield Batch(rows_RT[chosen], None if keep_RT is None else keep_RT[chosen], others=acts)


def stream(name: str, about: str, source: TokenSource, lm: LanguageModel, *, n_tokens: int) -> Slice:
    """The first tokens of a source, every one measured; rows of the demo are drawn from its held-out stream.

    Special tokens after a row's first keep the model's own output and are not measured, as in training: they separate
    documents. An iteration over the batches raises ValueError in the end if no token of theirs was usable.
    """
    size, special = rows_that_fit(lm, source.context), torch.tensor(sorted(special_ids(lm)))
    unknown = None if lm.tokenizer is None else lm.tokenizer.unk_token_id
    n_rows = max(1, n_tokens // source.context)

    def batches() -> Iterator[Batch]:
        has_words = False
        blocks = first_rows(_held_out_rows(source, lm), n_rows)
        for tokens_BT in (tokens_BT for block_RT in blocks for tokens_BT in block_RT.split(size)):
            keep_BT = ~torch.isin(tokens_BT, special)
            has_words |= bool((keep_BT if unknown is None else keep_BT & (tokens_BT != unknown)).any())
            keep_BT[:, 0] = True
            yield Batch(tokens_BT, None if bool(keep_BT.all()) else keep_BT)
        if not has_words:
            raise ValueError(
                f"no usable token: it holds special tokens and words unknown to {lm.name}'s tokenizer alone"
            )

    rows = n_rows if source.n_rows is None else min(n_rows, source.n_rows)
    return Slice(name=name, about=about, batches=batches, n_tokens=rows * source.context)


def shuffled(whole: Slice) -> Slice:
    """The same tokens in random order within each row, the first left in place: text without grammar or facts."""

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(_SHUFFLE_SEED)
        for batch in whole.batches():
            order_BT = torch.rand(batch.tokens_BT.shape, generator=generator)
            order_BT[:, 0] = -1
            order_BT = order_BT.argsort(dim=1)
            keep_BT = None if batch.keep_BT is None else batch.keep_BT.gather(1, order_BT)
            yield Batch(batch.tokens_BT.gather(1, order_BT), keep_BT)

    about = "tokens of the whole in random order within each row"
    return Slice(name="shuffled words", about=about, batches=batches, n_tokens=whole.n_tokens)


def demo_slices(lm: LanguageModel, *, n_probes: int) -> list[Slice]:
    """The demo's behaviours, each on at most `n_probes` held-out probes, and one template with more cities in it."""
    slices = []
    for behaviour in behaviours():
        prompts = [(probe.prompt, probe.answers) for probe in behaviour.probes[:n_probes]]
        about = f"held-out probes, at the answer: {behaviour.description}"
        slices.append(_prompts(behaviour.name, about, prompts, lm, at_answer=True))
    probes = [two_hop_probe(city) for state in states() for city in cities_of(state)]
    every = math.ceil(len(probes) / (_PROMPTS_PER_PROBE * n_probes))
    prompts = [(probe.prompt, probe.answers) for probe in probes[::every]]
    about = "every token of one template: " + probes[0].prompt.replace(cities_of(states()[0])[0], "...")
    slices.append(_prompts("one template", about, prompts, lm, at_answer=False))
    return slices


def _prompts(
    name: str, about: str, prompts: Sequence[tuple[str, tuple[str, ...]]], lm: LanguageModel, *, at_answer: bool
) -> Slice:
    """Prompts followed by their first answer, in batches of one length.

    Args:
        prompts: each with its right answers, which are single tokens.
        at_answer: measure the prediction of the answer alone; otherwise every token of the prompt.
    """
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for prompt, words in prompts:
        ids = lm.tokenize(prompt).tolist()
        by_length.setdefault(len(ids), []).append((ids, [lm.token_id(word) for word in words]))
    batches: list[Batch] = []
    for length, rows in sorted(by_length.items()):
        size = rows_that_fit(lm, length + 1)
        for chosen in (rows[first : first + size] for first in range(0, len(rows), size)):
            tokens_BT = torch.tensor([[*ids, right[0]] for ids, right in chosen])
            asked_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
            asked_BT[:, length - 1 if at_answer else 0 : length] = True
            answers = [right for _, right in chosen] if at_answer else None
            batches.append(Batch(tokens_BT, asked_BT=asked_BT, answers=answers))
    n_tokens = sum(batch.tokens_BT.numel() for batch in batches)
    return Slice(name=name, about=about, batches=lambda: batches, n_tokens=n_tokens)


def _held_out_rows(source: TokenSource, lm: LanguageModel) -> Iterator[Tensor]:
    """Rows of a source, some at a time: its first ones, or for the demo's corpus rows that no training drew."""
    if not isinstance(source, DemoRows):
        yield from source.one_pass()
        return
    for seed in itertools.count(DEMO_HELD_OUT_SEED):
        rows = held_out_rows(lm.tokenizer, n_rows=DEMO_ROWS_PER_SEED, context=source.context, seed=seed)
        yield torch.from_numpy(rows)
