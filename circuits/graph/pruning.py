"""Pruning: the smallest part of a graph that carries most of its influence.

1. Nodes. Features, errors and positions are ranked by influence; the least influential are dropped while together
   they hold no more than `1 - nodes` of the ranked influence. Tokens and targets always stay.
2. Edges among the kept nodes. Rows are divided by what is left of them, and the weakest edges are dropped by the
   same rule with `1 - edges` of the edge influence.
3. Dangling nodes, until none is left: a feature, error or position that no longer leads to a target, and a feature
   that had causes but keeps none of them.

Equal ranks are broken by table order, so the result does not depend on the platform. Raising `edges` only ever adds
nodes and edges; raising `nodes` only ever adds to the nodes of step 1 (step 2 ranks edges anew, so a weak edge may
still go).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuits.graph.edges import Edges, GraphData
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from replacement.number_checks import real


@dataclass(frozen=True)
class Kept:
    """What pruning keeps of a graph."""

    nodes: np.ndarray
    """bool[N]."""
    edges: np.ndarray
    """bool[E]; every kept edge joins two kept nodes."""


def prune(graph: GraphData, *, nodes: float = 0.8, edges: float = 0.98) -> Kept:
    """Masks of the nodes and edges to keep. Raises `ValueError` for a threshold outside 0..1."""
    check_threshold("nodes", nodes)
    check_threshold("edges", edges)
    table = graph.nodes
    stays = table.mask(NodeKind.TOKEN, NodeKind.LOGIT) | table.is_target
    influence = np.where(stays, 0.0, node_influence(graph))
    kept_nodes = stays | largest_holding(influence, nodes)

    both = kept_nodes[graph.edges.target] & kept_nodes[graph.edges.source]
    kept_edges = both & largest_holding(edge_influence(graph, among=both), edges)
    return drop_dangling(table, graph.edges, Kept(kept_nodes, kept_edges))


def check_threshold(name: str, threshold: float) -> None:
    """Raise `ValueError` unless a pruning threshold is a share."""
    if not 0.0 <= real(name, threshold) <= 1.0:
        raise ValueError(f"{name}: expected a share of influence between 0 and 1, given {threshold}")


def largest_holding(values: np.ndarray, share: float) -> np.ndarray:
    """bool mask of the smallest set of `values` (>= 0) whose sum is at least `share` of the total; never a zero."""
    if share == 1.0:  # exact, however small a value is beside the total's rounding
        return values > 0
    order = np.argsort(-values, kind="stable")
    held = np.cumsum(values[order])
    before = np.concatenate([[0.0], held[:-1]])  # what the larger values hold already
    mask = np.zeros(len(values), dtype=bool)
    mask[order] = before < share * held[-1:]
    return mask & (values > 0)


def drop_dangling(nodes: NodeTable, edges: Edges, kept: Kept) -> Kept:
    """Drop nodes that lead nowhere or lost all their causes, with their edges, until nothing changes."""
    stays = nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | nodes.is_target
    needs_causes = nodes.mask(NodeKind.FEATURE) & (np.diff(edges.indptr) > 0)
    target, source = edges.target, edges.source
    node_mask, edge_mask = kept.nodes, kept.edges
    while True:
        has_effect = np.bincount(source[edge_mask], minlength=len(nodes)) > 0
        has_cause = np.bincount(target[edge_mask], minlength=len(nodes)) > 0
        left = node_mask & (stays | (has_effect & (has_cause | ~needs_causes)))
        if np.array_equal(left, node_mask):
            return Kept(node_mask, edge_mask)
        node_mask = left
        edge_mask = edge_mask & node_mask[target] & node_mask[source]
