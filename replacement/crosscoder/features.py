"""Active features of a batch, as a sparse table.

A row is a token position when a prompt is encoded, and any token when training. The table is columnar and sorted by
(group, row, index), so one group is a slice and its rows are CSR ranges; dense activations `[B, G, F]` never exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.crosscoder.checks import finite_values, float_dtype, indices

_COLUMNS = ("group", "row", "index", "activation")


@dataclass(frozen=True, eq=False)
class Features:
    """Active features, sorted by (group, row, index).

    Build one with `Features.from_unsorted` unless the columns are known to be sorted.

    Raises:
        ValueError: columns that are not 1-D, of one length, and of int64 numbers (the activations: of floats).
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
        float_dtype("the column activation of Features", self.activation.dtype)
        for name in ("group", "row", "index"):
            if (dtype := getattr(self, name).dtype) != torch.int64:
                raise ValueError(f"the column {name} of Features must hold torch.int64, got {dtype}")
        shapes = {name: list(getattr(self, name).shape) for name in _COLUMNS}
        if any(shape != [len(self)] for shape in shapes.values()):
            raise ValueError(f"the columns of Features must be 1-D and have one length, got {shapes}")

    def __len__(self) -> int:
        return len(self.activation)

    def __repr__(self) -> str:
        return f"Features({len(self)} active in {self.n_rows} rows, {self.n_groups} groups of {self.n_features})"

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
            ValueError: a column of another kind or length, an entry out of range, an activation that is not finite or above
                1e18, or the same (group, row, index) twice.
        """
        for name, column_S, bound in (("group", group, n_groups), ("row", row, n_rows), ("index", index, n_features)):
            indices(name, column_S, bound)
        finite_values("activation", activation)
        features = cls(group, row, index, activation, n_rows, n_groups, n_features)
        key_S, order_S = ((group * n_rows + row) * n_features + index).sort()
        if bool((key_S[1:] == key_S[:-1]).any()):
            raise ValueError("the same (group, row, index) is given twice")
        return features.select(order_S)

    @classmethod
    def from_dense(cls, acts_GBF: Float[Tensor, "G B F"]) -> Features:
        """The non-zero entries of dense activations; meant for tests and small cases.

        Raises:
            ValueError: activations of another shape, or that are not finite.
        """
        if acts_GBF.dim() != 3:
            raise ValueError(f"expected dense activations [groups, rows, features], got {list(acts_GBF.shape)}")
        finite_values("the dense activations", acts_GBF)
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
        return first._with({name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS})

    def of(self, group: int) -> Features:
        """The features of one group (a view).

        Raises:
            ValueError: no such group.
        """
        if group not in range(self.n_groups):
            raise ValueError(f"there is no group {group!r:.50}: these features have groups 0 to {self.n_groups - 1}")
        begin, end = torch.searchsorted(self.group, self.group.new_tensor([group, group + 1])).tolist()
        return self.select(slice(begin, end))

    def select(self, chosen: Bool[Tensor, " S"] | Int[Tensor, " _"] | slice) -> Features:
        """The features where a mask `[S]` is true, at places in the table (in a sorted order), or in a slice of it."""
        return self._with({name: getattr(self, name)[chosen] for name in _COLUMNS})

    def of_rows(self, keep: Bool[Tensor, " B"]) -> Features:
        """The features of some rows, as a table of these rows alone."""
        kept = self.select(keep[self.row])
        return replace(kept, row=(keep.cumsum(0) - 1)[kept.row], n_rows=int(keep.sum()))

    def replace_activations(self, activation_S: Float[Tensor, " S"]) -> Features:
        """The same features with other activations, such as leaves for autograd or steered values."""
        return replace(self, activation=activation_S)

    def dense(self, group: int) -> Float[Tensor, "B F"]:
        """Activations of one group as a dense matrix, differentiable."""
        part = self.of(group)
        dense_BF = part.activation.new_zeros(self.n_rows, self.n_features)
        return dense_BF.index_put((part.row, part.index), part.activation)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Features:
        """Convert the activations' dtype and move all columns."""
        columns = {name: getattr(self, name).to(device=device) for name in _COLUMNS}
        return self._with(columns | {"activation": columns["activation"].to(dtype=dtype)})

    def _with(self, columns: dict[str, Tensor]) -> Features:
        return Features(**columns, n_rows=self.n_rows, n_groups=self.n_groups, n_features=self.n_features)
