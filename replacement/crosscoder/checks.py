"""Checks of the tensors that users give; every refusal says what was expected and what was given."""

from __future__ import annotations

import torch
from torch import Tensor

from replacement.number_checks import LARGEST

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
