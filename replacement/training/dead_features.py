"""Losses that give features which are not active a gradient towards firing.

They need dense pre-activations, the costly part of a step, and so look at one row in four.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.training.losses import Loss, StepState

_STRIDE = 4
"""One row in so many is looked at."""


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
