"""Metrics of fidelity on plain tensors, and sums over batches that give the same numbers as one batch of everything."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_LOWEST, _HIGHEST = 1e-18, 1e6
_BINS_PER_DECADE = 512
_N_BINS = round(_BINS_PER_DECADE * math.log10(_HIGHEST / _LOWEST))

RELATIVE_ERROR = 10 ** (1 / _BINS_PER_DECADE) - 1
"""Largest relative error of a quantile between 1e-18 and 1e6: the width of one bin, under half a per cent."""


class ReferenceDistribution:
    """Distributions p over the vocabulary that any number of others are compared with; their logarithms are taken once.

    `KL(p || q) = sum_v p_v log p_v - sum_v p_v z_v + log sum_v exp z_v`, where z are the logits of q.

    Attributes:
        p: probabilities `[*B, V]`.
        log_p: their logarithms.
    """

    def __init__(self, logits: Float[Tensor, "*B V"], *, dtype: torch.dtype = torch.float64) -> None:
        self.log_p = logits.to(dtype).log_softmax(dim=-1)
        self.p = self.log_p.exp()
        self._negative_entropy = _expectation(self.p, self.log_p)

    def kl(self, logits_q: Tensor, log_normaliser: Tensor) -> Tensor:
        """`KL(p || q)` `[*B]` in nats, differentiable in the logits of q.

        A token with logit -inf costs nothing where p rules it out too, and an infinite KL elsewhere.

        Args:
            logits_q: logits `[*B, V]`.
            log_normaliser: `log sum_v exp z_v` `[*B]` of these logits.
        """
        return self._negative_entropy - _expectation(self.p, logits_q) + log_normaliser


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """`sum_v p_v x_v`, in which tokens of probability 0 do not count, even where x is infinite."""
    result = torch.einsum("...v,...v->...", p, values)  # several times faster than (p * x).sum()
    return result if bool(result.isfinite().all()) else torch.where(p > 0, p * values, 0.0).sum(dim=-1)


def kl_divergence(logits_p: Tensor, logits_q: Tensor, *, dtype: torch.dtype = torch.float64) -> Float[Tensor, "*B"]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)` in nats, where p is the original model's next-token distribution.

    Args:
        logits_p: logits `[*B, V]`, or `[V]` to compare every row of q with one distribution.
        logits_q: logits `[*B, V]`; the result is differentiable in them.
        dtype: precision of the computation.

    Raises:
        ValueError: shapes that do not match.
    """
    if logits_p.shape not in (logits_q.shape, logits_q.shape[-1:]):
        raise ValueError(f"expected two tensors of one shape, got {list(logits_p.shape)} and {list(logits_q.shape)}")
    z = logits_q.to(dtype)
    return ReferenceDistribution(logits_p, dtype=dtype).kl(z, z.logsumexp(dim=-1))


class Mean:
    """A mean over batches, in float64; `count` is the number of values added."""

    def __init__(self) -> None:
        self._sum, self.count = 0.0, 0

    def update(self, values: Float[Tensor, "..."]) -> Mean:
        """Add values of any shape; returns itself."""
        self._sum += float(values.double().sum())
        self.count += values.numel()
        return self

    def value(self) -> float | None:
        """The mean of all values added, or None without values."""
        return self._sum / self.count if self.count else None


class ReconstructionError:
    """Fraction of variance unexplained (FVU) and mean cosine of a reconstruction over batches, in float64.

    `FVU = sum_p ||y_p - y_hat_p||^2 / sum_p ||y_p - mean y||^2`: 0 is perfect, 1 is no better than the mean, above 1 is worse.
    The mean is that of all tokens. Sums are taken about the first batch's mean, which keeps the result exact to rounding even
    where the mean is far larger than the variation.

    Attributes:
        error: `sum_p ||y_p - y_hat_p||^2` so far.
        cosine: mean cosine of target and reconstruction.
    """

    def __init__(self) -> None:
        self._n_tokens, self._squares, self.error, self.cosine = 0, 0.0, 0.0, Mean()

    def update(self, target_PD: Float[Tensor, "P D"], reconstruction_PD: Float[Tensor, "P D"]) -> ReconstructionError:
        """Add one batch; returns itself."""
        target_PD, reconstruction_PD = target_PD.double(), reconstruction_PD.to(target_PD.device).double()
        if not len(target_PD):
            return self
        if not self._n_tokens:
            self._shift_D = target_PD.mean(dim=0)
            self._sum_D = torch.zeros_like(self._shift_D)
        centred_PD = target_PD - self._shift_D
        self._n_tokens += len(target_PD)
        self._sum_D += centred_PD.sum(dim=0)
        self._squares += float(centred_PD.square().sum())
        self.error += float((target_PD - reconstruction_PD).square().sum())
        self.cosine.update(functional.cosine_similarity(target_PD, reconstruction_PD, dim=-1))
        return self

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """Mean of the targets of at least one token."""
        return self._shift_D + self._sum_D / self._n_tokens

    @property
    def variance(self) -> float:
        """`sum_p ||y_p - mean y||^2` so far; 0 before the first token."""
        if not self._n_tokens:
            return 0.0
        return max(0.0, self._squares - float(self._sum_D.square().sum()) / self._n_tokens)

    @property
    def unexplained(self) -> float | None:
        """The fraction over all tokens added, or None where the target does not vary."""
        return self.error / self.variance if self.variance > 0 else None


class LogHistogram:
    """Mean, maximum and quantiles of a stream of non-negative values, in constant memory.

    Values are counted in bins of equal width of their logarithm; mean and maximum are exact. Values below 1e-18 (a KL that
    rounding made 0 or negative) share the lowest bin.
    """

    def __init__(self) -> None:
        self.count = 0
        self.maximum = -math.inf
        self._sum = 0.0
        self._counts = torch.zeros(_N_BINS, dtype=torch.int64)

    def update(self, values: Float[Tensor, "..."]) -> None:
        """Add values of any shape.

        Raises:
            ValueError: a value that is NaN.
        """
        values = values.detach().double().flatten().cpu()
        if not len(values):
            return
        if bool(values.isnan().any()):
            raise ValueError("met NaN: the model or its replacement gives logits that are not finite on this data")
        self.count += len(values)
        self._sum += float(values.sum())
        self.maximum = max(self.maximum, float(values.max()))
        bins = ((values.clamp(_LOWEST, _HIGHEST) / _LOWEST).log10() * _BINS_PER_DECADE).long()
        self._counts += torch.bincount(bins.clamp(max=_N_BINS - 1), minlength=_N_BINS)

    @property
    def mean(self) -> float:
        """Exact mean of at least one value."""
        assert self.count, "a distribution needs at least one value"
        return self._sum / self.count

    def quantile(self, share: float) -> float:
        """Smallest value such that at least this share (0 to 1) of all values is no larger, to within its bin."""
        assert self.count, "a distribution needs at least one value"
        rank = max(1, math.ceil(share * self.count))
        place = int(torch.searchsorted(self._counts.cumsum(0), rank))
        middle = _LOWEST * 10 ** ((place + 0.5) / _BINS_PER_DECADE)
        return min(middle if place else 0.0, max(self.maximum, 0.0))
