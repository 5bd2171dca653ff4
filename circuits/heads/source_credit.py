"""The activation of one feature divided among the nodes that cause it: credit through the ReLU along a graph's edges.

J players: the sources of the node's edges, and one more for whatever was removed from its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuits.attribution.grounding import Grounding
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.nodes import NodeKind
from circuits.heads.credit import Credit, credit
from circuits.heads.thresholds import feature_threshold
from replacement import ReplacementModel


@dataclass(frozen=True, slots=True, eq=False)
class SourceCredit:
    """Credit of the nodes that feed one feature."""

    node: int
    """The feature's number in the graph."""
    sources: np.ndarray
    """int64[J - 1], nodes that feed it."""
    contributions: np.ndarray
    """float64[J], exact parts of the pre-activation: the edges, and last the sum of what was removed from the row."""
    threshold: float
    """With all other features held fixed, the activation is `h 1[h > threshold]`."""
    credit: Credit
    """Parts of the activation, in the order of `contributions`."""


def source_credit(
    model: ReplacementModel, graph: CircuitGraph, node: int | str, *, rule: str = "path", seed: int = 0
) -> SourceCredit:
    """Divide a feature's activation among the nodes that feed it; see `circuits.heads.credit` for the rules.

    Args:
        model: the model the graph was traced in.
        node: an expanded feature of the graph, by number or id.
        rule: `gate`, `path`, `shapley` (sampled above 16 players) or `ablation`.
        seed: draws Shapley's samples.

    Raises:
        ValueError: an unknown rule or node, a node that is no feature or was not expanded, or a graph of another model.
    """
    number = _number(graph, node)
    nodes = graph.nodes
    if nodes.kind[number] != NodeKind.FEATURE or not nodes.expanded[number]:
        raise ValueError(f"expected an expanded feature, given {nodes.ids()[number]}")
    grounding = Grounding.of(model, graph)
    parts = grounding.feature_numbers(np.array([number]))
    (part, feature) = next(
        (part, int(numbers[0]))
        for part, (places, numbers) in zip(grounding.local.decompositions, parts, strict=True)
        if len(places)
    )
    threshold = feature_threshold(grounding.local, part, feature)
    edges = graph.edges.into(np.array([number]))
    weights, bias = graph.edges.weight[edges].astype(np.float64), float(nodes.bias[number])
    contributions = np.append(weights, float(nodes.value[number]) - bias - weights.sum())
    return SourceCredit(
        node=number,
        sources=graph.edges.source[edges].astype(np.int64),
        contributions=contributions,
        threshold=threshold,
        credit=credit(contributions, bias=bias, threshold=threshold, rule=rule, seed=seed),
    )


def _number(graph: CircuitGraph, node: int | str) -> int:
    if isinstance(node, str):
        ids = graph.nodes.ids()
        if node not in ids:
            raise ValueError(f"the graph has no node {node!r}")
        return ids.index(node)
    if not 0 <= node < len(graph.nodes):
        raise ValueError(f"the graph has no node {node}: expected 0 to {len(graph.nodes) - 1}")
    return node
