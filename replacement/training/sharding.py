"""A crosscoder split over processes by features. B rows, K candidates per row, F features per group, S active features.

Each process holds `F / n` features of every group. What is chosen over all features (TopK, BatchTopK) is chosen from the
candidates of every process; everything else is local.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.activation import Activation, Selection
from replacement.crosscoder.crosscoder import Crosscoder
from replacement.crosscoder.features import Features
from replacement.crosscoder.sites import Site
from replacement.crosscoder.topk import BatchTopK, TopK, k_of
from replacement.training.parallel import DATA, FEATURES, SINGLE, Parallel


def feature_dim(name: str, tensor: Tensor) -> int | None:
    """Axis of a crosscoder's tensor (or its Adam moments) that counts features; None for tensors without one."""
    kind = name.split(".")[0]
    if kind in ("W_enc", "b_enc", "W_dec"):
        return 0
    return 1 if kind == "threshold" and tensor.shape[1] > 1 else None


def plan(parallel: Parallel) -> AbstractContextManager[object]:
    """Where a run builds its fresh crosscoder: if features are shared no process has room for it, and it gets no memory."""
    return torch.device("meta") if parallel.n_feature_shards > 1 else nullcontext()


def local_part(crosscoder: Crosscoder, parallel: Parallel, *, seed: int, device: str) -> Crosscoder:
    """This process's features of a fresh crosscoder, with an activation that chooses over all features.

    The parts of all processes start as the crosscoder of one process would: each draws the whole encoder of a group, one
    at a time, and keeps its part.

    Args:
        crosscoder: built under `plan`.
        seed: seed of the initial weights.

    Raises:
        ValueError: a number of features that the processes cannot share equally, or fewer per process than are kept.
    """
    choosing = _choosing(crosscoder.activation, parallel)
    n_parts, n_features = parallel.n_feature_shards, crosscoder.n_features
    if n_parts == 1:
        crosscoder.activation = choosing
        return crosscoder.to(device)
    if crosscoder.reads_prompts:
        raise ValueError(
            f"the heads of a {crosscoder.wiring.name} crosscoder cannot be shared: expected --feature-shards 1"
        )
    if n_features % n_parts:
        raise ValueError(f"{n_features} features cannot be shared equally by {n_parts} processes")
    part = _CrosscoderPart.like(crosscoder, n_features=n_features // n_parts, activation=choosing, device=device)
    part.parallel = parallel
    part.initialise(seed, part=parallel.feature_rank, n_parts=n_parts)
    return part


def whole(part: Crosscoder, activation: Activation, parallel: Parallel) -> Crosscoder | None:
    """The crosscoder that the parts of all processes make up; called by all of them.

    Where features are shared the first process alone gets it, and None the others: it takes the memory of all parts.
    """
    if parallel.n_feature_shards == 1:
        copied = copy.deepcopy(part)
        copied.activation = activation
        return copied
    if parallel.data_rank:
        return None
    n_features = part.n_features * parallel.n_feature_shards
    joined = Crosscoder.like(part, n_features=n_features, activation=activation) if parallel.is_first else None
    for name, value in part.state_dict().items():
        dim = feature_dim(name, value)
        tensor = value if dim is None else parallel.join_in_first(value, FEATURES, dim=dim)
        if joined is not None:
            joined.state_dict()[name].copy_(tensor)
    return joined


class _CrosscoderPart(Crosscoder):
    """Some features of a crosscoder that decodes the features of all processes: sums of decoder vectors are completed."""

    parallel: Parallel = SINGLE

    def decode_contribution(
        self, features: Features, *, groups: Iterable[int] | None = None, sites: Iterable[Site] | None = None
    ) -> dict[Site, Tensor]:
        return self.parallel.sum_partial(super().decode_contribution(features, groups=groups, sites=sites))


def _choosing(activation: Activation, parallel: Parallel) -> Activation:
    if isinstance(activation, TopK) and parallel.n_feature_shards > 1:
        return _ShardedTopK(activation.k, parallel=parallel)
    if isinstance(activation, BatchTopK) and parallel.mesh is not None:
        return _ShardedBatchTopK(activation.k, activation.momentum, parallel=parallel)
    return replace(activation)


@dataclass(frozen=True)
class _ShardedTopK(TopK):
    """The k largest of every row over the features of all processes."""

    parallel: Parallel = SINGLE

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        mine = super().select(pre_BF, threshold_F, training=training, group=group)
        k = k_of(self.k, group)
        row_S = mine.rows
        offset_B = torch.searchsorted(row_S, torch.arange(len(pre_BF), device=row_S.device))
        place_S = torch.arange(len(row_S), device=row_S.device) - offset_B[row_S]
        value_BK = pre_BF.new_full((len(pre_BF), k), -torch.inf)
        value_BK[row_S, place_S] = pre_BF[row_S, mine.indices]
        keep_S = self.parallel.largest(value_BK, k)[row_S, place_S]
        return Selection(row_S[keep_S], mine.indices[keep_S])


@dataclass(frozen=True)
class _ShardedBatchTopK(BatchTopK):
    """The k B largest of the whole batch, over the rows and features of all processes."""

    parallel: Parallel = SINGLE

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        if not training:
            return super().select(pre_BF, threshold_F, training=False, group=group)
        parallel = self.parallel
        # A process may own all of the largest: each one offers as many as are kept in all.
        n_kept = k_of(self.k, group) * sum(parallel.counts_over_data(len(pre_BF)))
        offered_N = pre_BF.new_full((n_kept,), -torch.inf)  # of one size everywhere, however the rows are shared
        largest = pre_BF.flatten().topk(min(n_kept, pre_BF.numel())).values
        offered_N[: len(largest)] = largest
        every = parallel.gather(parallel.gather(offered_N, FEATURES), DATA).flatten()
        smallest = every.topk(n_kept).values[-1]
        keep_BF = (pre_BF >= smallest) & (pre_BF > 0)
        return Selection(*torch.nonzero(keep_BF, as_tuple=True))

    def next_threshold(self, threshold_1: Tensor, acts_S: Tensor) -> Tensor:
        smallest = acts_S.detach().min() if len(acts_S) else threshold_1.new_tensor(torch.inf)
        smallest = smallest.clone()
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return super().next_threshold(threshold_1, smallest[None] if bool(torch.isfinite(smallest)) else acts_S[:0])
