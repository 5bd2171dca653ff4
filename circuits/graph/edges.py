"""Edges of a circuit as compressed sparse rows: row t holds what flows INTO node t."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.nodes import NodeTable

COLUMNS: dict[str, np.dtype] = {
    "indptr": np.dtype(np.int64),
    "source": np.dtype(np.int32),
    "weight": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """The complete rows of some nodes; attribution hands these to `Edges.from_blocks`."""

    node: np.ndarray
    """int64[n], node of each row; any order."""
    counts: np.ndarray
    """int64[n], number of edges in each row."""
    source: np.ndarray
    """int32[E'], the rows' sources one row after the other, rising inside each row."""
    weight: np.ndarray
    """float32[E'] or float64[E']."""


@dataclass(frozen=True, eq=False, repr=False)
class Edges:
    """A[target, source] for E edges among N nodes; sources rise inside a row.

    Raises `ValueError` for a wrong dtype or length, a source outside the table, an edge given twice, or a weight
    that is not finite.
    """

    indptr: np.ndarray
    """int64[N + 1]: the edges into node t are `indptr[t]:indptr[t + 1]`."""
    source: np.ndarray
    """int32[E], node the edge comes from."""
    weight: np.ndarray
    """float32[E], signed direct effect of the source on the target's pre-activation or logit."""

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            column = getattr(self, name)
            if not isinstance(column, np.ndarray) or column.dtype != dtype or column.ndim != 1:
                given = f"{column.dtype}{column.shape}" if isinstance(column, np.ndarray) else type(column).__name__
                raise ValueError(f"Edges.{name}: expected a 1-D array of {dtype}, given {given}")
            column = column.view()
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        _check_rows(self)

    @classmethod
    def from_coo(cls, target: np.ndarray, source: np.ndarray, weight: np.ndarray, *, n_nodes: int) -> Edges:
        """Edges from three arrays of length E in any order.

        Zero weights are kept: leave them out if they mean nothing.
        """
        target, source, weight = np.asarray(target), np.asarray(source), np.asarray(weight)
        if not target.shape == source.shape == weight.shape or target.ndim != 1:
            raise ValueError(
                "Edges.from_coo: expected three 1-D arrays of one length, given "
                f"{target.shape}, {source.shape} and {weight.shape}"
            )
        outside = (target < 0) | (target >= n_nodes)
        if outside.any():
            raise ValueError(f"Edges.from_coo: expected targets in 0..{n_nodes - 1}, given {target[outside][0]}")
        order = np.lexsort((source, target))
        indptr = np.searchsorted(target[order], np.arange(n_nodes + 1)).astype(np.int64)
        return cls(indptr, source[order].astype(np.int32), weight[order].astype(np.float32))

    @classmethod
    def from_blocks(cls, blocks: list[RowBlock], *, n_nodes: int, number: np.ndarray | None = None) -> Edges:
        """Edges from blocks of rows in any order, copied row by row without sorting.

        The list is emptied while the rows are copied, so that a block's memory can be freed before the next is copied.

        Args:
            blocks: each node has at most one row in all of them.
            n_nodes: number of nodes of the result, N.
            number: int[nodes of the blocks], the node of the result each node becomes; it rises over the nodes in use. By
                default nodes keep their numbers.

        Raises:
            ValueError: a node outside the table, or with two rows.
        """
        nodes = [block.node if number is None else number[block.node] for block in blocks]
        node, lengths = np.concatenate([[], *nodes]).astype(np.int64), np.zeros(n_nodes, dtype=np.int64)
        outside = (node < 0) | (node >= n_nodes)
        if outside.any():
            raise ValueError(f"Edges.from_blocks: expected rows of nodes in 0..{n_nodes - 1}, given {node[outside][0]}")
        twice = np.flatnonzero(np.bincount(node) > 1)
        if len(twice):
            raise ValueError(f"Edges.from_blocks: expected at most one row for each node, given node {twice[0]} twice")
        lengths[node] = np.concatenate([[], *(block.counts for block in blocks)])
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source, weight = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=np.float32)
        renumber = None if number is None else number.astype(np.int32)
        while blocks:
            block = blocks.pop()
            starts, ends = indptr[nodes.pop()], np.cumsum(block.counts)
            for start, end, count in zip(starts.tolist(), ends.tolist(), block.counts.tolist(), strict=True):
                row, sources = slice(start, start + count), block.source[end - count : end]
                source[row] = sources if renumber is None else renumber[sources]
                weight[row] = block.weight[end - count : end]
        return cls(indptr, source, weight)

    def __repr__(self) -> str:
        return f"Edges({len(self)} edges among {self.n_nodes} nodes)"

    def __len__(self) -> int:
        return len(self.source)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edges):
            return NotImplemented
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in COLUMNS)

    @property
    def n_nodes(self) -> int:
        """N."""
        return len(self.indptr) - 1

    @property
    def target(self) -> np.ndarray:
        """int32[E], node each edge goes to."""
        return np.repeat(np.arange(self.n_nodes, dtype=np.int32), np.diff(self.indptr))

    def into(self, targets: np.ndarray) -> np.ndarray:
        """Edge numbers of the rows of `targets`, row after row."""
        starts, lengths = self.indptr[targets], self.indptr[targets + 1] - self.indptr[targets]
        before = np.cumsum(lengths) - lengths  # edges gathered before each row
        return np.repeat(starts - before, lengths) + np.arange(lengths.sum())

    def row_sums(self, values: np.ndarray) -> np.ndarray:
        """float64[N], sum of `values` (one per edge) over each target's row."""
        return np.bincount(self.target, weights=values, minlength=self.n_nodes)

    def kept(self, nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """bool[E], the edges kept by `edges` (bool[E]) with both ends kept by `nodes` (bool[N])."""
        return edges & nodes[self.target] & nodes[self.source]

    def select(self, nodes: np.ndarray, edges: np.ndarray) -> Edges:
        """The edges that are `kept`, in order, renumbered to the nodes that are."""
        target, kept = self.target, self.kept(nodes, edges)
        number = np.cumsum(nodes) - 1
        return Edges.from_coo(
            number[target[kept]], number[self.source[kept]], self.weight[kept], n_nodes=int(np.count_nonzero(nodes))
        )


Graph = TypeVar("Graph", bound="GraphData")


@dataclass(frozen=True, eq=False)
class GraphData:
    """The parts of a graph, which algorithms and exporters take; `CircuitGraph` is the one that people hold."""

    nodes: NodeTable
    edges: Edges
    metadata: Mapping[str, Any]
    """JSON facts: `prompt`, `tokens` (text of each), `n_layers` and `identity_error` always; by tracing also
    `token_ids`, `model`, `crosscoder`, `targets`, `coverage`, `stopped_by`, `unexpanded_share`, `seconds`; `pruning`
    when pruned, `heads` when split by heads."""
    heads: EdgeHeads | None = None
    """The heads that carry each edge; see `circuits.with_heads`."""

    def select(self: Graph, nodes: np.ndarray, edges: np.ndarray) -> Graph:
        """The nodes where `nodes` (bool[N]) is true, and the edges among them where `edges` (bool[E]) is."""
        heads = None if self.heads is None else self.heads.select(self.edges.kept(nodes, edges))
        return replace(self, nodes=self.nodes.select(nodes), edges=self.edges.select(nodes, edges), heads=heads)


def _check_rows(edges: Edges) -> None:
    ends = edges.indptr[[0, -1]].tolist() if len(edges.indptr) else []
    if ends != [0, len(edges)] or (np.diff(edges.indptr) < 0).any():
        raise ValueError(f"Edges.indptr: expected to rise from 0 to the {len(edges)} edges")
    if edges.weight.shape != edges.source.shape:
        raise ValueError(f"Edges.weight: expected {len(edges)} weights like the sources, given {len(edges.weight)}")
    outside = (edges.source < 0) | (edges.source >= edges.n_nodes)
    if outside.any():
        raise ValueError(f"Edges.source: expected nodes in 0..{edges.n_nodes - 1}, given {edges.source[outside][0]}")
    if not np.isfinite(edges.weight).all():
        raise ValueError("Edges.weight: expected finite numbers, given NaN or infinity")
    target = edges.target
    same_row = target[1:] == target[:-1]
    if (same_row & (edges.source[1:] <= edges.source[:-1])).any():
        raise ValueError("Edges.source: expected rising sources inside each row, given an edge twice or out of order")
