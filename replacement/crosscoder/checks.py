"""Checks of the values that users give; every refusal says what was expected and what was given."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = 1e18
"""Largest magnitude of weights, thresholds and activations: the squares of larger ones do not fit float32."""


def whole_number(name: str, value: Any, *, least: int = 0) -> int:
    """The value as an int.

    Raises:
        ValueError: no whole number (True and False are none), one below `least`, or one that does not fit 64 bits.
    """
    if not _is_a(numbers.Integral, value):
        raise ValueError(f"{name} must be a whole number, got {value!r:.50}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value!r:.50}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2^63, got {value!r:.50}")
    return int(value)


def number(name: str, value: Any, *, positive: bool = False, largest: float = LARGEST) -> float:
    """The value as a float.

    Raises:
        ValueError: no number, NaN, below 0 (with `positive`, not above 0), or above `largest`.
    """
    if not _is_a(numbers.Real, value):
        raise ValueError(f"{name} must be a number, got {value!r:.50}")
    if not value >= 0 or (positive and value == 0):
        raise ValueError(f"{name} must be {'above 0' if positive else '0 or more'}, got {value!r:.50}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest:g}, got {value!r:.50}")
    return float(value)


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def float_dtype(name: str, dtype: object) -> None:
    """Refuse dtypes that crosscoders do not compute in, such as integers and 8-bit floats, with a `ValueError`."""
    if dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(known).removeprefix("torch.") for known in FLOAT_DTYPES)
        raise ValueError(f"{name} must be one of {expected}; got {str(dtype).removeprefix('torch.')}")


def finite_values(name: str, tensor: Tensor) -> None:
    """Refuse, with a `ValueError`, a tensor of another kind than floats, with NaN, infinity or a magnitude above `LARGEST`."""
    float_dtype(f"the dtype of {name}", tensor.dtype)
    if not tensor.numel():
        return
    largest = float(torch.linalg.vector_norm(tensor.detach(), torch.inf))
    if not largest < torch.inf:
        raise ValueError(f"{name} holds NaN or infinite values")
    if largest > LARGEST:
        raise ValueError(f"{name} holds values up to {largest:.3g}: expected magnitudes of at most {LARGEST:g}")


def indices(name: str, column_S: Tensor, bound: int) -> None:
    """Refuse, with a `ValueError`, a column that is not a 1-D tensor of int64 numbers from 0 to `bound - 1`."""
    if not isinstance(column_S, Tensor) or column_S.dtype != torch.int64 or column_S.dim() != 1:
        given = f"{column_S.dtype} {list(column_S.shape)}" if isinstance(column_S, Tensor) else f"{column_S!r:.50}"
        raise ValueError(f"{name} must be a 1-D tensor of torch.int64, got {given}")
    if len(column_S) and not 0 <= int(column_S.min()) <= int(column_S.max()) < bound:
        raise ValueError(f"{name} must lie in 0 to {bound - 1}, got {int(column_S.min())} to {int(column_S.max())}")
