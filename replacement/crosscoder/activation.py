"""Activation functions: which features are active, and with what value.

Each function works in two steps, so that dense pre-activations `[B, F]` never need a gradient: `select` picks (row, index)
pairs, `values` maps the S selected pre-activations to activations, differentiably. The objects are plain frozen values; what
is learned or measured (thresholds) lives in the crosscoder as a tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.number_checks import number

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
