"""What a graph predicts when some of its nodes are scaled: direct effects, total ones through all paths, and influence.

B changes, each of one or several nodes that are scaled together.

With `r[s]` the relative change of a source's activation, the frozen linear model changes a target's pre-activation (or
logit) by

    dh[t] = sum_s A[t, s] r[s]

The total effect follows the change through features, sources first: `r[s] = da[s] / a[s]`. Thresholds are not applied: an
active feature's activation is taken to change by as much as its pre-activation, even below zero, and inactive features, which
the graph does not hold, are taken to stay inactive. `clipped` stops activations at zero, the only part of a threshold that a
graph knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from circuits.graph.edges import Edges, GraphData
from circuits.graph.influence import row_scales
from circuits.graph.nodes import NodeKind

EDGES_AT_ONCE = 1 << 22
"""Entries of the largest intermediate array: bounds memory."""


def scaled_alone(changed: np.ndarray, relative: float) -> list[dict[int, float]]:
    """Changes of one node each, by the same share, as `predicted_changes` takes them."""
    return [{node: relative} for node in changed.tolist()]


def predicted_changes(
    graph: GraphData, changes: Sequence[Mapping[int, float]], *, total: bool = True, clipped: bool = False
) -> np.ndarray:
    """float64[B, N], predicted change of every node's activation (features) or value (logits).

    Args:
        changes: in each case, the nodes that are scaled together and the relative change of each: -1 removes what it
            writes, 1 doubles it.
        total: through all paths; only through the edges out of the scaled nodes otherwise.
        clipped: let no positive activation fall below zero.

    Raises:
        ValueError: a node that causes nothing, such as a logit.
    """
    nodes, edges = graph.nodes, graph.edges
    scaled_BN = np.full((len(changes), len(nodes)), np.nan)  # NaN: not scaled, free to react
    for row, change in zip(scaled_BN, changes, strict=True):
        row[list(change)] = list(change.values())
    if np.isfinite(scaled_BN[:, nodes.mask(NodeKind.LOGIT)]).any():
        raise ValueError("expected features, tokens or errors to change, given an output")
    levels = _forward(edges)
    predicted_BN = np.zeros_like(scaled_BN)
    size = max(1, EDGES_AT_ONCE // max(1, len(edges)))
    for begin in range(0, len(changes), size):
        rows = slice(begin, begin + size)
        predicted_BN[rows] = _changes(graph, levels, scaled_BN[rows], total=total, clipped=clipped)
    return predicted_BN


def _changes(
    graph: GraphData, levels: list[np.ndarray], scaled_BN: np.ndarray, *, total: bool, clipped: bool
) -> np.ndarray:
    nodes, edges = graph.nodes, graph.edges
    activation = nodes.activation.astype(np.float64)
    is_feature, is_held_BN = nodes.mask(NodeKind.FEATURE), np.isfinite(scaled_BN)
    relative_BN, change_BN = np.nan_to_num(scaled_BN), np.zeros_like(scaled_BN)
    for batch in levels:
        numbers = edges.into(batch)
        flow_BE = relative_BN[:, edges.source[numbers]] * edges.weight[numbers]
        change = np.add.reduceat(flow_BE, _starts(edges, batch), axis=1)
        if clipped:
            stops = is_feature[batch] & (activation[batch] > 0)  # an activation below zero has no stop there
            change = np.where(stops, np.maximum(change, -activation[batch]), change)
        change_BN[:, batch] = change
        if total:
            inside = batch[is_feature[batch] & (activation[batch] != 0)]
            reaction = change_BN[:, inside] / activation[inside]
            # Scaled features are held, whatever flows into them.
            relative_BN[:, inside] = np.where(is_held_BN[:, inside], scaled_BN[:, inside], reaction)
    return np.where(is_held_BN, scaled_BN * activation, change_BN)


def influence_among(graph: GraphData, sources: np.ndarray) -> np.ndarray:
    """float64[B, N], influence of each of B nodes on every node: summed strength of all paths from one to the other.

    `B = M + M^2 + ...` of Ameisen et al. 2025 for M as in `circuits.graph.influence`; unsigned, and 0 on the node itself.
    """
    edges, scales, copies = graph.edges, row_scales(graph), np.arange(len(sources))
    influence_BN = np.zeros((len(sources), len(graph.nodes)))
    influence_BN[copies, sources] = 1.0
    for batch in _forward(edges):
        numbers = edges.into(batch)
        flow_BE = influence_BN[:, edges.source[numbers]] * np.abs(edges.weight[numbers])
        influence_BN[:, batch] = np.add.reduceat(flow_BE, _starts(edges, batch), axis=1) * scales[batch]
        influence_BN[copies, sources] = 1.0  # paths begin here, whatever flows into it
    influence_BN[copies, sources] = 0.0
    return influence_BN


def _forward(edges: Edges) -> list[np.ndarray]:
    """Nodes that something flows into, in batches, sources first."""
    batches = (batch[edges.indptr[batch + 1] > edges.indptr[batch]] for batch in reversed(edges.levels))
    return [batch for batch in batches if len(batch)]


def _starts(edges: Edges, batch: np.ndarray) -> np.ndarray:
    """Where each node's edges begin among `edges.into(batch)`."""
    lengths = edges.indptr[batch + 1] - edges.indptr[batch]
    return np.asarray(np.cumsum(lengths) - lengths)
