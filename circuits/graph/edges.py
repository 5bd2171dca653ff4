"""Edges of a circuit as compressed sparse rows: row t holds what flows INTO node t."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from rich.console import RenderableType

from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.nodes import NodeTable
from replacement.console import SHOWN_ROWS, first_rows
from replacement.notebook import repr_html

COLUMNS: dict[str, np.dtype] = {
    "indptr": np.dtype(np.int64),
    "source": np.dtype(np.int32),
    "weight": np.dtype(np.float32),
}
BLOCK = 2**18
"""Edges worked on at a time: temporary arrays of a block stay in the processor's cache."""


@dataclass(frozen=True, slots=True, eq=False)
class RowBlock:
    """The complete rows of some nodes; attribution hands these to `Edges.from_blocks`, and `Edges.row_blocks` gives them."""

    node: np.ndarray
    """int64[n], node of each row; any order."""
    counts: np.ndarray
    """int64[n], number of edges in each row."""
    source: np.ndarray
    """int32[E'], the rows' sources one row after the other, rising inside each row."""
    weight: np.ndarray
    """float32[E'] or float64[E']."""

    @property
    def starts(self) -> np.ndarray:
        """int64[n], where each row begins among the block's edges."""
        return np.asarray(np.cumsum(self.counts) - self.counts)

    def per_edge(self, values: np.ndarray) -> np.ndarray:
        """[E'], each row's entry of `values` ([N], by node) repeated over its edges."""
        return np.repeat(values[self.node], self.counts)


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

    def __rich__(self) -> RenderableType:
        shown = slice(SHOWN_ROWS)
        target = np.searchsorted(self.indptr, np.arange(len(self))[shown], side="right") - 1
        rows = zip(self.source[shown], target, (f"{weight:+.4g}" for weight in self.weight[shown]), strict=True)
        return first_rows("source (row of nodes)", "target (row of nodes)", "weight", rows=rows, n_rows=len(self))

    _repr_html_ = repr_html

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
        """int32[E], node each edge goes to; large graphs are read with `row_blocks`."""
        return np.repeat(np.arange(self.n_nodes, dtype=np.int32), np.diff(self.indptr))

    def into(self, targets: np.ndarray) -> np.ndarray:
        """Edge numbers of the rows of `targets`, row after row."""
        starts, lengths = self.indptr[targets], self.indptr[targets + 1] - self.indptr[targets]
        before = np.cumsum(lengths) - lengths  # edges gathered before each row
        return np.repeat(starts - before, lengths) + np.arange(lengths.sum())

    def row_blocks(self, nodes: np.ndarray | None = None) -> Iterator[RowBlock]:
        """The rows that are not empty, in blocks of about `BLOCK` edges.

        All rows by default: then the blocks are views of the columns and follow one another from the first edge to the last.

        Args:
            nodes: int[n], nodes whose rows are wanted, in that order.
        """
        nodes = np.arange(self.n_nodes) if nodes is None else nodes
        nodes = nodes[self.indptr[nodes + 1] > self.indptr[nodes]]
        starts, stops = self.indptr[nodes], self.indptr[nodes + 1]
        before = np.cumsum(stops - starts) - (stops - starts)
        for rows in np.split(np.arange(len(nodes)), np.flatnonzero(np.diff(before // BLOCK)) + 1):
            if not len(rows):
                continue
            counts, start, stop = stops[rows] - starts[rows], starts[rows[0]], stops[rows[-1]]
            if stop - start == counts.sum() and (np.diff(nodes[rows]) > 0).all():
                source, weight = self.source[start:stop], self.weight[start:stop]
            else:
                slices = [slice(*ends) for ends in zip(starts[rows].tolist(), stops[rows].tolist(), strict=True)]
                source = np.concatenate([self.source[row] for row in slices])
                weight = np.concatenate([self.weight[row] for row in slices])
            yield RowBlock(nodes[rows], counts, source, weight)

    def row_sums(self, values: Callable[[RowBlock], np.ndarray]) -> np.ndarray:
        """float64[N], sum over each target's row of the values that a function gives for the edges of a block."""
        sums = np.zeros(self.n_nodes)
        for block in self.row_blocks():
            sums[block.node] = np.add.reduceat(values(block), block.starts, dtype=np.float64)
        return sums

    @cached_property
    def magnitudes(self) -> np.ndarray:
        """float64[N], sum of |A| over each row."""
        return self.row_sums(lambda block: np.abs(block.weight))

    @cached_property
    def levels(self) -> list[np.ndarray]:
        """Node numbers in backward order, in batches: a node comes after every node it has an edge to.

        The first batch holds the nodes that feed nothing. Raises `ValueError` when the edges contain a cycle.
        """
        waiting = np.zeros(self.n_nodes, dtype=np.int64)  # targets not visited yet; -1 once the node itself is visited
        for block in self.row_blocks():
            np.add.at(waiting, block.source, 1)
        levels = []
        while len(batch := np.flatnonzero(waiting == 0)):
            levels.append(batch)
            waiting[batch] = -1
            for block in self.row_blocks(batch):
                np.subtract.at(waiting, block.source, 1)
        left = int(np.count_nonzero(waiting >= 0))
        if left:
            raise ValueError(f"expected a graph without cycles, given one through {left} or fewer nodes")
        return levels

    def kept(self, nodes: np.ndarray, edges: np.ndarray | None = None) -> np.ndarray:
        """bool[E], the edges kept by `edges` (bool[E], all by default) with both ends kept by `nodes` (bool[N])."""
        ends = (nodes.take(block.source) & block.per_edge(nodes) for block in self.row_blocks())
        both = joined(ends, len(self), np.dtype(np.bool_))
        return both if edges is None else np.logical_and(both, edges, out=both)

    def where(self, edges: np.ndarray) -> Edges:
        """The edges where `edges` (bool[E]) is true, among the same nodes."""
        n_edges, counts, begin, start = np.count_nonzero(edges), np.zeros(self.n_nodes, dtype=np.int64), 0, 0
        if n_edges == len(self):
            return self
        source, weight = np.empty(n_edges, dtype=np.int32), np.empty(n_edges, dtype=np.float32)
        for block in self.row_blocks():
            mask = edges[begin : begin + len(block.source)]
            chosen = np.flatnonzero(mask)
            counts[block.node] = np.add.reduceat(mask, block.starts, dtype=np.int64)
            source[start : start + len(chosen)] = block.source.take(chosen)
            weight[start : start + len(chosen)] = block.weight.take(chosen)
            begin, start = begin + len(mask), start + len(chosen)
        return Edges(np.concatenate([[0], np.cumsum(counts)]), source, weight)

    def select(self, nodes: np.ndarray, edges: np.ndarray | None = None) -> Edges:
        """The edges that are `kept`, in order, renumbered to the nodes that are."""
        chosen, number = self.where(self.kept(nodes, edges)), np.cumsum(nodes, dtype=np.int32) - np.int32(1)
        counts = np.diff(chosen.indptr)[nodes]
        return Edges(np.concatenate([[0], np.cumsum(counts)]), number.take(chosen.source), chosen.weight)


Graph = TypeVar("Graph", bound="GraphData")


@dataclass(frozen=True, eq=False)
class GraphData:
    """The parts of a graph, which algorithms and exporters take; `CircuitGraph` is the one that people hold."""

    nodes: NodeTable
    edges: Edges
    metadata: Mapping[str, Any]
    """JSON facts: `prompt`, `tokens` (text of each), `n_layers` and `identity_error` always; by tracing also
    `token_ids`, `model`, `crosscoder`, `targets`, `coverage`, `stopped_by`, `unexpanded_share`, `seconds`; `pruning`
    when pruned, `heads` when split by heads, `dropped_below` and `weight_error` when edges were dropped or rounded,
    `conventions` and `left_out_share` when they are not the exact ones."""
    heads: EdgeHeads | None = None
    """The heads that carry each edge; see `circuits.with_heads`."""

    def select(self: Graph, nodes: np.ndarray, edges: np.ndarray) -> Graph:
        """The nodes where `nodes` (bool[N]) is true, and the edges among them where `edges` (bool[E]) is."""
        heads = None if self.heads is None else self.heads.select(self.edges.kept(nodes, edges))
        return replace(self, nodes=self.nodes.select(nodes), edges=self.edges.select(nodes, edges), heads=heads)


def joined(arrays: Iterable[np.ndarray], length: int, dtype: np.dtype) -> np.ndarray:
    """Arrays one after the other, `length` entries in all; unlike `np.concatenate`, it holds one of them at a time."""
    result, start = np.empty(length, dtype), 0
    for array in arrays:
        result[start : start + len(array)] = array
        start += len(array)
    assert start == length
    return result


def _check_rows(edges: Edges) -> None:
    ends = edges.indptr[[0, -1]].tolist() if len(edges.indptr) else []
    if ends != [0, len(edges)] or (np.diff(edges.indptr) < 0).any():
        raise ValueError(f"Edges.indptr: expected to rise from 0 to the {len(edges)} edges")
    if edges.weight.shape != edges.source.shape:
        raise ValueError(f"Edges.weight: expected {len(edges)} weights like the sources, given {len(edges.weight)}")
    if len(edges) and not 0 <= edges.source.min() <= edges.source.max() < edges.n_nodes:
        outside = next(number for number in (edges.source.min(), edges.source.max()) if not 0 <= number < edges.n_nodes)
        raise ValueError(f"Edges.source: expected nodes in 0..{edges.n_nodes - 1}, given {outside}")
    if len(edges) and not np.isfinite([edges.weight.min(), edges.weight.max()]).all():
        raise ValueError("Edges.weight: expected finite numbers, given NaN or infinity")
    for block in edges.row_blocks():
        falls = block.source[1:] <= block.source[:-1]
        falls[block.starts[1:] - 1] = False  # from the end of a row to the beginning of the next
        if falls.any():
            raise ValueError(
                "Edges.source: expected rising sources inside each row, given an edge twice or out of order"
            )
