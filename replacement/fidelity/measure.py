"""How faithful one replacement model is on rows of text: reconstruction, sparsity, and the output with errors propagating.

R rows, T tokens per row, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from replacement.fidelity.metrics import Mean, VarianceUnexplained, kl_divergence, l0, top1_agreement
from replacement.model import ReplacementModel


class Fidelity(NamedTuple):
    """Measured over every token of the rows given, but for positions the crosscoder leaves undecomposed."""

    l0: tuple[float, ...]
    """Active features per token of each group, on clean activations."""
    unexplained: tuple[float, ...]
    """Fraction of variance unexplained of each written MLP output, on clean activations."""
    kl: float
    """Mean KL from the original's next-token distribution to the replacement's, nats, errors propagating."""
    agreement: float | None
    """Top-1 agreement where the original's top token has probability 0.5 or more, errors propagating; None if nowhere."""
    agreement_all: float
    """Top-1 agreement on every token."""
    n_tokens: int
    """Tokens measured."""

    @property
    def total_l0(self) -> float:
        """Active features per token over all groups."""
        return sum(self.l0)

    @property
    def mean_unexplained(self) -> float:
        """Mean over written sites of the fraction of variance unexplained."""
        return sum(self.unexplained) / len(self.unexplained)


@torch.no_grad()
def measure_fidelity(model: ReplacementModel, rows_RT: Tensor, *, rows_per_pass: int = 64) -> Fidelity:
    """Run the original and the replacement over rows of tokens and compare.

    Args:
        model: every MLP its crosscoder writes is replaced, reading its own stream.
        rows_RT: token ids, best held out from training.
        rows_per_pass: rows per forward pass; bounds memory.

    Raises:
        ValueError: no rows.
    """
    if rows_RT.ndim != 2 or not rows_RT.numel():
        raise ValueError(f"expected token rows [R, T] with at least one token, got {list(rows_RT.shape)}")
    wiring, lm = model.crosscoder.wiring, model.language_model
    unexplained = {site: VarianceUnexplained() for site in wiring.write_sites}
    counts, kl, agreed = [Mean() for _ in range(wiring.n_groups)], Mean(), [0, 0, 0]
    skipped = model.crosscoder.undecomposed_positions
    if skipped >= rows_RT.shape[1]:
        raise ValueError(f"the crosscoder leaves {skipped} positions undecomposed, the rows have {rows_RT.shape[1]}")
    positions_T = torch.arange(skipped, rows_RT.shape[1], device=rows_RT.device)
    for chunk_BT in rows_RT.split(rows_per_pass):
        original, replaced = lm(chunk_BT)[:, skipped:], model(chunk_BT)[:, skipped:]
        sites = {*wiring.read_sites, *wiring.write_sites}
        clean = {site: x_BTD[:, skipped:].flatten(0, 1) for site, x_BTD in lm.read(chunk_BT, sites).items()}
        output = model.crosscoder(clean, positions=positions_T.repeat(len(chunk_BT)))
        for site, error in unexplained.items():
            error.update(clean[site], output.reconstructions[site])
        for mean, count in zip(counts, l0(output.features), strict=True):
            mean.update(count.expand(original.shape[0] * original.shape[1]))
        kl.update(kl_divergence(original, replaced))
        confident, everything = (top1_agreement(original, replaced, min_probability=p) for p in (0.5, 0.0))
        agreed = [agreed[0] + confident.agreed, agreed[1] + confident.counted, agreed[2] + everything.agreed]
    return Fidelity(
        l0=tuple(mean.value() for mean in counts),
        unexplained=tuple(error.value() for error in unexplained.values()),
        kl=kl.value(),
        agreement=agreed[0] / agreed[1] if agreed[1] else None,
        agreement_all=agreed[2] / (len(rows_RT) * len(positions_T)),
        n_tokens=len(rows_RT) * len(positions_T),
    )
