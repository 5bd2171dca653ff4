"""Influence: the share of the output that reaches a node through all paths.

    M[t, s] = |A[t, s]| / inflow[t]          (E values; a row of a pruned graph sums to less than 1)
    I       = p (M + M^2 + M^3 + ...)        p = output weight of the targets, which sums to 1

The graph has no cycles, so the series ends and one backward sweep gives it exactly: a node is visited once
everything it feeds has been. M is never stored: an edge's share is its magnitude times its row's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from circuits.graph.edges import Edges, GraphData, joined


def row_scales(graph: GraphData) -> np.ndarray:
    """float64[N], `1 / inflow`: an edge's share is `M = |A| * scale`; 0 for a row without inflow."""
    # The inflow was summed before weights were stored in float32: let no row sum to more than 1.
    return inverse(np.maximum(graph.nodes.inflow, graph.edges.magnitudes))


def inverse(total: np.ndarray) -> np.ndarray:
    """`1 / total`, and 0 where that is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        result = 1.0 / total
    return np.where(np.isfinite(result), result, 0.0)


def sweep(edges: Edges, scales: np.ndarray, output: np.ndarray) -> np.ndarray:
    """float64[N], `output (M + M^2 + ...)` for `M = |A| * scale` of its row.

    Args:
        edges: the weights A.
        scales: float64[N], as of `row_scales`; a node with scale 0 absorbs what reaches it.
        output: float64[N], where the mass starts.
    """
    influence = np.zeros(edges.n_nodes)
    for level in edges.levels:
        for block in edges.row_blocks(level):
            rate = (influence[block.node] + output[block.node]) * scales[block.node]
            np.add.at(influence, block.source, np.repeat(rate, block.counts) * np.abs(block.weight))
    return influence


def node_influence(graph: GraphData) -> np.ndarray:
    """float64[N], I. A target's own output weight is not part of it: the mass through a node is `I + output_weight`."""
    return sweep(graph.edges, row_scales(graph), graph.nodes.output_weight)


def edge_influence(graph: GraphData) -> np.ndarray:
    """float64[E], mass that crosses each edge: `(I[t] + p[t]) M[t, s]`."""
    crossing = crossing_mass(graph.edges, row_scales(graph), graph.nodes.output_weight)
    return joined(crossing(), len(graph.edges), np.dtype(np.float64))


def crossing_mass(edges: Edges, scales: np.ndarray, output: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    """The mass that crosses each edge, block by block as in `Edges.row_blocks`, as often as it is called; see `sweep`."""
    rate = (sweep(edges, scales, output) + output) * scales
    return lambda: (block.per_edge(rate) * np.abs(block.weight) for block in edges.row_blocks())
