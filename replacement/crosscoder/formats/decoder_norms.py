"""Norms of decoder vectors, for layouts that choose features by pre-activations times them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.mapped_file import MappedFile

_VALUES_PER_PASS = 2**23
"""Values that are raised to float64 at a time: 64 MiB."""


@torch.no_grad()
def decoder_norms(
    groups: Iterable[Iterable[Float[Tensor, "F D"]]], files: Sequence[MappedFile] = ()
) -> Float[Tensor, "G F"]:
    """`sqrt(sum_w ||W_dec[f, w]||^2)` in float64: norms of all that a feature writes, for each group's decoders of all sites.

    Args:
        files: what the decoders are views of; they are let go of after each matrix.
    """
    rows = []
    for decoders in groups:
        squares: Tensor | None = None
        for decoder_FD in decoders:
            parts = decoder_FD.split(max(1, _VALUES_PER_PASS // decoder_FD.shape[1]))
            added_F = torch.cat([part.double().square().sum(dim=1) for part in parts])
            squares = added_F if squares is None else squares + added_F
            for mapped in files:
                mapped.release()
        assert squares is not None, "a group writes at least one site"
        rows.append(squares.sqrt())
    return torch.stack(rows)
