"""How well traced edges agree with the true ones: every candidate edge, its traced weight, and AUROC.

N nodes, E candidate edges.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from program import Node, Run

from circuits import CircuitGraph, NodeKind

Edge = tuple[Node, Node]
"""Source, target."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """Traced weights beside true ones, over every candidate edge."""

    is_true_E: np.ndarray
    true_E: np.ndarray
    traced_E: np.ndarray

    @property
    def auroc(self) -> float:
        """Probability that a true edge has a larger |weight| than a false one; see `auroc`."""
        return auroc(np.abs(self.traced_E), self.is_true_E)

    @property
    def largest_gap(self) -> float:
        """Largest |traced - true| weight."""
        return float(np.abs(self.traced_E - self.true_E).max())


def auroc(score_E: np.ndarray, is_true_E: np.ndarray) -> float:
    """Area under the ROC curve: the share of (true, false) pairs in which the true one scores higher; ties count half.

    Raises:
        ValueError: there are no true entries, or no false ones.
    """
    n_true, n_false = int(is_true_E.sum()), int((~is_true_E).sum())
    if not n_true or not n_false:
        raise ValueError(f"expected true and false entries to tell apart, got {n_true} and {n_false}")
    _, group_E, count_G = np.unique(score_E, return_inverse=True, return_counts=True)
    rank_G = np.cumsum(count_G) - (count_G - 1) / 2  # mean rank of equal scores, from 1
    return float((rank_G[group_E][is_true_E].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def graph_nodes(graph: CircuitGraph) -> list[Node]:
    """The nodes of a traced graph; differences at one position are numbered -1, -2, ... in their order."""
    nodes, found, n_differences = graph.nodes, [], 0
    for kind, layer, position, index in zip(
        nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist(), strict=True
    ):
        if kind == NodeKind.LOGIT and index < 0:
            n_differences += 1
            index = -n_differences
        found.append(Node(NodeKind(kind), layer, position, index))
    return found


def traced_edges(graph: CircuitGraph) -> dict[Edge, float]:
    """Every edge of a graph with its weight."""
    nodes, edges = graph_nodes(graph), graph.edges
    columns = zip(edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True)
    return {(nodes[source], nodes[target]): weight for source, target, weight in columns}


def candidate_edges(truth: Run, tokens: Iterable[int], n_layers: int) -> list[Edge]:
    """Every pair that could be an edge: the source is written before the target reads it, at its position or an earlier one.

    Sources are tokens, positions, error terms and active features; targets are active features and logits.
    """
    places = list(enumerate(tokens))
    sources = [Node(NodeKind.TOKEN, -1, place, token) for place, token in places]
    sources += [Node(NodeKind.POSITION, -1, place, -1) for place, _ in places]
    sources += [Node(NodeKind.ERROR, layer, place, -1) for layer in range(n_layers) for place, _ in places]
    sources += list(truth.activations)
    targets = [*truth.activations, *dict.fromkeys(target for _, target in truth.edges if target.kind == NodeKind.LOGIT)]
    return [(s, t) for t in targets for s in sources if s.layer < t.layer and s.position <= t.position]


def compare(graphs: Iterable[CircuitGraph], truth: Run, tokens: Iterable[int], n_layers: int) -> Recovery:
    """Traced against true weights of every candidate edge.

    Args:
        graphs: graphs of one prompt that together expand every active feature and every target.
    """
    traced: dict[Edge, float] = {}
    for graph in graphs:
        traced |= traced_edges(graph)
    candidates = candidate_edges(truth, tokens, n_layers)
    unknown = (set(traced) | set(truth.edges)) - set(candidates)
    if unknown:
        raise ValueError(f"expected edges among the candidates only, got {len(unknown)} others such as {unknown.pop()}")
    return Recovery(
        is_true_E=np.array([edge in truth.edges for edge in candidates]),
        true_E=np.array([truth.edges.get(edge, 0.0) for edge in candidates]),
        traced_E=np.array([traced.get(edge, 0.0) for edge in candidates]),
    )
