"""Training losses as small objects.

Every loss is a mean over the rows of the whole batch, so that coefficients do not depend on the batch size. Where a run is
spread over processes each one adds up its own share; the shares add up to the loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import k_of
from replacement.training.parallel import SINGLE, Parallel

if TYPE_CHECKING:
    from replacement.language_model.language_model import LanguageModel


@dataclass(kw_only=True, slots=True)
class StepState:
    """What a loss may look at: one training step, in scaled activations (see `scales`)."""

    crosscoder: Crosscoder
    inputs: Mapping[Site, Tensor]
    """What the crosscoder read, `[B, D]` per read site; `[R T, D]` where it reads whole prompts."""
    targets: Mapping[Site, Tensor]
    """What it should have written, `[B, D]` per written site."""
    reconstructions: Mapping[Site, Tensor]
    """What it wrote, `[B, D]` per written site."""
    features: Features
    """Active features, with gradients."""
    dead_GF: Tensor
    """Features that have not fired for a long time, `[G, F]` bool."""
    variances: Mapping[Site, Tensor]
    """`mean_b ||y - mean||^2` per written site, measured before training."""
    scales: Mapping[Site, float] = field(default_factory=dict)
    """Factor per site between the model's activations and those above."""
    n_rows: int
    """Rows B of all processes together."""
    rows_before: int = 0
    """Rows of the processes before this one."""
    step: int = 0
    """Steps done before this one."""
    seed: int = 0
    parallel: Parallel = SINGLE
    language_model: LanguageModel | None = None
    """The original model."""
    tokens_RT: Tensor | None = None
    """Rows behind the batch, where the run trains on whole rows of tokens."""
    keep_RT: Tensor | None = None
    """Which of their tokens count, bool; `B` of them, in order."""


def reconstruction_losses(state: StepState) -> dict[Site, Tensor]:
    """`sum_b ||y - y_hat||^2 / (B variance)` per written site: its fraction of variance unexplained.

    Their sum is the reconstruction loss; the normalisation keeps layers with large outputs from dominating it.
    """
    # `mse_loss` keeps no difference for the backward pass: target and reconstruction are there anyway.
    return {
        site: functional.mse_loss(y_BD, state.targets[site], reduction="sum") / (state.n_rows * state.variances[site])
        for site, y_BD in state.reconstructions.items()
    }


@dataclass(frozen=True)
class Loss(ABC):
    """One term besides the reconstruction: called with the state of a step, it returns `coefficient` times its value."""

    name: ClassVar[str]
    """Name in configuration files and metrics."""
    ramps: ClassVar[bool] = False
    """Whether its weight rises over the sparsity warm-up."""
    needs_rows: ClassVar[bool] = False
    """Whether it needs the language model and whole rows of tokens."""
    sums_over_features: ClassVar[bool] = False
    """Whether processes that share the features each hold a part of its value."""

    coefficient: float
    """Weight of the term."""

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"the coefficient of {self.name} must be 0 or more and finite, got {self.coefficient}")

    @abstractmethod
    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """The term of this step, differentiable in the crosscoder's weights."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value: the name and the parameters, which are the fields that count in comparisons."""
        return {"name": self.name, **{field.name: getattr(self, field.name) for field in fields(self) if field.compare}}


@dataclass(frozen=True)
class Strongest(Loss):
    """Fraction of variance left unexplained by the k strongest features of every row and group alone; averaged over sites.

    With it the features of a row are ordered: the first ones say the most and the others refine it, so that what an input is
    about is said by few features instead of being spread over all that are active (the Multi-TopK loss of Gao et al. 2024,
    "Scaling and evaluating SAEs", which adds larger k; here the k is smaller). A feature's strength is its activation times
    the norm of its decoder.
    """

    name: ClassVar[str] = "strongest"

    coefficient: float = 1.0
    k: int | tuple[int, ...] = 2
    """Features used per row of a group, for all groups or for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.k if isinstance(self.k, tuple) else (self.k,)) < 0:
            raise ValueError(f"the strongest k must be 0 or more, got {self.k}")

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient *` the mean fraction."""
        groups = range(state.features.n_groups)
        if isinstance(self.k, tuple) and len(self.k) != len(groups):
            raise ValueError(
                f"the strongest k must be one number, or one for each of {len(groups)} groups, got {self.k}"
            )
        norms = state.crosscoder.decoder_norms()
        weaker_S = torch.cat([_weaker(state, group, norms[group].norm(dim=1), k_of(self.k, group)) for group in groups])
        weaker = state.crosscoder.decode_contribution(state.features.select(weaker_S))
        fractions = [
            functional.mse_loss(y_BD - weaker[site], state.targets[site], reduction="sum")
            / (state.n_rows * state.variances[site])
            for site, y_BD in state.reconstructions.items()
        ]
        return self.coefficient * torch.stack(fractions).mean()


@torch.no_grad()
def _weaker(state: StepState, group: int, norms_F: Tensor, k: int) -> Tensor:
    """Which features of a group are not among the k strongest of their row, bool[S]."""
    features = state.features.of(group)
    strength_S = features.activation * norms_F.clamp(min=1e-12)[features.index]  # no ties while decoders are still 0
    # Sorted by row and falling strength, so that a feature's place in its row is a difference.
    order_S = strength_S.argsort(descending=True, stable=True)
    order_S = order_S[features.row[order_S].argsort(stable=True)]
    begin_S = torch.searchsorted(features.row, features.row)  # the rows are sorted already
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device) - begin_S
    strong_S = place_S < k
    value_BK = strength_S.new_full((features.n_rows, k), -torch.inf)
    value_BK[features.row[strong_S], place_S[strong_S]] = strength_S[strong_S]
    kept_BK = state.parallel.largest(value_BK, k) if k else value_BK > 0
    weaker_S = ~strong_S
    weaker_S[strong_S] = ~kept_BK[features.row[strong_S], place_S[strong_S]]
    return weaker_S
