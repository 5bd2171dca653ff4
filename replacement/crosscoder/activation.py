"""Activation functions: which features are active, and with what value.

Each function works in two steps, so that dense pre-activations `[B, F]` never need a gradient: `select` picks (row, index)
pairs, `values` maps the S selected pre-activations to activations, differentiably. The objects are plain frozen values; what
is learned or measured (thresholds) lives in the crosscoder as a tensor. K: features kept per row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.number_checks import number, whole_number

Matrix: TypeAlias = Float[Tensor, "B F"]
Values: TypeAlias = Float[Tensor, " S"]


class Selection(NamedTuple):
    """Active features of one group, sorted by row, then index."""

    rows: Int[Tensor, " S"]
    """Row of the pre-activations, `[S]`."""
    indices: Int[Tensor, " S"]
    """Feature index in the group, `[S]`."""


@dataclass(frozen=True)
class Activation(ABC):
    """Interface of the activation functions; `name` is their name in checkpoints.

    Keyword-only parameters are what published crosscoders do besides. Their defaults leave no trace in checkpoints.
    """

    affine: bool = field(default=False, kw_only=True)
    """Whether activations of active features are scaled and shifted at last: `f(h) * post_scale + post_offset` where `f(h)` is
    not 0, with one number each per feature (buffers of the crosscoder)."""

    name: ClassVar[str]
    learns_threshold: ClassVar[bool] = False
    """Whether the threshold is a parameter, trained by gradient."""
    chooses_by_row: ClassVar[bool] = False
    """Whether `select` looks at each row alone, so that rows may be given to it in chunks."""
    chooses_over_groups: ClassVar[bool] = False
    """Whether features of all groups compete: `select` then names candidates, and `JointTopK.keep` chooses among them."""

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """Threshold to keep in the crosscoder: `[G, F]`, `[G, 1]`, or None for functions without one."""
        return None

    def initial_buffers(self, n_groups: int, n_features: int) -> dict[str, Tensor | None]:
        """Initial values of further tensors `[G, F]` to keep in the crosscoder, by name; None for those it does without."""
        made = torch.ones(n_groups, n_features) if self.affine else None
        return {
            "score_factor": None,
            "post_scale": made,
            "post_offset": None if made is None else torch.zeros_like(made),
        }

    @abstractmethod
    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Choose the active features of one group.

        Args:
            pre_BF: pre-activations, or scores: pre-activations times a factor; no gradient flows through the choice.
            threshold_F: the group's row of the threshold, `[F]` or `[1]`.
            training: choose for a training step (see each class).
            group: number of the group, where groups keep different numbers of features.
        """

    def values(self, pre_S: Values, threshold_S: Tensor | None) -> Values:
        """Activations of selected features from their pre-activations, differentiable in both arguments: `max(h, 0)`."""
        return torch.relu(pre_S)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value: the name and the parameters, without keyword-only ones at their default."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self) if not entry.kw_only}
        return {"name": self.name, **plain, **self._options()}

    @property
    def is_trainable(self) -> bool:
        """Whether `replacement train` can train it: what published crosscoders do besides is read alone."""
        return not (self._options() or self.chooses_over_groups)

    def _options(self) -> dict[str, bool]:
        """Keyword-only parameters that are not at their default."""
        given = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self) if entry.kw_only}
        return {name: value for name, (value, default) in given.items() if value != default}

    def check_fits(self, n_groups: int, n_features: int) -> None:  # noqa: B027 - nothing to check for most
        """Check that the function can act on this many groups of `n_features` features each.

        Raises:
            ValueError: more features are kept than a group has, or k is given for another number of groups.
        """


@dataclass(frozen=True)
class ReLU(Activation):
    """`max(h, 0)`."""

    name: ClassVar[str] = "relu"
    chooses_by_row: ClassVar[bool] = True

    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Features with a positive pre-activation."""
        return Selection(*torch.nonzero(pre_BF > 0, as_tuple=True))


@dataclass(frozen=True)
class JumpReLU(Activation):
    """`h * 1[h > theta]` with a learned threshold per feature (Rajamanoharan et al. 2024, "Jumping Ahead").

    The step has no gradient, so theta is trained with the straight-through estimate
    `d a / d theta = -(theta / bandwidth) * 1[|h - theta| < bandwidth / 2]`. Training therefore also selects the
    features just below their threshold: their activation is 0, their gradient is not.

    Raises:
        ValueError: a threshold or bandwidth that is no number, negative (the bandwidth also 0) or above 1e18.
    """

    name: ClassVar[str] = "jumprelu"
    learns_threshold: ClassVar[bool] = True
    chooses_by_row: ClassVar[bool] = True

    threshold: float = 0.03
    """Starting threshold, in units of the pre-activation."""
    bandwidth: float = 0.03
    """Width of the window around the threshold that trains it, in units of the pre-activation."""

    def __post_init__(self) -> None:
        number("the jumprelu threshold", self.threshold)
        number("the jumprelu bandwidth", self.bandwidth, positive=True)

    def initial_threshold(self, n_groups: int, n_features: int) -> Tensor | None:
        """`[G, F]`, every entry `threshold`."""
        return torch.full((n_groups, n_features), float(self.threshold))

    def select(
        self, pre_BF: Matrix, threshold_F: Tensor | None, *, training: bool = False, group: int = 0
    ) -> Selection:
        """Features above their threshold; in training also those inside the window below it."""
        assert threshold_F is not None
        floor_F = threshold_F - self.bandwidth / 2 if training else threshold_F
        return Selection(*torch.nonzero(pre_BF > floor_F, as_tuple=True))

    def values(self, pre_S: Values, threshold_S: Tensor | None) -> Values:
        """`h * 1[h > theta]`, with the straight-through gradient to theta."""
        assert threshold_S is not None
        return _Jump.apply(pre_S, threshold_S, self.bandwidth)


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


def activation_from_dict(value: Mapping[str, Any]) -> Activation:
    """Read what `Activation.to_dict` wrote.

    Raises:
        ValueError: unknown name, or parameters the function does not have.
    """
    kinds: dict[str, type[Activation]] = {kind.name: kind for kind in (ReLU, JumpReLU, TopK, BatchTopK, JointTopK)}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or value["name"] not in kinds:
        name = value.get("name") if isinstance(value, Mapping) else value
        raise ValueError(f"unknown activation {name!r:.50}: expected one of {', '.join(kinds)}")
    parameters = {name: given for name, given in value.items() if name != "name"}
    kind = kinds[value["name"]]
    expected = [field.name for field in fields(kind)]
    if set(parameters) - set(expected) or ("k" in expected and "k" not in parameters):
        raise ValueError(f"activation {kind.name} has the parameters {expected}, got {sorted(parameters)}")
    for entry in fields(kind):
        if entry.kw_only and not isinstance(parameters.get(entry.name, False), bool):
            raise ValueError(f"{entry.name} of {kind.name} must be true or false, got {parameters[entry.name]!r:.50}")
    if isinstance(parameters.get("k"), list):  # JSON has no tuples
        parameters["k"] = tuple(parameters["k"])
    return kind(**parameters)


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
