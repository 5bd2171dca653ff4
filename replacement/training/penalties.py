"""Sparsity penalties: sums over active features, weighted by the norms of what they write, averaged over rows."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.training.losses import Loss, StepState


@dataclass(frozen=True)
class Penalty(Loss):
    """A sparsity penalty: a sum over active features, averaged over rows."""

    ramps: ClassVar[bool] = True
    sums_over_features: ClassVar[bool] = True

    @abstractmethod
    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        """Sum over the active features of one group.

        Args:
            norms_SW: norms of each active feature's decoder vectors, one per written site.
        """

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient * sum / B`."""
        sums = []
        for group, norms_FW in enumerate(state.crosscoder.decoder_norms()):
            part = state.features.of(group)
            sums.append(self.of_group(part.activation, norms_FW[part.index]))
        return self.coefficient * torch.stack(sums).sum() / state.n_rows


@dataclass(frozen=True)
class L1OfNorms(Penalty):
    """`sum_i a_i sum_w ||W_dec[i, w]||` (Lindsey et al. 2024, "Sparse Crosscoders")."""

    name: ClassVar[str] = "l1"

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        return (acts_S * norms_SW.sum(dim=1)).sum()


@dataclass(frozen=True)
class L2OfNorms(Penalty):
    """`sum_i a_i sqrt(sum_w ||W_dec[i, w]||^2)`, which does not favour features that write to few sites."""

    name: ClassVar[str] = "l2"

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        return (acts_S * norms_SW.norm(dim=1)).sum()


@dataclass(frozen=True)
class Tanh(Penalty):
    """`sum_i tanh(c ||W_dec[i]|| a_i)` over the concatenated decoder (Ameisen et al. 2025, "Circuit Tracing").

    It saturates, so that strongly active features are not shrunk.
    """

    name: ClassVar[str] = "tanh"

    c: float = 4.0
    """Steepness, per unit of (activation x decoder norm)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.c < math.inf:
            raise ValueError(f"the tanh c must be above 0 and finite, got {self.c}")

    def of_group(self, acts_S: Float[Tensor, " S"], norms_SW: Float[Tensor, "S W"]) -> Float[Tensor, ""]:
        return torch.tanh(self.c * norms_SW.norm(dim=1) * acts_S).sum()


@dataclass(frozen=True)
class Distance(Loss):
    """`sum_i a_i sum_w d(i, w) ||W_dec[i, w]||`, d the layers from a feature's own to the site: an L1 penalty on long reach.

    A feature of a cross-layer transcoder that writes a later layer's output itself saves the features of the layers between.
    With `jacobian`, which lets each layer react as its MLP does, it makes those take their steps (`examples/ground_truth`).
    """

    name: ClassVar[str] = "distance"
    ramps: ClassVar[bool] = True
    sums_over_features: ClassVar[bool] = True

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient * sum / B`.

        Raises:
            ValueError: no feature writes to a later layer than its own.
        """
        wiring, sums = state.crosscoder.wiring, []
        distances = [[s.layer - wiring.group_layer(group) for s in sites] for group, sites in enumerate(wiring.writes)]
        if wiring.n_models > 1 or not any(map(any, distances)):
            raise ValueError(
                f"the loss {self.name} needs features that write to later layers, not the wiring {wiring.name}"
            )
        for group, norms_FW in enumerate(state.crosscoder.decoder_norms()):
            part = state.features.of(group)
            sums.append(part.activation @ (norms_FW @ norms_FW.new_tensor(distances[group]))[part.index])
        return self.coefficient * torch.stack(sums).sum() / state.n_rows
