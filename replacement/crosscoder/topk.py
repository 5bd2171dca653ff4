"""Activation functions that keep the largest pre-activations: of a row, of a row over all groups, or of a batch.

K: features kept per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replacement.crosscoder.activation import Activation, Matrix, Selection, Values
from replacement.number_checks import number, whole_number


@dataclass(frozen=True)
class _KeepsLargest(Activation):
    """What activation functions that keep the k largest pre-activations share."""

    k: int | tuple[int, ...]
    """Features kept per row: in every group, or one number for each group."""

    def __post_init__(self) -> None:
        if self.k == ():
            raise ValueError("k must be a whole number, or one for each group; got ()")
        for k in self.k if isinstance(self.k, tuple) else (self.k,):
            whole_number("k", k, least=1)

    def check_fits(self, n_groups: int, n_features: int) -> None:
        if isinstance(self.k, tuple) and len(self.k) != n_groups:
            raise ValueError(f"{self.name} has k for {len(self.k)} groups, the wiring has {n_groups}")
        largest = max(self.k) if isinstance(self.k, tuple) else self.k
        if largest > n_features:
            raise ValueError(f"{self.name} keeps k={largest} features, but a group has only {n_features}")


@dataclass(frozen=True)
class _KeepsBest(_KeepsLargest):
    """What activation functions that keep the k best features of every row share."""

    chooses_by_row: ClassVar[bool] = True

    relu: bool = field(default=True, kw_only=True)
    """Whether only positive pre-activations are kept; without it, the k largest are kept whatever their sign, and `a = h`."""
    scored: bool = field(default=False, kw_only=True)
    """Whether features are chosen by `h * score_factor`, with one factor of 0 or more per feature (a buffer of the
    crosscoder), such as the norm of all its decoder vectors; their activation is still that of h."""

    def initial_buffers(self, n_groups: int, n_features: int) -> dict[str, Tensor | None]:
        """As in `Activation`; score factors are 1."""
        factor = torch.ones(n_groups, n_features) if self.scored else None
        return super().initial_buffers(n_groups, n_features) | {"score_factor": factor}

    def values(self, pre_S: Values, threshold_S: Tensor | None) -> Values:
        """`max(h, 0)`, or h without `relu`."""
        return torch.relu(pre_S) if self.relu else pre_S


@dataclass(frozen=True)
class TopK(_KeepsBest):
    """The k largest pre-activations of every group and row, where positive (Gao et al. 2024).

    Raises:
        ValueError: k is no whole number of 1 or more.
    """

    name: ClassVar[str] = "topk"

    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """The k largest of each row; those that are not positive only without `relu`."""
        value_BK, index_BK = _largest(pre_BF, k_of(self.k, group))
        index_BK, order_BK = index_BK.sort(dim=1)
        floor = 0.0 if self.relu else -torch.inf
        row_S, column_S = torch.nonzero(value_BK.gather(1, order_BK) > floor, as_tuple=True)
        return Selection(row_S, index_BK[row_S, column_S])


@dataclass(frozen=True)
class JointTopK(_KeepsBest):
    """The k best features of every row over all groups together, so that a layer may keep more than another.

    Of equal scores those of the lower group are kept, and inside a group those of the lower index.

    Raises:
        ValueError: k is not one whole number of 1 or more.
    """

    name: ClassVar[str] = "jointtopk"
    chooses_over_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.k, tuple):
            raise ValueError(f"k of {self.name} must be one number for all groups together, got {self.k}")
        super().__post_init__()

    def check_fits(self, n_groups: int, n_features: int) -> None:
        if (k := k_of(self.k, 0)) > n_groups * n_features:
            raise ValueError(
                f"{self.name} keeps k={k} features, but there are only {n_groups} groups of {n_features} features"
            )

    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Candidates of one group: its k largest of each row, and all that equal the smallest of them."""
        bound_B1 = _largest(pre_BF, min(k_of(self.k, group), pre_BF.shape[1]))[0].amin(dim=1, keepdim=True)
        keep_BF = pre_BF >= bound_B1
        return Selection(*torch.nonzero(keep_BF & (pre_BF > 0) if self.relu else keep_BF, as_tuple=True))

    def keep(self, row_S: Int[Tensor, " S"], score_S: Values) -> Bool[Tensor, " S"]:
        """Which of the candidates, in the order of their groups, are among the k best of their row."""
        by_score_S = score_S.argsort(descending=True, stable=True)
        order_S = by_score_S[row_S[by_score_S].argsort(stable=True)]
        sorted_S = row_S[order_S]
        rank_S = torch.arange(len(row_S), device=row_S.device) - torch.searchsorted(sorted_S, sorted_S)
        keep_S = torch.zeros_like(row_S, dtype=torch.bool)
        keep_S[order_S] = rank_S < k_of(self.k, 0)
        return keep_S


@dataclass(frozen=True)
class BatchTopK(_KeepsLargest):
    """The `k * B` largest pre-activations of a whole batch, where positive (Bussmann et al. 2024, "BatchTopK").

    Training chooses over the batch (k is then the mean number of features per row) and records a running mean of the smallest
    activation kept; inference uses that value as a fixed threshold, so that a row does not depend on the others.

    Raises:
        ValueError: k is no whole number of 1 or more, or the momentum lies outside (0, 1].
    """

    name: ClassVar[str] = "batchtopk"

    momentum: float = 0.01
    """Weight of the newest batch in the running threshold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number("the batchtopk momentum", self.momentum, positive=True, largest=1.0)

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """`[G, 1]`, zero: before training every positive feature is active, as in a ReLU."""
        return torch.zeros(n_groups, 1)

    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """In training the `k * B` largest of the batch, and ties; otherwise all above the recorded threshold."""
        assert threshold_F is not None
        if not training:
            return Selection(*torch.nonzero(pre_BF > threshold_F.clamp(min=0), as_tuple=True))
        # Equal values (of equal rows, say) are kept or left together, however the batch is split.
        return Selection(*_largest_of_all(pre_BF, k_of(self.k, group) * len(pre_BF)))

    def next_threshold(self, threshold_1: Tensor, acts_S: Tensor) -> Tensor:
        """Running mean of the smallest activation kept, after one more training batch of one group.

        The first batch sets it outright, so that a short run is not biased towards 0.
        """
        if not len(acts_S):
            return threshold_1
        smallest_1 = acts_S.min().to(threshold_1.dtype).expand_as(threshold_1)
        return torch.where(threshold_1 > 0, threshold_1.lerp(smallest_1, self.momentum), smallest_1)


def k_of(k: int | tuple[int, ...], group: int) -> int:
    """Features kept per row in one group, where k is one number for all groups or one for each."""
    return k[group] if isinstance(k, tuple) else k


def _blocks(x_BF: Tensor, k: int) -> Tensor:
    """View rows `[B, F]` as blocks of columns, `[B, C, N]`: block n holds the C columns n, n + N, n + 2N, ...

    The k largest entries of a row lie in the k blocks with the largest maxima, so only those need to be searched. The block
    size makes the search among maxima and the search inside blocks about equally long; the interleaved columns let maxima be
    taken over whole vectors.
    """
    n_columns = x_BF.shape[1]
    size = math.gcd(n_columns, 2 ** round(math.log2(max(1, n_columns / k)) / 2))
    return x_BF.unflatten(1, (size, n_columns // size))


def _largest(x_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their columns, `[B, K]` each, unsorted."""
    blocks_BCN = _blocks(x_BF, k)
    _, size, n_blocks = blocks_BCN.shape
    if size < 4:
        return x_BF.topk(k, dim=1, sorted=False)
    block_BK = blocks_BCN.amax(dim=1).topk(k, dim=1, sorted=False).indices
    found_BCK = blocks_BCN.gather(2, block_BK[:, None].expand(-1, size, -1))
    value_BK, place_BK = found_BCK.flatten(1).topk(k, dim=1, sorted=False)
    return value_BK, place_BK // k * n_blocks + block_BK.gather(1, place_BK % k)


def _largest_of_all(x_BF: Tensor, n: int) -> tuple[Tensor, ...]:
    """Rows and columns of the n largest entries, where positive, and of all that equal the smallest of them."""
    if not n:  # no rows
        return torch.nonzero(x_BF, as_tuple=True)
    # The n-th largest maximum of a block is no larger than the n-th largest entry.
    bound = _nth_largest(_blocks(x_BF, n // len(x_BF)).amax(dim=1).flatten(), n)
    row_S, column_S = torch.nonzero(x_BF >= bound if bool(bound > 0) else x_BF > 0, as_tuple=True)
    value_S = x_BF[row_S, column_S]
    if len(value_S) <= n:
        return row_S, column_S
    keep_S = value_S >= _nth_largest(value_S, n)
    return row_S[keep_S], column_S[keep_S]


def _nth_largest(x: Tensor, n: int) -> Tensor:
    return x.kthvalue(len(x) - n + 1).values
