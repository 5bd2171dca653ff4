"""The identity check: a value that is divided into parts must equal their sum, or no result is returned.

Everything this package calls exact is a sum: `value = sum of incoming edges + bias` for a node of a graph, `edge = direct +
heads` for a split over attention heads, `score = sum over pairs of nodes` for an attention score. Rounding leaves a small gap.
A larger one means that something is missing or counted twice, and raises `IdentityError`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CANCELLATION = 0.01
"""A gap is relative to the value, or to this share of the summed magnitudes where the value is a small remainder of large
terms that cancel."""
ROUNDINGS = 8
"""Roundings of the summed magnitudes allowed per layer. Largest seen: 0.06 in the demo, and 0.5 in tiny models of every
architecture whose crosscoders keep every positive feature, however small (float32 and float64, with and without skips,
attention crosscoders, and a first token 1,000 times larger than the others); random models of 24 layers or a width of 1,536
stay below 0.02. So the tolerance is 16 times what was seen, and 0.3 % in float32 with 30 layers."""


class IdentityError(ValueError):
    """The parts of a value do not add up to it.

    Attributes:
        node: what the value belongs to, such as `feature 2/345 at 7`.
        expected: the value.
        found: the sum of its parts.
        gap: their difference, relative to the value or to 1 % of the parts' summed magnitudes.
        tolerance: the largest relative gap that rounding explains.
    """

    def __init__(self, node: str, *, expected: float, found: float, gap: float, tolerance: float) -> None:
        self.node, self.expected, self.found, self.gap, self.tolerance = node, expected, found, gap, tolerance
        if np.isfinite(gap):
            message = (
                f"the parts of {node} sum to {found:.6g}, but its value is {expected:.6g}: a relative gap of {gap:.1e}, "
                f"where rounding explains {tolerance:.1e}"
            )
        else:
            message = f"NaN or infinity at {node}: the model's activations on this prompt are not finite"
        super().__init__(message)


def identity_tolerance(dtype: torch.dtype, n_layers: int) -> float:
    """Largest relative gap that rounding explains: 3.8e-4 for float32 and 4 layers, 5.3e-12 for float64 and 30.

    Args:
        dtype: the precision the values and their parts were computed or stored in, whichever is coarser.
        n_layers: layers of the model.
    """
    return torch.finfo(dtype).eps * ROUNDINGS * n_layers / CANCELLATION


def check_identity(
    values: Tensor | np.ndarray | float,
    sums: Tensor | np.ndarray | float,
    magnitudes: Tensor | np.ndarray | float,
    *,
    dtype: torch.dtype,
    n_layers: int,
    name: Callable[[int], str],
) -> float:
    """Compare values with the sums of their parts; all three are numbers, or arrays of one shape.

    Args:
        values: what the parts should sum to.
        sums: what they sum to.
        magnitudes: sums of the absolute values of what was added up. Where a part is an inner product whose terms cancel, their
            size is to be added (see `circuits.attribution.readers.reading_sizes`), because rounding is relative to it.
        dtype: the precision the values and their parts were computed or stored in, whichever is coarser.
        n_layers: layers of the model.
        name: text for the value with this (flat) number, to be used in the error.

    Returns:
        The largest relative gap, `|value - sum| / max(|value|, CANCELLATION * magnitude)`; 0 for empty arrays.

    Raises:
        IdentityError: the largest gap is more than rounding explains, or a number is NaN or infinite.
    """
    value_N, sum_N, magnitude_N = (torch.as_tensor(numbers).flatten() for numbers in (values, sums, magnitudes))
    if not len(value_N):
        return 0.0
    scale_N = torch.maximum(value_N.abs(), CANCELLATION * magnitude_N).clamp(min=1e-30)
    gap_N = (value_N - sum_N).abs() / scale_N
    gap, tolerance = float(gap_N.max()), identity_tolerance(dtype, n_layers)
    if not gap <= tolerance:
        worst = int(gap_N.argmax())  # max and argmax find NaN before any number
        expected, found = float(value_N[worst]), float(sum_N[worst])
        raise IdentityError(name(worst), expected=expected, found=found, gap=gap, tolerance=tolerance)
    return gap
