"""From rows of tokens to shuffled batches of activations.

R rows of tokens, T tokens per row, B rows of one read, N buffered tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from replacement.sites import Site


def activation_batches(
    rows: Int[Tensor, "R T"],
    read_activations: Callable[[Tensor], dict[Site, Tensor]],
    *,
    batch_tokens: int,
    buffer_tokens: int,
    seed: int,
    epochs: int = 1,
    skip_positions: int = 0,
    rows_per_read: int = 32,
) -> Iterator[dict[Site, Tensor]]:
    """Yield batches `{site: [batch_tokens, D]}` of tokens drawn from a shuffle buffer.

    Tokens of one text are alike; a batch drawn from a buffer of many texts is close to independent draws. Batches leave
    the buffer until it is half empty, then it is refilled. Tokens left at the end that fill no batch are dropped.

    Arguments:
        rows: token ids; their order is shuffled every epoch.
        read_activations: maps tokens `[B, T]` to activations `{site: [B, T, D]}`, such as a forward pass with hooks.
        batch_tokens: tokens per batch.
        buffer_tokens: tokens held; memory is `buffer_tokens` times the width of all sites.
        seed: seed of both shuffles.
        epochs: passes over the rows.
        skip_positions: leave out the first n positions of every row.
        rows_per_read: rows per call of `read_activations`.

    Raises:
        ValueError: no rows or no tokens in them, a buffer smaller than two batches, activations that do not match the
            tokens or change their width, or fewer tokens in all than one batch.
    """
    _check(rows, batch_tokens, buffer_tokens, skip_positions)
    return _batches(rows, read_activations, batch_tokens, buffer_tokens, seed, epochs, skip_positions, rows_per_read)


def _check(rows: Tensor, batch_tokens: int, buffer_tokens: int, skip_positions: int) -> None:
    if rows.dim() != 2 or not rows.numel():
        raise ValueError(f"expected token rows [R, T] with at least one token, got {list(rows.shape)}")
    if skip_positions >= rows.shape[1]:
        raise ValueError(f"skip_positions={skip_positions} leaves nothing of rows of {rows.shape[1]} tokens")
    if batch_tokens < 1 or buffer_tokens < 2 * batch_tokens:
        raise ValueError(
            f"the buffer must hold at least two batches: batch_tokens={batch_tokens}, buffer_tokens={buffer_tokens}"
        )


def _batches(
    rows: Tensor,
    read_activations: Callable[[Tensor], dict[Site, Tensor]],
    batch_tokens: int,
    buffer_tokens: int,
    seed: int,
    epochs: int,
    skip_positions: int,
    rows_per_read: int,
) -> Iterator[dict[Site, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    chunks = (
        chunk
        for _ in range(epochs)
        for chunk in rows[torch.randperm(len(rows), generator=generator)].split(rows_per_read)
    )
    buffer: dict[Site, Tensor] = {}
    n_yielded, more = 0, True
    while more:
        fresh: list[dict[Site, Tensor]] = [buffer] if buffer else []
        n_held = _length(buffer)
        while n_held < buffer_tokens and (chunk := next(chunks, None)) is not None:
            fresh.append(_read(chunk, read_activations, skip_positions, like=fresh[0] if fresh else None))
            n_held += _length(fresh[-1])
        more = n_held >= buffer_tokens
        order = torch.randperm(n_held, generator=generator)
        buffer = {site: torch.cat([part[site] for part in fresh])[order] for site in fresh[0]}
        # At the end of the text everything leaves; before it half stays, to be mixed with what comes next.
        n_batches = n_held // batch_tokens if not more else max(1, n_held // (2 * batch_tokens))
        for i in range(n_batches):
            yield {site: x_ND[i * batch_tokens : (i + 1) * batch_tokens] for site, x_ND in buffer.items()}
        n_yielded += n_batches
        buffer = {site: x_ND[n_batches * batch_tokens :] for site, x_ND in buffer.items()}
    if not n_yielded:
        raise ValueError(f"the rows hold {n_held} tokens, fewer than one batch of {batch_tokens}")


def _read(
    chunk: Tensor,
    read_activations: Callable[[Tensor], dict[Site, Tensor]],
    skip_positions: int,
    like: dict[Site, Tensor] | None,
) -> dict[Site, Tensor]:
    acts = read_activations(chunk)
    if not acts:
        raise ValueError("read_activations returned no sites")
    if like is not None and acts.keys() != like.keys():
        raise ValueError(f"read_activations returned {_names(acts)} after {_names(like)}")
    for site, x_BTD in acts.items():
        if x_BTD.dim() != 3 or x_BTD.shape[:2] != chunk.shape:
            expected = f"[{chunk.shape[0]}, {chunk.shape[1]}, width]"
            raise ValueError(f"the activations at {site} must have shape {expected}, got {list(x_BTD.shape)}")
        if like is not None and like[site].shape[1] != x_BTD.shape[2]:
            raise ValueError(f"the width at {site} changed from {like[site].shape[1]} to {x_BTD.shape[2]}")
    return {site: x_BTD[:, skip_positions:].flatten(0, 1) for site, x_BTD in acts.items()}


def _length(acts: dict[Site, Tensor]) -> int:
    return len(next(iter(acts.values()))) if acts else 0


def _names(acts: dict[Site, Tensor]) -> str:
    return ", ".join(map(str, acts))
