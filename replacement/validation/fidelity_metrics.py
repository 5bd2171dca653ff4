"""Fidelity metrics on plain tensors. B rows, T tokens per row, D width, V vocabulary.

Each metric is a ratio of sums. The functions take one batch; the accumulators take many and give the same numbers, for
they keep the sums and divide once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder.features import Features


def fraction_of_variance_unexplained(target_BD: Float[Tensor, "B D"], reconstruction_BD: Tensor) -> float:
    """`sum_b ||y - y_hat||^2 / sum_b ||y - mean_b y||^2`: 0 is perfect, 1 is no better than the mean, above 1 is worse.

    Raises:
        ValueError: different shapes, no rows, or a target that does not vary.
    """
    return VarianceUnexplained().update(target_BD, reconstruction_BD).value()


def kl_divergence(logits_p: Float[Tensor, "*B V"], logits_q: Tensor) -> Float[Tensor, "*B"]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)` of every token, in nats; p is the original model.

    Raises:
        ValueError: different shapes.
    """
    _check_same(logits_p, logits_q)
    log_p, log_q = logits_p.log_softmax(dim=-1), logits_q.log_softmax(dim=-1)
    # Logits of -inf rule a token out: it contributes 0 where p excludes it, not NaN.
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), torch.zeros_like(log_p))
    return terms.sum(dim=-1)


def next_token_loss(logits_BTV: Float[Tensor, "B T V"], tokens_BT: Tensor) -> Float[Tensor, "B T_minus_1"]:
    """`-log p(next token)` at every position that has a next token, in nats.

    Raises:
        ValueError: logits of other rows than the tokens.
    """
    if logits_BTV.shape[:2] != tokens_BT.shape:
        raise ValueError(f"expected logits of {list(tokens_BT.shape)} tokens, got {list(logits_BTV.shape[:2])}")
    log_p = logits_BTV[:, :-1].log_softmax(dim=-1)
    return -log_p.gather(2, tokens_BT[:, 1:, None].to(log_p.device))[..., 0]


class Agreement(NamedTuple):
    """How often two models agree on the most likely token."""

    agreed: int
    """Tokens where both have the same most likely token, among those counted."""
    counted: int
    """Tokens where the first model is confident enough."""

    @property
    def rate(self) -> float:
        """`agreed / counted`; NaN when nothing was counted."""
        return self.agreed / self.counted if self.counted else float("nan")


def top1_agreement(logits_p: Float[Tensor, "*B V"], logits_q: Tensor, *, min_probability: float = 0.5) -> Agreement:
    """Agreement on the most likely token, among tokens to which model p gives at least `min_probability`.

    Where p itself hesitates between tokens, disagreement says little; 0 counts every token.

    Raises:
        ValueError: different shapes, or a probability outside 0 to 1.
    """
    _check_same(logits_p, logits_q)
    if not 0 <= min_probability <= 1:
        raise ValueError(f"min_probability must lie between 0 and 1, got {min_probability}")
    best_p = logits_p.softmax(dim=-1).max(dim=-1)
    confident = best_p.values >= min_probability
    agreed = (best_p.indices == logits_q.argmax(dim=-1)) & confident
    return Agreement(int(agreed.sum()), int(confident.sum()))


def l0(features: Features) -> Float[Tensor, " G"]:
    """Active features per row, averaged over rows, for each group `[G]`.

    Raises:
        ValueError: no rows.
    """
    if not features.n_rows:
        raise ValueError("l0 needs at least one row, got features of 0 rows")
    counts_G = torch.bincount(features.group[features.activation != 0], minlength=features.n_groups)
    return counts_G / features.n_rows


class VarianceUnexplained:
    """Accumulates the fraction of variance unexplained over batches, in fp64.

    The variance is about the mean over all rows seen. Sums are taken about the first batch's mean, which keeps them
    small, and the result exact to rounding even where the mean is far larger than the variation.
    """

    def __init__(self) -> None:
        self._shift_D: Tensor | None = None
        self._n_rows = 0
        self._error = 0.0

    def update(self, target_BD: Float[Tensor, "B D"], reconstruction_BD: Tensor) -> VarianceUnexplained:
        """Add one batch; returns itself.

        Raises:
            ValueError: different shapes, or a width other than before.
        """
        _check_same(target_BD, reconstruction_BD)
        if not len(target_BD):
            return self
        target_BD, reconstruction_BD = target_BD.double(), reconstruction_BD.double()
        if self._shift_D is None:
            self._shift_D = target_BD.mean(dim=0)
            self._sum_D = torch.zeros_like(self._shift_D)
            self._squares = 0.0
        if len(self._shift_D) != target_BD.shape[1]:
            raise ValueError(f"expected width {len(self._shift_D)} as before, got {target_BD.shape[1]}")
        centred_BD = target_BD - self._shift_D
        self._n_rows += len(target_BD)
        self._sum_D += centred_BD.sum(dim=0)
        self._squares += float(centred_BD.square().sum())
        self._error += float((target_BD - reconstruction_BD).square().sum())
        return self

    @property
    def error(self) -> float:
        """`sum_b ||y - y_hat||^2` so far."""
        return self._error

    @property
    def variance(self) -> float:
        """`sum_b ||y - mean_b y||^2` so far; 0 before the first row."""
        if self._shift_D is None:
            return 0.0
        return max(0.0, self._squares - float(self._sum_D.square().sum()) / self._n_rows)

    def value(self) -> float:
        """The fraction over everything seen.

        Raises:
            ValueError: no rows were seen, or the target does not vary.
        """
        if self._shift_D is None:
            raise ValueError("the fraction of variance unexplained needs at least one row, got none")
        if not self.variance > 0:
            raise ValueError("the target does not vary over the rows: its unexplained variance is not defined")
        return self._error / self.variance


class Mean:
    """Accumulates a mean over tokens, in fp64; `count` is the number of values seen."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def update(self, values: Float[Tensor, "..."]) -> Mean:
        """Add values of any shape; returns itself."""
        self._sum += float(values.double().sum())
        self.count += values.numel()
        return self

    def value(self) -> float:
        """The mean of everything seen.

        Raises:
            ValueError: nothing was seen.
        """
        if not self.count:
            raise ValueError("the mean needs at least one value, got none")
        return self._sum / self.count


def _check_same(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"expected two tensors of one shape, got {list(first.shape)} and {list(second.shape)}")
