"""Sparse active features. S active features, B rows, F features per group, G groups.

A row is a token position when a prompt is encoded, and any token when training. The table is columnar and sorted by
(group, row, index), so one group is a slice and its rows are CSR ranges; no dense `[B, G, F]` exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Active features, sorted by (group, row, index).

    Build one with `Features.from_unsorted` unless the columns are known to be sorted.

    Raises:
        ValueError: columns of different lengths.
    """

    group: Int[Tensor, " S"]
    """Feature group, `[S]` int64."""
    row: Int[Tensor, " S"]
    """Row (token position of a prompt), `[S]` int64."""
    index: Int[Tensor, " S"]
    """Feature index in its group, `[S]` int64."""
    activation: Float[Tensor, " S"]
    """Activation, `[S]`."""
    n_rows: int
    """Number of rows B, active or not."""
    n_groups: int
    """Number of groups G."""
    n_features: int
    """Features per group F."""

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("group", "row", "index", "activation")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of Features must have one length, got {lengths}")

    def __len__(self) -> int:
        return len(self.activation)

    @classmethod
    def empty(cls, *, n_rows: int, n_groups: int, n_features: int, dtype: torch.dtype = torch.float32) -> Features:
        """No active features."""
        column_S = torch.empty(0, dtype=torch.int64)
        return cls(column_S, column_S, column_S, torch.empty(0, dtype=dtype), n_rows, n_groups, n_features)

    @classmethod
    def from_unsorted(
        cls,
        group: Int[Tensor, " S"],
        row: Int[Tensor, " S"],
        index: Int[Tensor, " S"],
        activation: Float[Tensor, " S"],
        *,
        n_rows: int,
        n_groups: int,
        n_features: int,
    ) -> Features:
        """Check and sort the columns.

        Raises:
            ValueError: an entry out of range, or the same (group, row, index) twice.
        """
        for name, column_S, bound in (("group", group, n_groups), ("row", row, n_rows), ("index", index, n_features)):
            if len(column_S) and not 0 <= int(column_S.min()) <= int(column_S.max()) < bound:
                given = f"{int(column_S.min())} to {int(column_S.max())}"
                raise ValueError(f"{name} must lie in 0 to {bound - 1}, got {given}")
        key_S, order_S = ((group * n_rows + row) * n_features + index).sort()
        if bool((key_S[1:] == key_S[:-1]).any()):
            raise ValueError("the same (group, row, index) is given twice")
        return cls(group[order_S], row[order_S], index[order_S], activation[order_S], n_rows, n_groups, n_features)

    @classmethod
    def from_dense(cls, acts_GBF: Float[Tensor, "G B F"]) -> Features:
        """The non-zero entries of dense activations; meant for tests and small cases."""
        group, row, index = torch.nonzero(acts_GBF, as_tuple=True)
        n_groups, n_rows, n_features = acts_GBF.shape
        return cls(group, row, index, acts_GBF[group, row, index], n_rows, n_groups, n_features)

    @classmethod
    def concatenate(cls, parts: Sequence[Features]) -> Features:
        """Join features of ascending, distinct groups over the same rows, such as those of `encode_group`.

        Raises:
            ValueError: nothing to join, different sizes, or groups out of order.
        """
        if not parts:
            raise ValueError("nothing to concatenate: expected at least one Features")
        if len({(part.n_rows, part.n_groups, part.n_features) for part in parts}) > 1:
            raise ValueError("can only concatenate Features with the same n_rows, n_groups and n_features")
        first = parts[0]
        ends = [(int(part.group[0]), int(part.group[-1])) for part in parts if len(part)]
        if any(last >= first_of_next for (_, last), (first_of_next, _) in itertools.pairwise(ends)):
            raise ValueError("can only concatenate Features of distinct groups in ascending order")
        return replace(
            first,
            group=torch.cat([part.group for part in parts]),
            row=torch.cat([part.row for part in parts]),
            index=torch.cat([part.index for part in parts]),
            activation=torch.cat([part.activation for part in parts]),
        )

    def of(self, group: int) -> Features:
        """The features of one group (a view)."""
        begin, end = torch.searchsorted(self.group, self.group.new_tensor([group, group + 1])).tolist()
        return self.select(slice(begin, end))

    def select(self, chosen: Bool[Tensor, " S"] | slice) -> Features:
        """The features where a mask `[S]` is true, or a slice of the table."""
        return replace(
            self,
            group=self.group[chosen],
            row=self.row[chosen],
            index=self.index[chosen],
            activation=self.activation[chosen],
        )

    def replace_activations(self, activation_S: Float[Tensor, " S"]) -> Features:
        """The same features with other activations, such as leaves for autograd or steered values."""
        return replace(self, activation=activation_S)

    def dense(self, group: int) -> Float[Tensor, "B F"]:
        """Activations of one group as a dense matrix, differentiable."""
        part = self.of(group)
        dense_BF = part.activation.new_zeros(self.n_rows, self.n_features)
        return dense_BF.index_put((part.row, part.index), part.activation)

    def row_offsets(self, group: int) -> Int[Tensor, " B_plus_1"]:
        """CSR offsets `[B + 1]`: the features of row b in `of(group)` are `offsets[b]` to `offsets[b + 1]`."""
        row_S = self.of(group).row.contiguous()
        return torch.searchsorted(row_S, torch.arange(self.n_rows + 1, device=row_S.device))

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Features:
        """Convert the activations' dtype and move all columns."""
        return replace(
            self,
            group=self.group.to(device=device),
            row=self.row.to(device=device),
            index=self.index.to(device=device),
            activation=self.activation.to(dtype=dtype, device=device),
        )
