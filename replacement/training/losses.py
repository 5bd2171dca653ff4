"""Training losses. B rows, D site width, F features per group, W written sites of a group, S active features.

Every loss is a mean over rows, so that coefficients do not depend on the batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.features import Features
from replacement.sites import Site


def reconstruction_loss(
    targets: Mapping[Site, Tensor], reconstructions: Mapping[Site, Tensor], variances: Mapping[Site, Tensor]
) -> Float[Tensor, ""]:
    """`sum over written sites of mean_b ||y - y_hat||^2 / variance`.

    Each term is the site's fraction of variance unexplained, so that layers with large outputs do not dominate.

    Arguments:
        targets, reconstructions: `[B, D]` per written site.
        variances: `mean_b ||y - mean||^2` per written site, measured beforehand.
    """
    errors = [
        (targets[site] - y_BD).square().sum() / (len(y_BD) * variances[site]) for site, y_BD in reconstructions.items()
    ]
    return torch.stack(errors).sum()


@dataclass(frozen=True)
class Penalty(ABC):
    """A sparsity penalty: `coefficient` times a sum over active features, averaged over rows."""

    coefficient: float
    """Weight of the penalty in the loss."""

    @abstractmethod
    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        """Sum over the active features of one group.

        Arguments:
            norms_SW: norms of each active feature's decoder vectors, one per written site.
        """

    def __call__(self, crosscoder: Crosscoder, features: Features) -> Float[Tensor, ""]:
        """The penalty of a batch, differentiable in activations and decoders."""
        parts = (features.of(group) for group in range(crosscoder.n_groups))
        sums = [
            self.of_group(part.activation, norms_FW[part.index])
            for part, norms_FW in zip(parts, crosscoder.decoder_norms(), strict=True)
        ]
        return self.coefficient * torch.stack(sums).sum() / features.n_rows


@dataclass(frozen=True)
class L1OfNorms(Penalty):
    """`sum_i a_i sum_w ||W_dec[i, w]||` (Lindsey et al. 2024, "Sparse Crosscoders")."""

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        """Sum over the active features of one group."""
        return (acts_S * norms_SW.sum(dim=1)).sum()


@dataclass(frozen=True)
class L2OfNorms(Penalty):
    """`sum_i a_i sqrt(sum_w ||W_dec[i, w]||^2)`, which does not favour features that write to few sites."""

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        """Sum over the active features of one group."""
        return (acts_S * norms_SW.norm(dim=1)).sum()


@dataclass(frozen=True)
class Tanh(Penalty):
    """`sum_i tanh(c ||W_dec[i]|| a_i)` over the concatenated decoder (Ameisen et al. 2025, "Circuit Tracing").

    It saturates, so that strongly active features are not shrunk.
    """

    c: float = 4.0
    """Steepness, per unit of (activation x decoder norm)."""

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        """Sum over the active features of one group."""
        return torch.tanh(self.c * norms_SW.norm(dim=1) * acts_S).sum()


def auxiliary_loss(
    crosscoder: Crosscoder,
    inputs: Mapping[Site, Tensor],
    errors: Mapping[Site, Tensor],
    dead_GF: Tensor,
    *,
    k: int,
) -> Float[Tensor, ""]:
    """Fraction of the current error left after the k strongest dead features explain what they can of it.

    This gives features that never fire a gradient (AuxK, Gao et al. 2024, "Scaling and evaluating SAEs").

    Arguments:
        inputs: `[B, D]` per read site.
        errors: `y - y_hat` per written site, without gradient.
        dead_GF: which features are dead, `[G, F]` bool.
        k: dead features used per group and row.
    """
    parts = [
        _strongest_dead(crosscoder, inputs, group, dead_F, min(k, int(dead_F.sum())))
        for group, dead_F in enumerate(dead_GF)
        if bool(dead_F.any())
    ]
    explained = crosscoder.decode_contribution(Features.concatenate(parts), groups=[int(p.group[0]) for p in parts])
    return _mean([(errors[s] - y_BD).square().sum() / errors[s].square().sum() for s, y_BD in explained.items()])


def _strongest_dead(
    crosscoder: Crosscoder, inputs: Mapping[Site, Tensor], group: int, dead_F: Tensor, k: int
) -> Features:
    with torch.no_grad():
        pre_BF = crosscoder.pre_activations(inputs, group)
        index_BK = pre_BF.masked_fill(~dead_F, -torch.inf).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    row_S = torch.arange(len(pre_BF), device=pre_BF.device).repeat_interleave(k)
    index_S = index_BK.flatten()
    pre_S = crosscoder.pre_activations_at(inputs, group, row_S, index_S, pre_S=pre_BF[row_S, index_S])
    sizes = (len(pre_BF), crosscoder.n_groups, crosscoder.n_features)
    return Features(torch.full_like(row_S, group), row_S, index_S, torch.relu(pre_S), *sizes)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()
