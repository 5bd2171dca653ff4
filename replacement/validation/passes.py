"""Passes over rows of tokens, and which tokens of them count. R rows, T tokens per row, B rows of one pass, D site width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.sites import Site
from replacement.language_model.language_model import Hook
from replacement.splicing.splice import replaced_tokens


@contextmanager
def evaluating(*crosscoders: Crosscoder) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the mode each came in afterwards."""
    were_training = [crosscoder.training for crosscoder in crosscoders]
    for crosscoder in crosscoders:
        crosscoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for crosscoder, was_training in zip(crosscoders, were_training, strict=True):
            crosscoder.train(was_training)


def passes(
    crosscoder: Crosscoder, rows_RT: Tensor, keep_RT: Tensor | None, rows_per_pass: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Split rows and their mask, after checking them.

    Raises:
        ValueError: no rows, a mask of another shape, or no token to measure.
    """
    if rows_RT.ndim != 2 or not rows_RT.numel():
        raise ValueError(f"expected token rows [R, T] with at least one token, got {list(rows_RT.shape)}")
    skipped = crosscoder.undecomposed_positions
    if skipped >= rows_RT.shape[1]:
        raise ValueError(f"the crosscoder leaves {skipped} positions undecomposed, the rows have {rows_RT.shape[1]}")
    mask_RT = replaced_tokens(rows_RT, skipped, keep_RT)
    if mask_RT is not None and not bool(mask_RT.any()):
        raise ValueError("the mask keeps no token that the crosscoder decomposes")
    rows = rows_RT.split(rows_per_pass)
    return zip(rows, [None] * len(rows) if keep_RT is None else keep_RT.split(rows_per_pass), strict=True)


def zero_hooks(crosscoder: Crosscoder, mask_BT: Tensor) -> dict[Site, Hook]:
    """Hooks that set every written site to 0 at the tokens of a mask."""

    def zero(x_BTD: Tensor) -> Tensor:
        return x_BTD.masked_fill(mask_BT.to(x_BTD.device).view(*x_BTD.shape[:2], *[1] * (x_BTD.ndim - 2)), 0)

    return dict.fromkeys(crosscoder.wiring.write_sites, zero)


def measured(crosscoder: Crosscoder, tokens_BT: Tensor, keep_BT: Tensor | None) -> Tensor:
    """Mask `[B, T]` of the tokens measured."""
    mask_BT = replaced_tokens(tokens_BT, crosscoder.undecomposed_positions, keep_BT)
    return torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT


def with_next(mask_BT: Tensor, keep_BT: Tensor | None) -> Tensor:
    """Mask `[B, T - 1]` of the measured tokens whose next token is kept."""
    return mask_BT[:, :-1] if keep_BT is None else mask_BT[:, :-1] & keep_BT[:, 1:].to(mask_BT.device)
