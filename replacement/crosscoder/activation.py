"""Activation functions: which features are active, and with what value.

B rows, F features per group, G groups, K kept per row, S active features.

Each function works in two steps so that a dense `[B, F]` never needs a gradient: `select` picks (row, index) pairs from
the pre-activations, `values` maps the S selected pre-activations to activations, differentiably. The objects are plain
frozen values; what they learn or measure (thresholds) lives in the crosscoder as a tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Selection(NamedTuple):
    """Active features of one group, sorted by row, then index."""

    rows: Int[Tensor, " S"]
    """Row of the pre-activations, `[S]`."""
    indices: Int[Tensor, " S"]
    """Feature index in the group, `[S]`."""


@dataclass(frozen=True)
class Activation(ABC):
    """Interface of the activation functions; `name` is their name in checkpoints."""

    name: ClassVar[str]
    learns_threshold: ClassVar[bool] = False
    """Whether the threshold is a parameter, trained by gradient."""
    chooses_by_row: ClassVar[bool] = False
    """Whether `select` looks at each row alone, so that rows may be given to it in chunks."""

    @abstractmethod
    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """Threshold to keep in the crosscoder: `[G, F]`, `[G, 1]`, or None for functions without one."""

    @abstractmethod
    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Choose the active features of one group.

        Args:
            pre_BF: pre-activations; no gradient flows through the choice.
            threshold_F: the group's row of the threshold, `[F]` or `[1]`.
            training: choose for a training step (see each class).
            group: which group the pre-activations are of.
        """

    @abstractmethod
    def values(self, pre_S: Float[Tensor, " S"], threshold_S: Tensor | None) -> Float[Tensor, " S"]:
        """Activations of selected features from their pre-activations, differentiable in both arguments."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value: the name and the parameters."""
        return {"name": self.name, **asdict(self)}

    def check_fits(self, n_features: int) -> None:
        """Check that the function can act on groups of `n_features` features.

        Raises:
            ValueError: more features are kept than a group has.
        """
        k = asdict(self).get("k", 1)
        most = max(k) if isinstance(k, tuple) else k
        if most > n_features:
            raise ValueError(f"{self.name} keeps k={most} features, but a group has only {n_features}")


@dataclass(frozen=True)
class ReLU(Activation):
    """`max(h, 0)`."""

    name: ClassVar[str] = "relu"
    chooses_by_row: ClassVar[bool] = True

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """None."""
        return None

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Features with a positive pre-activation."""
        return Selection(*torch.nonzero(pre_BF > 0, as_tuple=True))

    def values(self, pre_S: Float[Tensor, " S"], threshold_S: Tensor | None) -> Float[Tensor, " S"]:
        """`max(h, 0)`."""
        return torch.relu(pre_S)


@dataclass(frozen=True)
class JumpReLU(Activation):
    """`h * 1[h > theta]` with a learned threshold per feature (Rajamanoharan et al. 2024, "Jumping Ahead").

    The step has no gradient, so theta is trained with the straight-through estimate
    `d a / d theta = -(theta / bandwidth) * 1[|h - theta| < bandwidth / 2]`. Training therefore also selects the
    features just below their threshold: their activation is 0, their gradient is not.

    Raises:
        ValueError: negative threshold or bandwidth not above 0.
    """

    name: ClassVar[str] = "jumprelu"
    learns_threshold: ClassVar[bool] = True
    chooses_by_row: ClassVar[bool] = True

    threshold: float = 0.03
    """Starting threshold, in units of the pre-activation."""
    bandwidth: float = 0.03
    """Width of the window around the threshold that trains it, in units of the pre-activation."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"the jumprelu threshold must be 0 or more, got {self.threshold}")
        if not self.bandwidth > 0:
            raise ValueError(f"the jumprelu bandwidth must be above 0, got {self.bandwidth}")

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """`[G, F]`, every entry `threshold`."""
        return torch.full((n_groups, n_features), self.threshold)

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Features above their threshold; in training also those inside the window below it."""
        assert threshold_F is not None
        floor_F = threshold_F - self.bandwidth / 2 if training else threshold_F
        return Selection(*torch.nonzero(pre_BF > floor_F, as_tuple=True))

    def values(self, pre_S: Float[Tensor, " S"], threshold_S: Tensor | None) -> Float[Tensor, " S"]:
        """`h * 1[h > theta]`, with the straight-through gradient to theta."""
        assert threshold_S is not None
        return _Jump.apply(pre_S, threshold_S, self.bandwidth)


@dataclass(frozen=True)
class TopK(Activation):
    """The k largest pre-activations of every group and row, where positive (Gao et al. 2024).

    Raises:
        ValueError: k below 1.
    """

    name: ClassVar[str] = "topk"
    chooses_by_row: ClassVar[bool] = True

    k: int | tuple[int, ...]
    """Features kept per row: in every group, or one number for each group."""

    def __post_init__(self) -> None:
        _check_k(self.k)

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """None.

        Raises:
            ValueError: one k per group is given, but not for as many groups.
        """
        _check_one_k_per_group(self, n_groups)
        return None

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """The k largest of each row, without those that are not positive."""
        value_BK, index_BK = _largest(pre_BF, k_of(self, group))
        index_BK, order_BK = index_BK.sort(dim=1)
        row_S, column_S = torch.nonzero(value_BK.gather(1, order_BK) > 0, as_tuple=True)
        return Selection(row_S, index_BK[row_S, column_S])

    def values(self, pre_S: Float[Tensor, " S"], threshold_S: Tensor | None) -> Float[Tensor, " S"]:
        """`max(h, 0)`."""
        return torch.relu(pre_S)


@dataclass(frozen=True)
class BatchTopK(Activation):
    """The `k * B` largest pre-activations of a whole batch, where positive (Bussmann et al. 2024, "BatchTopK").

    Training chooses over the batch and records a running mean of the smallest activation kept; inference uses that
    value as a fixed threshold, so that a row does not depend on the others.

    Raises:
        ValueError: k below 1, or a momentum outside (0, 1].
    """

    name: ClassVar[str] = "batchtopk"

    k: int | tuple[int, ...]
    """Features kept per row, on average over the batch: in every group, or one number for each group."""
    momentum: float = 0.01
    """Weight of the newest batch in the running threshold."""

    def __post_init__(self) -> None:
        _check_k(self.k)
        if not 0 < self.momentum <= 1:
            raise ValueError(f"the batchtopk momentum must be above 0 and at most 1, got {self.momentum}")

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """`[G, 1]`, zero: before training every positive feature is active, as in a ReLU.

        Raises:
            ValueError: one k per group is given, but not for as many groups.
        """
        _check_one_k_per_group(self, n_groups)
        return torch.zeros(n_groups, 1)

    def select(
        self, pre_BF: Float[Tensor, "B F"], threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """In training the `k * B` largest of the batch, and ties; otherwise all above the recorded threshold."""
        assert threshold_F is not None
        if not training:
            return Selection(*torch.nonzero(pre_BF > threshold_F.clamp(min=0), as_tuple=True))
        # Equal values (of equal rows, say) are kept or left together, however the batch is split.
        return Selection(*_largest_of_all(pre_BF, k_of(self, group) * len(pre_BF)))

    def values(self, pre_S: Float[Tensor, " S"], threshold_S: Tensor | None) -> Float[Tensor, " S"]:
        """`max(h, 0)`."""
        return torch.relu(pre_S)

    def next_threshold(self, threshold_1: Tensor, acts_S: Tensor) -> Tensor:
        """Running mean of the smallest activation kept, after one more training batch of one group.

        The first batch sets it outright, so that a short run is not biased towards 0.
        """
        if not len(acts_S):
            return threshold_1
        smallest_1 = acts_S.min().to(threshold_1.dtype).expand_as(threshold_1)
        return torch.where(threshold_1 > 0, threshold_1.lerp(smallest_1, self.momentum), smallest_1)


def k_of(activation: TopK | BatchTopK, group: int) -> int:
    """Features that an activation function keeps per row in one group."""
    return activation.k[group] if isinstance(activation.k, tuple) else activation.k


def activation_from_dict(value: Mapping[str, Any]) -> Activation:
    """Read what `Activation.to_dict` wrote.

    Raises:
        ValueError: unknown name, or parameters the function does not have.
    """
    kinds = {kind.name: kind for kind in (ReLU, JumpReLU, TopK, BatchTopK)}
    parameters = dict(value)
    name = parameters.pop("name", None)
    if name not in kinds:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(kinds)}")
    expected = [field.name for field in fields(kinds[name])]
    if set(parameters) - set(expected) or (name in ("topk", "batchtopk") and "k" not in parameters):
        raise ValueError(f"activation {name} has the parameters {expected}, got {sorted(parameters)}")
    if isinstance(parameters.get("k"), list):  # JSON has no tuples
        parameters["k"] = tuple(parameters["k"])
    return kinds[name](**parameters)


class _Jump(torch.autograd.Function):
    """JumpReLU with a rectangular kernel as the derivative of its step."""

    @staticmethod
    def forward(ctx: Any, pre_S: Tensor, threshold_S: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_S, threshold_S)
        ctx.bandwidth = bandwidth
        return pre_S * (pre_S > threshold_S)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_S, threshold_S = ctx.saved_tensors
        window_S = (pre_S - threshold_S).abs() < ctx.bandwidth / 2
        return grad_S * (pre_S > threshold_S), -grad_S * threshold_S / ctx.bandwidth * window_S, None


def _blocks(x_BF: Tensor, k: int) -> Tensor:
    """A view `[B, C, N]` of rows as N blocks of C columns, for searches of the k largest per row.

    The k largest lie in the k blocks with the largest maxima, so only those need to be searched; the size makes the
    search among maxima and the search in blocks about equally long. Block j holds the columns j, j + N, j + 2N, ...:
    maxima are then taken over whole vectors.
    """
    n_columns = x_BF.shape[1]
    size = math.gcd(n_columns, 2 ** round(math.log2(max(1, n_columns / k)) / 2))
    return x_BF.unflatten(1, (size, n_columns // size))


def _largest(x_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their columns, `[B, k]` each, in no order."""
    blocks_BCN = _blocks(x_BF, k)
    _, size, n_blocks = blocks_BCN.shape
    if size < 4:
        return x_BF.topk(k, dim=1, sorted=False)
    block_BK = blocks_BCN.amax(dim=1).topk(k, dim=1, sorted=False).indices
    found_BCK = blocks_BCN.gather(2, block_BK[:, None].expand(-1, size, -1))
    value_BK, place_BK = found_BCK.flatten(1).topk(k, dim=1, sorted=False)
    return value_BK, place_BK // k * n_blocks + block_BK.gather(1, place_BK % k)


def _largest_of_all(x_BF: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the n largest entries, where positive, and of all that equal the smallest of them."""
    if not n:  # no rows
        row_S, column_S = torch.nonzero(x_BF, as_tuple=True)
        return row_S, column_S
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


def _check_k(given: int | tuple[int, ...]) -> None:
    for k in given if isinstance(given, tuple) else (given,):
        if not (isinstance(k, int) and k >= 1):
            raise ValueError(f"k must be a whole number of at least 1, got {k}")


def _check_one_k_per_group(activation: TopK | BatchTopK, n_groups: int) -> None:
    if isinstance(activation.k, tuple) and len(activation.k) != n_groups:
        raise ValueError(f"{activation.name} has k for {len(activation.k)} groups, the wiring has {n_groups}")
