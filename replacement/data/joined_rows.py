"""Rows of stored token ids: one array, or several one after the other. R rows, T tokens per row, N ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def as_rows(array: np.ndarray, context: int | None, name: str) -> np.ndarray:
    """Rows `[R, T]`: 2-D ids as they are, flat ids `[N]` cut into rows of `context` tokens.

    Raises:
        ValueError: not integers, another number of dimensions, rows of another length, or less than one row.
    """
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected integer token ids, got {array.dtype}")
    if array.ndim == 2:
        if context is not None and array.shape[1] != context:
            raise ValueError(f"{name} holds rows of {array.shape[1]} tokens, expected {context} (the context)")
        return array
    if array.ndim != 1:
        raise ValueError(f"{name}: expected flat ids [N] or rows [R, T], got shape {list(array.shape)}")
    if context is None:
        raise ValueError(f"{name} holds flat ids: give the context, the tokens per row")
    if context < 1:
        raise ValueError(f"{name}: the context must be 1 token or more, got {context}")
    if len(array) < context:
        raise ValueError(f"{name} holds {len(array)} tokens, fewer than one row of {context}")
    n = len(array) // context
    return array[: n * context].reshape(n, context)


class JoinedRows:
    """The rows of several arrays of one width, one array after the other, each row read from where it lies.

    Attributes:
        shape: rows R of all arrays together, tokens per row T.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        """Join arrays `[R, T]`."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), int(parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice | np.ndarray) -> np.ndarray:
        """Rows by a slice or by their numbers, as int64."""
        index_R = np.arange(*which.indices(len(self))) if isinstance(which, slice) else which
        part_R = np.searchsorted(self._ends, index_R, side="right")
        rows_RT = np.empty((len(index_R), self.shape[1]), dtype=np.int64)
        for number in np.unique(part_R):
            mine_R, part = part_R == number, self._parts[number]
            rows_RT[mine_R] = part[index_R[mine_R] - (self._ends[number] - len(part))]
        return rows_RT
