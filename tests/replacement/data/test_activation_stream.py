"""The stream's order is a function of (seed, step): resumable anywhere, the same for any number of processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from replacement.crosscoder.sites import Site
from replacement.data.activation_stream import ActivationStream
from replacement.data.token_sources import StoredRows, StreamedRows, TokenSource

READ, WRITE = Site(0, "resid_mid"), Site(0, "mlp_out")
EXCLUDED = (0, 3)


def number(tokens_BT: Tensor) -> dict[Site, Tensor]:
    """Activations that carry the token's own id, at two sites of different width."""
    id_BT1 = tokens_BT[..., None].float()
    return {READ: id_BT1.expand(-1, -1, 3), WRITE: -id_BT1.expand(-1, -1, 2)}


def numbered_rows(n_rows: int, n_tokens: int, *, n_held_out: int = 0) -> StoredRows:
    """Every token has an id of its own, in order."""
    return StoredRows(torch.arange(n_rows * n_tokens).view(n_rows, n_tokens), n_held_out=n_held_out)


def arriving(source: StoredRows) -> StreamedRows:
    """The same rows as a stream that arrives three at a time."""
    rows_RT = np.concatenate([rows.numpy() for rows in source.one_pass()])
    return StreamedRows(lambda: iter(np.array_split(rows_RT, -(-len(rows_RT) // 3))), context=source.context)


def stream(
    source: TokenSource, read: Callable[[Tensor], dict[Site, Tensor]] = number, **options: Any
) -> ActivationStream:
    return ActivationStream(
        source, read, **({"batch_tokens": 8, "buffer_tokens": 24, "shards": 4, "seed": 0} | options)
    )


def ids(batches: Iterator[dict[Site, Tensor]], n: int) -> list[Tensor]:
    return [batch[READ][:, 0].long() for batch in islice(batches, n)]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


SOURCES = st.builds(
    lambda n_rows, n_tokens, arrives: (
        arriving(numbered_rows(n_rows, n_tokens)) if arrives else numbered_rows(n_rows, n_tokens)
    ),
    st.integers(1, 30),
    st.integers(3, 6),
    st.booleans(),
)
OPTIONS = st.fixed_dictionaries(
    {
        "shards": st.sampled_from([1, 2, 4]),
        "batch_tokens": st.sampled_from([4, 8]),
        "buffer_tokens": st.integers(80, 160),
        "seed": st.integers(0, 3),
        "rows_per_read": st.integers(1, 9),
        "excluded_ids": st.sampled_from([(), EXCLUDED]),
        "undecomposed_positions": st.integers(0, 1),
    }
)


@given(SOURCES, OPTIONS, st.integers(0, 40))
def test_starting_at_a_step_gives_what_follows_it(source: TokenSource, options: dict[str, Any], start: int) -> None:
    from_the_start = list(islice(stream(source, **options).batches(), start + 12))
    resumed = list(islice(stream(source, **options).batches(start=start), 12))
    for expected, batch in zip(from_the_start[start:], resumed, strict=True):
        assert batch.keys() == expected.keys() == {READ, WRITE}
        assert all(torch.equal(batch[site], expected[site]) for site in batch)


@given(SOURCES, OPTIONS)
def test_two_processes_share_the_batches_of_one(source: TokenSource, options: dict[str, Any]) -> None:
    options["shards"] = 4
    alone = ids(stream(source, **options).batches(), 15)
    halves = [ids(stream(source, **options, my_shards=mine).batches(), 15) for mine in ([2, 0], [1, 3])]
    for whole, one, other in zip(alone, *halves, strict=True):
        assert len(one) == len(other) == len(whole) // 2
        assert torch.equal(torch.cat([one, other]).sort()[0], whole.sort()[0])


@given(st.integers(1, 3), st.integers(0, 5), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_an_epoch_shows_a_token_once_and_what_is_left_out_never(
    n_blocks: int, n_held_out: int, shards: int, undecomposed_positions: int, excluding: bool
) -> None:
    rows_per_block = 6 * shards  # so that blocks end where epochs end
    source = numbered_rows(n_blocks * rows_per_block + n_held_out, 5, n_held_out=n_held_out)
    first_id = 5 * n_held_out
    excluded = [first_id + offset for offset in (0, 7, 11, 12)] if excluding else []
    batches = stream(
        source,
        batch_tokens=2 * shards,
        buffer_tokens=5 * rows_per_block,
        shards=shards,
        excluded_ids=excluded,
        undecomposed_positions=undecomposed_positions,
    )
    seen: list[int] = []
    for batch in batches.batches():
        if batches.epoch:
            break
        seen += batch[READ][:, 0].long().tolist()
        assert torch.equal(batch[READ][:, :1].expand(-1, 2), -batch[WRITE])  # the sites are in step
    rows_RT = torch.arange(first_id, first_id + n_blocks * rows_per_block * 5).view(-1, 5)
    kept = set(rows_RT[:, undecomposed_positions:].flatten().tolist()) - set(excluded)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= kept
    assert source.held_out().flatten().tolist() == list(range(first_id))
    # Every shard has an even number of tokens, batches of two: only exclusion leaves tokens over.
    assert len(kept) - len(seen) <= n_blocks * shards * (1 + len(excluded)) * excluding


def test_epochs_are_shuffled_differently_and_hold_the_same_rows() -> None:
    blocks = numbered_rows(10, 3).blocks(10, seed=0)
    first, second = (next(blocks).tokens_RT for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(dim=0)[0], second.sort(dim=0)[0])
    other_seed = next(numbered_rows(10, 3).blocks(10, seed=1)).tokens_RT
    assert not torch.equal(first, other_seed)


def test_batches_mix_the_rows_of_a_block_and_depend_on_the_seed() -> None:
    def run(seed: int) -> list[Tensor]:
        return ids(stream(numbered_rows(64, 16), batch_tokens=32, buffer_tokens=1024, seed=seed).batches(), 20)

    assert equal(run(0), run(0))
    assert not any(map(torch.equal, run(0), run(1)))
    assert all(len((batch // 16).unique()) > 12 for batch in run(0))  # 32 tokens from two rows would give 2


def test_a_beginning_token_counts_only_at_position_0_and_only_where_position_0_counts() -> None:
    rows_RT = torch.tensor([[1, 5, 1, 6], [2, 7, 2, 8]])  # 1 begins a sequence, 2 is padding
    source = StoredRows(rows_RT, bos_id=1)
    options = {"batch_tokens": 1, "buffer_tokens": 8, "shards": 1, "excluded_ids": [1, 2]}
    decomposed = stream(source, **options).kept(rows_RT)
    assert decomposed.tolist() == [[True, True, False, True], [False, True, False, True]]
    undecomposed = stream(source, **options, undecomposed_positions=1).kept(rows_RT)
    assert undecomposed.tolist() == [[False, True, False, True]] * 2
    seen = torch.cat(ids(stream(source, **options).batches(), 5))
    assert sorted(seen.tolist()) == [1, 5, 6, 7, 8]


@given(SOURCES, st.integers(0, 9))
def test_whole_rows_come_in_the_order_of_the_source_and_are_shared_alike(source: TokenSource, start: int) -> None:
    options = {"batch_tokens": 4 * source.context, "buffer_tokens": 8 * source.context, "excluded_ids": EXCLUDED}
    alone = list(islice(stream(source, **options).row_batches(), start + 3))[start:]
    halves = [
        list(islice(stream(source, **options, my_shards=mine).row_batches(start=start), 3)) for mine in ([0, 2], [1, 3])
    ]
    expected = islice(source.blocks(4, seed=0), start, None)
    for whole, one, other, rows in zip(alone, *halves, expected, strict=False):
        assert torch.equal(whole.tokens_RT, rows.tokens_RT)
        assert torch.equal(whole.tokens_RT[0::2], one.tokens_RT)
        assert torch.equal(whole.tokens_RT[1::2], other.tokens_RT)
        for batch in (whole, one, other):
            assert torch.equal(batch.kept_RT, ~torch.isin(batch.tokens_RT, torch.tensor(EXCLUDED)))


def test_a_process_reads_its_own_rows_only_and_skipped_blocks_are_not_read() -> None:
    read_ids: list[int] = []

    def note(tokens_BT: Tensor) -> dict[Site, Tensor]:
        read_ids.extend(tokens_BT[:, 0].tolist())
        return number(tokens_BT)

    batches = stream(numbered_rows(40, 4), note, batch_tokens=8, buffer_tokens=80, shards=2, my_shards=[1])
    next(batches.batches(start=25))  # ten batches per block
    block = list(islice(numbered_rows(40, 4).blocks(20, seed=0), 3))[2]
    assert read_ids == block.tokens_RT[1::2, 0].tolist()


def test_memory_is_one_block() -> None:
    batches = stream(numbered_rows(40, 4), batch_tokens=8, buffer_tokens=80).batches()
    storages = {next(batches)[READ].untyped_storage().data_ptr() for _ in range(2)}
    made = batches.gi_yieldfrom or batches  # under test what checks types is a generator around it
    buffer = made.gi_frame.f_locals["buffer"]
    before = {site: x_ND.data_ptr() for site, x_ND in buffer.acts.items()}
    for _ in range(30):
        next(batches)
    assert {site: x_ND.data_ptr() for site, x_ND in buffer.acts.items()} == before
    assert storages.isdisjoint(before.values())  # what is handed out is not overwritten


def drifting(change: Callable[[int, Tensor], dict[Site, Tensor]]) -> Callable[[Tensor], dict[Site, Tensor]]:
    calls: list[None] = []

    def read(tokens_BT: Tensor) -> dict[Site, Tensor]:
        calls.append(None)
        return change(len(calls), tokens_BT)

    return read


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda tokens: {}, "read_activations returned no sites"),
        (
            lambda tokens: {READ: torch.zeros(len(tokens), 3, 5)},
            "the activations at resid_mid.0 must have shape [1, 4, width], got [1, 3, 5]",
        ),
        (
            drifting(lambda call, tokens: {READ: torch.zeros(*tokens.shape, 2 + call)}),
            "the width at resid_mid.0 changed from 3 to 4",
        ),
        (
            drifting(lambda call, tokens: {READ: number(tokens)[READ].to([torch.float32, torch.float16][call - 1])}),
            "the dtype at resid_mid.0 changed from torch.float32 to torch.float16",
        ),
        (
            drifting(lambda call, tokens: {Site(call, "mlp_out"): number(tokens)[READ]}),
            "read_activations returned mlp_out.2 after mlp_out.1",
        ),
    ],
    ids=["no sites", "tokens lost", "width", "dtype", "other sites"],
)
def test_bad_activations_are_refused(read: Callable[[Tensor], dict[Site, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        next(stream(numbered_rows(8, 4), read, rows_per_read=1).batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0, "buffer_tokens": 4}, "batch_tokens must be 1 or more, got 0"),
        ({"seed": -1}, "the seed must be 0 or more, got -1"),
        ({"batch_tokens": 6}, "batch_tokens=6 is not a multiple of shards=4"),
        ({"buffer_tokens": 15}, "at least two batches: batch_tokens=8, buffer_tokens=15"),
        (
            {"batch_tokens": 4, "buffer_tokens": 15},
            "hold 3 rows of 4 tokens: expected at least one for each of 4 shards",
        ),
        ({"undecomposed_positions": 4}, "undecomposed_positions=4 leaves nothing of rows of 4 tokens: expected 0 to 3"),
        ({"my_shards": [1, 4]}, "my_shards must be different shards of 0 to 3, at least one; got [1, 4]"),
        ({"my_shards": [1, 1]}, "at least one; got [1, 1]"),
        ({"my_shards": []}, "at least one; got []"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stream(numbered_rows(8, 4), **options)


def test_a_block_that_fills_no_batch_is_refused_with_its_numbers() -> None:
    source = StoredRows(torch.zeros(4, 4, dtype=torch.int64))
    message = "keeps only 0 tokens in one of 4 shards, fewer than the 2 of one batch: raise buffer_tokens"
    with pytest.raises(ValueError, match=message):
        next(stream(source, excluded_ids=[0]).batches())


def test_whole_rows_need_a_batch_that_the_shards_divide() -> None:
    message = "batch_tokens=8 hold 2 rows of 4 tokens: expected a multiple of shards=4"
    with pytest.raises(ValueError, match=message):
        next(stream(numbered_rows(8, 4)).row_batches())


@pytest.mark.parametrize("method", ["batches", "row_batches"])
def test_no_step_comes_before_the_first(method: str) -> None:
    with pytest.raises(ValueError, match="start must be 0 or more, got -1"):
        next(getattr(stream(numbered_rows(8, 4), batch_tokens=16, buffer_tokens=32), method)(start=-1))
