"""Pruning: the smallest part of a graph that carries most of its influence.

1. Nodes. Features, errors and positions are ranked by influence; the least influential are dropped while together
   they hold no more than `1 - nodes` of the ranked influence. Tokens and targets always stay. Under the conventions of
   circuit-tracer tokens are ranked too, so that what they hold counts towards `nodes` (see `circuits.graph.conventions`).
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

from circuits.graph.conventions import conventions_of
from circuits.graph.edges import Edges, GraphData, joined
from circuits.graph.influence import crossing_mass, inverse, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.selection import largest_holding
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
    ranked = node_influence(graph)
    if not conventions_of(graph.metadata).ranks_tokens:
        ranked[stays] = 0.0
    kept_nodes = stays | largest_holding(lambda: [ranked], nodes)

    # Rows are divided by what is left of them, which spreads the mass of the dropped nodes over the kept ones.
    both = graph.edges.kept(kept_nodes)
    inner = graph.edges.where(both)
    crossing = crossing_mass(inner, inverse(inner.magnitudes), table.output_weight)
    chosen = largest_holding(crossing, edges)
    had_causes = np.diff(graph.edges.indptr) > 0
    left = inner.where(chosen)
    kept_nodes = drop_dangling(table, left, kept_nodes, had_causes)
    # Each mask is over the edges that the one before it kept: write the last one back through both.
    np.place(chosen, chosen, left.kept(kept_nodes))
    np.place(both, both, chosen)
    return Kept(kept_nodes, both)


def drop_small(graph: GraphData, below: float) -> Kept:
    """Masks without the edges that are at most the share `below` of their row's inflow.

    Nodes stay that are tokens, targets or logits, that were expanded, or that an edge still leaves.
    Raises `ValueError` for a share outside 0..1.
    """
    check_threshold("below", below)
    nodes, least = graph.nodes, below * graph.nodes.inflow
    large = (np.abs(block.weight) > block.per_edge(least) for block in graph.edges.row_blocks())
    edges = joined(large, len(graph.edges), np.dtype(np.bool_))
    kept = nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | nodes.is_target | nodes.expanded
    kept[graph.edges.where(edges).source] = True
    return Kept(kept, edges)


def check_threshold(name: str, threshold: float) -> None:
    """Raise `ValueError` unless a pruning threshold is a share."""
    if not 0.0 <= real(name, threshold) <= 1.0:
        raise ValueError(f"{name}: expected a share of influence between 0 and 1, given {threshold}")


def drop_dangling(nodes: NodeTable, edges: Edges, kept: np.ndarray, had_causes: np.ndarray) -> np.ndarray:
    """bool[N], `kept` without the nodes that lead nowhere or lost all their causes, dropped until nothing changes.

    Args:
        edges: those that are left.
        kept: bool[N], the nodes that are left.
        had_causes: bool[N], the nodes that had edges before pruning.
    """
    stays = nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | nodes.is_target
    needs_causes = nodes.mask(NodeKind.FEATURE) & had_causes
    while True:
        has_effect, has_cause = np.zeros_like(kept), np.zeros_like(kept)
        for block in edges.row_blocks(np.flatnonzero(kept)):
            has_effect[block.source] = True
            has_cause[block.node] = np.logical_or.reduceat(kept.take(block.source), block.starts)
        left = kept & (stays | (has_effect & (has_cause | ~needs_causes)))
        if np.array_equal(left, kept):
            return kept
        kept = left
