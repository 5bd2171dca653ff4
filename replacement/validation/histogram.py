"""Mean, maximum and quantiles of a stream of non-negative values, in constant memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOWEST, _HIGHEST = 1e-18, 1e6
_BINS_PER_DECADE = 512
N_BINS = round(_BINS_PER_DECADE * math.log10(_HIGHEST / _LOWEST))

RELATIVE_ERROR = 10 ** (1 / _BINS_PER_DECADE) - 1
"""Largest relative error of a quantile between 1e-18 and 1e6: the width of one bin, under half a per cent."""


class LogHistogram:
    """Counts values in bins of equal width of their logarithm; mean and maximum are exact.

    Values below 1e-18 (a KL that rounding made 0 or negative) share the lowest bin.
    """

    def __init__(self) -> None:
        self.count = 0
        self.maximum = -math.inf
        self._sum = 0.0
        self._counts = torch.zeros(N_BINS, dtype=torch.int64)

    def update(self, values_N: Tensor) -> None:
        """Add values of any shape."""
        values_N = values_N.detach().double().flatten().cpu()
        if not len(values_N):
            return
        if bool(values_N.isnan().any()):
            raise ValueError("met NaN: the model or its replacement gives logits that are not finite on this data")
        self.count += len(values_N)
        self._sum += float(values_N.sum())
        self.maximum = max(self.maximum, float(values_N.max()))
        place_N = (values_N.clamp(_LOWEST, _HIGHEST) / _LOWEST).log10() * _BINS_PER_DECADE
        self._counts += torch.bincount(place_N.long().clamp(max=N_BINS - 1), minlength=N_BINS)

    @property
    def mean(self) -> float:
        """Exact mean.

        Raises:
            ValueError: no values.
        """
        self._check()
        return self._sum / self.count

    def quantile(self, share: float) -> float:
        """Smallest value such that at least this share of all values is no larger, to within its bin.

        Raises:
            ValueError: no values, or a share outside 0 to 1.
        """
        self._check()
        if not 0 <= share <= 1:
            raise ValueError(f"expected a share between 0 and 1, got {share}")
        rank = max(1, math.ceil(share * self.count))
        place = int(torch.searchsorted(self._counts.cumsum(0), rank))
        middle = _LOWEST * 10 ** ((place + 0.5) / _BINS_PER_DECADE)
        return min(middle if place else 0.0, max(self.maximum, 0.0))

    def _check(self) -> None:
        if not self.count:
            raise ValueError("a distribution needs at least one value, got none")
