"""The nodes of a circuit: one column per fact, one row per node.

Rows are ordered by kind, and inside a kind by

    tokens      position
    positions   position                  (learned position embeddings; absent in models without them)
    errors      (part, layer, position)
    features    (part, layer, position, index)
    logits      as the targets were named

The table knows nothing of edges, models or token text: a label is whatever text its builder found readable.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import RenderableType

from replacement.console import SHOWN_ROWS, first_rows
from replacement.notebook import repr_html
from replacement.token_texts import visible


class NodeKind(enum.IntEnum):
    """What a node stands for. The numeric order is the order of the kinds in a `NodeTable`."""

    TOKEN = 0
    POSITION = 1
    ERROR = 2
    FEATURE = 3
    LOGIT = 4


class Part(enum.IntEnum):
    """Part of a layer whose output an error or feature is of."""

    MLP = 0
    ATTENTION = 1


# Column name -> dtype; `label` is the only column that is not an array.
COLUMNS: dict[str, np.dtype] = {
    "kind": np.dtype(np.int8),
    "part": np.dtype(np.int8),
    "layer": np.dtype(np.int32),
    "position": np.dtype(np.int32),
    "index": np.dtype(np.int64),
    "activation": np.dtype(np.float32),
    "probability": np.dtype(np.float32),
    "output_weight": np.dtype(np.float64),
    "expanded": np.dtype(np.bool_),
    "value": np.dtype(np.float64),
    "bias": np.dtype(np.float64),
    "inflow": np.dtype(np.float64),
}

_DEFAULTS: dict[str, Any] = {"layer": -1, "index": -1}
_SHOWN_COLUMNS = ("activation", "probability", "output_weight", "value", "bias", "inflow")
_NOT_NEGATIVE = ("position", "output_weight", "inflow", "probability")


@dataclass(frozen=True, eq=False, repr=False)
class NodeTable:
    """N nodes as read-only columns of length N. For an expanded node `value = sum of incoming edges + bias`.

    Raises `ValueError` when a column has the wrong length or dtype, a number is not finite, the rows are out of
    order or not unique, or a token, position or error node claims to be expanded.
    """

    kind: np.ndarray
    """int8, a `NodeKind`."""
    part: np.ndarray
    """int8, a `Part`: whose output an error or feature is of; `Part.MLP` elsewhere."""
    layer: np.ndarray
    """int32. Feature: layer of its group. Error: layer. Token and position: -1. Logit: number of layers."""
    position: np.ndarray
    """int32, place in the prompt, from 0."""
    index: np.ndarray
    """int64. Feature: index in its group. Token and logit: vocabulary id.

    -1 for errors, positions, logit differences.
    """
    activation: np.ndarray
    """float32, activation of a feature; 0 elsewhere."""
    probability: np.ndarray
    """float32, the model's probability of a logit node's token; 0 elsewhere."""
    output_weight: np.ndarray
    """float64, share of the output this node is a root of; the shares of a graph's targets sum to 1; 0 elsewhere."""
    expanded: np.ndarray
    """bool, whether the node's incoming edges were computed."""
    value: np.ndarray
    """float64, the pre-activation or logit that the incoming edges explain; 0 when not expanded."""
    bias: np.ndarray
    """float64, the part of `value` that no node causes (all biases); 0 when not expanded."""
    inflow: np.ndarray
    """float64, sum of |A| over the FULL row, before any threshold or pruning: what a pruned graph lost stays known."""
    label: tuple[str, ...]
    """Readable text of each node; may be empty."""

    def __post_init__(self) -> None:
        n_nodes = len(self.label)
        for name, dtype in COLUMNS.items():
            object.__setattr__(self, name, _column(name, getattr(self, name), dtype, n_nodes))
        _check_kinds(self)
        _check_order(self)

    @classmethod
    def build(cls, *, kind: Any, position: Any, label: Any = None, **columns: Any) -> NodeTable:
        """A table from columns of any numeric dtype; single numbers are repeated and missing columns take their
        default.

        Defaults: `layer` and `index` -1, every other column 0 (`expanded` False), labels empty. Rows must already be in
        table order.
        """
        unknown = sorted(set(columns) - set(COLUMNS))
        if unknown:
            raise ValueError(
                f"NodeTable.build: expected columns among {', '.join(COLUMNS)}, given {', '.join(unknown)}"
            )
        n_nodes = np.shape(kind)[0] if np.ndim(kind) else np.size(position)
        given = {"kind": kind, "position": position, **columns}
        arrays = {}
        for name, dtype in COLUMNS.items():
            column = np.asarray(given.get(name, _DEFAULTS.get(name, 0)))
            arrays[name] = (np.full(n_nodes, column) if column.ndim == 0 else column).astype(dtype)
        return cls(**arrays, label=("",) * n_nodes if label is None else tuple(label))

    def __repr__(self) -> str:
        return f"NodeTable({len(self)} nodes)"

    def __rich__(self) -> RenderableType:
        ids = self.select(np.arange(len(self)) < SHOWN_ROWS).ids()
        rows = (
            (
                *(name, NodeKind(int(self.kind[row])).name.lower(), visible(self.label[row])),
                *(f"{getattr(self, column)[row]:.4g}" for column in _SHOWN_COLUMNS),
            )
            for row, name in enumerate(ids)
        )
        heads = ("node", "kind", "label", *(column.replace("_", " ") for column in _SHOWN_COLUMNS))
        return first_rows(*heads, rows=rows, n_rows=len(self), texts=("kind", "label"))

    _repr_html_ = repr_html

    def __len__(self) -> int:
        return len(self.label)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NodeTable):
            return NotImplemented
        same = (np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)
        return self.label == other.label and all(same)

    def mask(self, *kinds: NodeKind) -> np.ndarray:
        """bool[N], true at the nodes of the given kinds."""
        return np.isin(self.kind, np.array(kinds, dtype=np.int8))

    @cached_property
    def of_attention(self) -> np.ndarray:
        """bool[N], errors and features of attention outputs."""
        return _read_only(self.part == Part.ATTENTION)

    @cached_property
    def is_target(self) -> np.ndarray:
        """bool[N], the roots of the graph: nodes that own a share of the output."""
        return _read_only(self.output_weight > 0)

    @cached_property
    def unexpanded(self) -> np.ndarray:
        """bool[N], features (and targets) whose causes were not computed."""
        return _read_only(self.mask(NodeKind.FEATURE, NodeKind.LOGIT) & ~self.expanded)

    def select(self, mask: np.ndarray) -> NodeTable:
        """The rows where `mask` (bool[N]) is true, unchanged and in order."""
        if mask.shape != (len(self),) or mask.dtype != np.bool_:
            raise ValueError(
                f"NodeTable.select: expected a bool mask of length {len(self)}, given {mask.dtype}{mask.shape}"
            )
        label = tuple(text for text, kept in zip(self.label, mask.tolist(), strict=True) if kept)
        return NodeTable(**{name: getattr(self, name)[mask] for name in COLUMNS}, label=label)

    def ids(self) -> tuple[str, ...]:
        """One unique text id per node, as published graph files write them.

        Feature `{layer}_{index}_{position}`, error `{layer}_-1_{position}` (both of attention: with an `A` in front),
        token `E_{token}_{position}`, position `P_{position}`, logit `{layers + 1}_{token}_{position}`. The first token
        difference at a position is written as a logit with token -1, the second with -2, and so on.
        """
        names = []
        differences: dict[int, int] = {}
        columns = (self.kind, self.of_attention, self.layer, self.position, self.index)
        for kind, of_attention, layer, position, index in zip(*(column.tolist() for column in columns), strict=True):
            if kind == NodeKind.LOGIT and index < 0:
                index = differences[position] = differences.get(position, 0) - 1
            names.append(node_id(kind, layer=layer, position=position, index=index, of_attention=of_attention))
        return tuple(names)


def node_id(kind: int, *, layer: int, position: int, index: int, of_attention: bool = False) -> str:
    """The id of one node, as described at `NodeTable.ids`."""
    if kind == NodeKind.TOKEN:
        return f"E_{index}_{position}"
    if kind == NodeKind.POSITION:
        return f"P_{position}"
    if kind == NodeKind.LOGIT:
        return f"{layer + 1}_{index}_{position}"
    return f"{'A' * of_attention}{layer}_{-1 if kind == NodeKind.ERROR else index}_{position}"


def _column(name: str, column: np.ndarray, dtype: np.dtype, n_nodes: int) -> np.ndarray:
    if not isinstance(column, np.ndarray) or column.dtype != dtype:
        given = getattr(column, "dtype", type(column).__name__)
        raise ValueError(f"NodeTable.{name}: expected an array of {dtype}, given {given}")
    if column.shape != (n_nodes,):
        raise ValueError(f"NodeTable.{name}: expected shape ({n_nodes},) like the labels, given {column.shape}")
    if dtype.kind == "f" and not np.isfinite(column).all():
        raise ValueError(
            f"NodeTable.{name}: expected finite numbers, given NaN or infinity in row {_first(~np.isfinite(column))}"
        )
    return _read_only(column.view())


def _read_only(column: np.ndarray) -> np.ndarray:
    column.flags.writeable = False
    return column


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def _check_kinds(table: NodeTable) -> None:
    sources = table.mask(NodeKind.TOKEN, NodeKind.POSITION, NodeKind.ERROR)
    of_part = table.mask(NodeKind.ERROR, NodeKind.FEATURE)
    checks = {
        ("kind", "values 0 to 4"): table.mask(*NodeKind),
        ("part", "values 0 and 1"): np.isin(table.part, list(Part)),
        **{(name, "values >= 0"): getattr(table, name) >= 0 for name in _NOT_NEGATIVE},
        ("expanded", "only features and logits to be expanded"): ~(sources & table.expanded),
        ("part", "only errors and features to be of attention"): of_part | ~table.of_attention,
    }
    for (name, expected), fits in checks.items():
        if not fits.all():
            row = _first(~fits)
            raise ValueError(f"NodeTable.{name}: expected {expected}, given {getattr(table, name)[row]} in row {row}")


def _check_order(table: NodeTable) -> None:
    """Rows must strictly increase in (kind, attention, layer, position, index); logits only in kind, no two alike."""
    columns = (table.kind, table.part, table.layer, table.position, table.index)
    keys = np.stack([column.astype(np.int64) for column in columns])
    # A token's vocabulary id says nothing about order: two tokens at one position are a mistake whatever their ids.
    keys[4, table.mask(NodeKind.TOKEN, NodeKind.POSITION, NodeKind.ERROR)] = 0
    step = np.diff(keys, axis=1)
    leading = (step != 0).argmax(axis=0)  # first key that changes between neighbours
    change = step[leading, np.arange(step.shape[1])]
    logits = table.kind[1:] == NodeKind.LOGIT
    wrong = np.where(logits, step[0] < 0, change <= 0)
    if wrong.any():
        row = _first(wrong) + 1
        raise ValueError(
            "NodeTable: expected unique rows ordered by kind, then position (tokens, positions), (attention, layer, "
            f"position) (errors) or (part, layer, position, index) (features), given row {row} after row {row - 1}"
        )
    named = table.mask(NodeKind.LOGIT) & (table.index >= 0)
    if len(np.unique(keys[:, named], axis=1).T) != named.sum():
        raise ValueError("NodeTable: expected each logit target once, given a token twice at one position")


assert set(COLUMNS) | {"label"} == {field.name for field in fields(NodeTable)}
