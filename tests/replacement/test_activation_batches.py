"""The shuffle buffer yields every token once, mixed, with all sites in step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from replacement.sites import Site
from replacement.training import activation_batches

READ, WRITE = Site(0, "resid_mid"), Site(0, "mlp_out")


def tokens(n_rows: int, n_tokens: int) -> Tensor:
    return torch.arange(n_rows * n_tokens).view(n_rows, n_tokens)


def read(rows_BT: Tensor) -> dict[Site, Tensor]:
    """Activations that carry the token's own number, at two sites of different width."""
    number_BT1 = rows_BT[..., None].float()
    return {READ: number_BT1.expand(-1, -1, 3), WRITE: -number_BT1.expand(-1, -1, 2)}


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.integers(2, 5), st.integers(1, 4))
def test_every_token_once_but_for_the_last_partial_batch(
    n_rows: int, n_tokens: int, batch: int, buffered: int, rows_per_read: int
) -> None:
    total = n_rows * n_tokens
    assume(total >= batch)
    batches = list(
        activation_batches(
            tokens(n_rows, n_tokens),
            read,
            batch_tokens=batch,
            buffer_tokens=buffered * batch,
            seed=0,
            rows_per_read=rows_per_read,
        )
    )
    assert all(b[READ].shape == (batch, 3) and b[WRITE].shape == (batch, 2) for b in batches)
    assert all(torch.equal(b[READ][:, 0], -b[WRITE][:, 0]) for b in batches)
    seen = torch.cat([b[READ][:, 0] for b in batches]).long()
    assert len(seen) == total // batch * batch
    assert len(seen.unique()) == len(seen)


def test_batches_mix_rows_and_depend_on_the_seed_only() -> None:
    def run(seed: int) -> list[Tensor]:
        stream = activation_batches(tokens(64, 16), read, batch_tokens=32, buffer_tokens=512, seed=seed)
        return [batch[READ][:, 0] for batch in stream]

    first, same, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(len((batch // 16).unique()) > 12 for batch in first)  # 32 tokens from two rows would give 2


def test_epochs_and_skipped_positions() -> None:
    stream = activation_batches(
        tokens(8, 4), read, batch_tokens=6, buffer_tokens=12, seed=0, epochs=3, skip_positions=1, rows_per_read=2
    )
    seen = torch.cat([batch[READ][:, 0] for batch in stream]).long()
    assert 0 not in seen % 4
    assert seen.bincount(minlength=32).view(8, 4)[:, 1:].unique().tolist() == [3]


def drifting() -> Callable[[Tensor], dict[Site, Tensor]]:
    calls: list[None] = []

    def grow(rows_BT: Tensor) -> dict[Site, Tensor]:
        calls.append(None)
        return {READ: torch.zeros(*rows_BT.shape, 2 + len(calls))}

    return grow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": torch.empty(0, 4, dtype=torch.int64)}, "at least one token, got [0, 4]"),
        ({"skip_positions": 4}, "skip_positions=4 leaves nothing of rows of 4 tokens"),
        ({"buffer_tokens": 7}, "at least two batches: batch_tokens=4, buffer_tokens=7"),
        ({"batch_tokens": 100, "buffer_tokens": 200}, "the rows hold 32 tokens, fewer than one batch of 100"),
        ({"read_activations": lambda rows: {}}, "read_activations returned no sites"),
        (
            {"read_activations": lambda rows: {READ: torch.zeros(len(rows), 3, 5)}},
            "the activations at resid_mid.0 must have shape [1, 4, width], got [1, 3, 5]",
        ),
        ({"read_activations": drifting()}, "the width at resid_mid.0 changed from 3 to 4"),
        (
            {"read_activations": lambda rows: {Site(int(rows[0, 0]), "mlp_out"): torch.zeros(*rows.shape, 3)}},
            "read_activations returned mlp_out.",
        ),
    ],
    ids=["no rows", "all skipped", "small buffer", "few tokens", "no sites", "tokens lost", "width", "other sites"],
)
def test_bad_streams_are_refused(options: dict[str, Any], message: str) -> None:
    options = {"rows": tokens(8, 4), "read_activations": read, "batch_tokens": 4, "buffer_tokens": 8} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        list(activation_batches(**options, seed=0, rows_per_read=1))
