"""Influence: the share of the output that reaches a node through all paths.

    M[t, s] = |A[t, s]| / inflow[t]          (E values; a row of a pruned graph sums to less than 1)
    I       = p (M + M^2 + M^3 + ...)        p = output weight of the targets, which sums to 1

The graph has no cycles, so the series ends and one backward sweep gives it exactly: a node is visited once
everything it feeds has been.
"""

from __future__ import annotations

import numpy as np

from circuits.graph.edges import Edges, GraphData


def row_shares(graph: GraphData) -> np.ndarray:
    """float64[E], M of each edge: the share of its target's full inflow; 0 in rows without inflow."""
    size = np.abs(graph.edges.weight.astype(np.float64))
    # The inflow was summed before weights were stored in float32: let no row sum to more than 1.
    return _divide_rows(graph.edges, size, np.maximum(graph.nodes.inflow, graph.edges.row_sums(size)))


def _divide_rows(edges: Edges, size: np.ndarray, total: np.ndarray) -> np.ndarray:
    divisor = total[edges.target]
    return np.divide(size, divisor, out=np.zeros_like(size), where=divisor > 0)


def sweep_levels(edges: Edges) -> list[np.ndarray]:
    """Node numbers in backward order, in batches: a node comes after every node it has an edge to.

    The first batch holds the nodes that feed nothing. Raises `ValueError` when the edges contain a cycle.
    """
    waiting = np.bincount(edges.source, minlength=edges.n_nodes)  # targets not visited yet
    batch = np.flatnonzero(waiting == 0)
    levels, visited = [], 0
    while len(batch):
        levels.append(batch)
        visited += len(batch)
        freed, counts = np.unique(edges.source[edges.into(batch)], return_counts=True)
        waiting[freed] -= counts
        batch = freed[waiting[freed] == 0]
    if visited < edges.n_nodes:
        raise ValueError(f"expected a graph without cycles, given one through {edges.n_nodes - visited} or fewer nodes")
    return levels


def sweep(edges: Edges, shares: np.ndarray, output: np.ndarray) -> np.ndarray:
    """float64[N], `output (M + M^2 + ...)` for M given by `shares` (float64[E]) and any `output` (float64[N])."""
    influence = np.zeros(edges.n_nodes)
    for batch in sweep_levels(edges):
        numbers = edges.into(batch)
        mass = np.repeat(influence[batch] + output[batch], edges.indptr[batch + 1] - edges.indptr[batch])
        influence += np.bincount(edges.source[numbers], weights=mass * shares[numbers], minlength=edges.n_nodes)
    return influence


def node_influence(graph: GraphData) -> np.ndarray:
    """float64[N], I. A target's own output weight is not part of it: the mass through a node is `I + output_weight`."""
    return sweep(graph.edges, row_shares(graph), graph.nodes.output_weight)


def edge_influence(graph: GraphData, *, among: np.ndarray | None = None) -> np.ndarray:
    """float64[E], mass that crosses each edge: `(I[t] + p[t]) M[t, s]`.

    With `among` (bool[E]) only those edges count, and rows are divided by what is left of them instead of by the
    full inflow, which spreads the mass of the others over them; pruning ranks edges that way.
    """
    edges, output = graph.edges, graph.nodes.output_weight
    if among is None:
        shares = row_shares(graph)
    else:
        size = np.abs(edges.weight.astype(np.float64)) * among
        shares = _divide_rows(edges, size, edges.row_sums(size))
    mass = sweep(edges, shares, output) + output
    return mass[edges.target] * shares
