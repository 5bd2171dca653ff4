"""Training losses as small objects.

Every loss is a mean over the rows of the whole batch, so that coefficients do not depend on the batch size. Where a run is
spread over processes each one adds up its own share; the shares add up to the loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from replacement.crosscoder.activation import k_of
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.training.parallel import SINGLE, Parallel

if TYPE_CHECKING:
    from replacement.language_model.language_model import LanguageModel

# Losses that need gradients for features that are not active look at one row in four: they are the costly part.
_STRIDE = 4


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


@dataclass(frozen=True)
class PreActivation(Loss):
    """`sum_i max(theta_i - h_i, 0) ||W_dec[i]||` on PRE-activations, theta 0 without a threshold.

    It gives every silent feature a gradient towards firing (Anthropic, "Circuits Updates", January 2025). Measured on
    one row in four.
    """

    name: ClassVar[str] = "preactivation"
    sums_over_features: ClassVar[bool] = True

    coefficient: float = 3e-6

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient * sum / B`."""
        crosscoder, terms = state.crosscoder, []
        some = _Some.of(state)
        for group, norms_FW in enumerate(crosscoder.decoder_norms()):
            theta_F = 0.0 if crosscoder.threshold is None else crosscoder.threshold[group]
            lacking_BF = torch.relu(theta_F - some.pre_activations(crosscoder, group))
            terms.append(lacking_BF.sum(dim=0) @ norms_FW.norm(dim=1))
        return self.coefficient * _STRIDE * torch.stack(terms).sum() / state.n_rows


@dataclass(frozen=True)
class Auxiliary(Loss):
    """Fraction of the error left after the k strongest dead features explain what they can of it.

    This gives features that never fire a gradient (AuxK, Gao et al. 2024, "Scaling and evaluating SAEs"). Measured on one
    row in four; averaged over written sites.
    """

    name: ClassVar[str] = "auxiliary"

    coefficient: float = 1 / 32
    k: int = 32
    """Dead features used per group and row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"the auxiliary k must be 1 or more, got {self.k}")

    def __call__(self, state: StepState) -> Float[Tensor, ""]:
        """`coefficient *` the mean fraction; 0 while nothing is dead."""
        counts = state.parallel.sum_over_features(state.dead_GF.sum(dim=1)).tolist()
        some = _Some.of(state)
        parts = [
            _strongest_dead(state, some, group, min(self.k, int(count))) for group, count in enumerate(counts) if count
        ]
        if not parts:
            return state.targets[next(iter(state.targets))].new_zeros(())
        groups = [group for group, count in enumerate(counts) if count]
        explained = state.crosscoder.decode_contribution(Features.concatenate(parts), groups=groups)
        fractions = []
        for site, y_BD in explained.items():
            error_BD = (state.targets[site] - state.reconstructions[site].detach())[some.rows]
            total = state.parallel.sum_over_data(error_BD.square().sum())
            # A perfect reconstruction leaves nothing to explain.
            fractions.append((error_BD - y_BD).square().sum() / total.clamp(min=torch.finfo(total.dtype).tiny))
        return self.coefficient * torch.stack(fractions).mean()


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


class _Some(NamedTuple):
    """One row in four of the whole batch, or one prompt in four, the same however it is split over processes."""

    inputs: Mapping[Site, Tensor]
    """What the crosscoder read of them."""
    rows: slice | Tensor
    """Their rows in the batch."""
    positions: Tensor | None = None
    """Position of every input row in its prompt, where the crosscoder reads whole prompts."""
    places: Tensor | None = None
    """Which of the input rows belong to the batch, in order; all if None."""

    @classmethod
    def of(cls, state: StepState) -> _Some:
        """Choose them."""
        if not state.crosscoder.reads_prompts:
            rows = slice(-state.rows_before % _STRIDE, None, _STRIDE)
            return cls({site: x_BD[rows] for site, x_BD in state.inputs.items()}, rows)
        assert state.keep_RT is not None
        n_prompts, n_positions = state.keep_RT.shape
        prompts = slice(-state.parallel.data_rank * n_prompts % _STRIDE, None, _STRIDE)
        chosen_RT = torch.zeros_like(state.keep_RT)
        chosen_RT[prompts] = True
        inputs = {
            site: x_RD.unflatten(0, (n_prompts, -1))[prompts].flatten(0, 1) for site, x_RD in state.inputs.items()
        }
        keep_PT = state.keep_RT[prompts]
        positions = torch.arange(n_positions, device=keep_PT.device).repeat(len(keep_PT))
        return cls(inputs, chosen_RT[state.keep_RT], positions, keep_PT.flatten().nonzero()[:, 0])

    def pre_activations(self, crosscoder: Crosscoder, group: int) -> Tensor:
        """Dense pre-activations `[B, F]` of these rows."""
        pre_BF = crosscoder.pre_activations(self.inputs, group, positions=self.positions)
        return pre_BF if self.places is None else pre_BF[self.places]


def _strongest_dead(state: StepState, some: _Some, group: int, k: int) -> Features:
    crosscoder, dead_F = state.crosscoder, state.dead_GF[group]
    with torch.no_grad():
        pre_BF = some.pre_activations(crosscoder, group)
        value_BK, index_BK = pre_BF.masked_fill(~dead_F, -torch.inf).topk(min(k, pre_BF.shape[1]), sorted=False)
        keep_BK = state.parallel.largest(value_BK, k) & (value_BK > -torch.inf)
        index_BK, order_BK = index_BK.sort(dim=1)
        row_S, column_S = torch.nonzero(keep_BK.gather(1, order_BK), as_tuple=True)
        index_S = index_BK[row_S, column_S]
    place_S = row_S if some.places is None else some.places[row_S]
    pre_S = crosscoder.pre_activations_at(
        some.inputs, group, place_S, index_S, pre_S=pre_BF[row_S, index_S], positions=some.positions
    )
    sizes = (len(pre_BF), crosscoder.n_groups, crosscoder.n_features)
    return Features(torch.full_like(row_S, group), row_S, index_S, torch.relu(pre_S), *sizes)
