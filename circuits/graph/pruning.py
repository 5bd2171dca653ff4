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

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.graph.conventions import conventions_of
from circuits.graph.edges import Edges, GraphData, joined
from circuits.graph.influence import crossing_mass, edge_influence, inverse, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.selection import largest_holding
from replacement.number_checks import real, whole_number


@dataclass(frozen=True)
class Kept:
    """What pruning keeps of a graph."""

    nodes: np.ndarray
    """bool[N]."""
    edges: np.ndarray
    """bool[E]; every kept edge joins two kept nodes."""


def prune(graph: GraphData, *, nodes: float = 0.8, edges: float = 0.98) -> Kept:
    """Masks of the nodes and edges to keep. Raises `ValueError` for a threshold outside 0..1."""
    return next(pruned_at(graph, [nodes], [edges]))


def pruned_at(graph: GraphData, nodes: Sequence[float], edges: Sequence[float]) -> Iterator[Kept]:
    """What `prune` keeps at every pair of a threshold of nodes and one of edges, the highest thresholds first.

    A lower threshold of nodes starts from the nodes and edges that a higher one left in step 1, and a lower threshold of edges
    from the nodes that a higher one kept: that gives the same masks as starting anew, since both only ever take away.

    Raises:
        ValueError: a threshold outside 0..1.
    """
    for name, thresholds in (("nodes", nodes), ("edges", edges)):
        for threshold in thresholds:
            check_threshold(name, threshold)
    table, inner = graph.nodes, graph.edges
    stays = always_kept(table)
    ranked = node_influence(graph)
    if not conventions_of(graph.metadata).ranks_tokens:
        ranked[stays] = 0.0
    had_causes = np.diff(graph.edges.indptr) > 0
    both = np.ones(len(graph.edges), dtype=bool)
    for node_threshold in sorted(nodes, reverse=True):
        kept_nodes = stays | largest_holding(lambda: [ranked], node_threshold)
        # Rows are divided by what is left of them, which spreads the mass of the dropped nodes over the kept ones.
        with_both_ends = inner.kept(kept_nodes)
        np.place(both, both, with_both_ends)
        inner = inner.where(with_both_ends)
        crossing = crossing_mass(inner, inverse(inner.magnitudes), table.output_weight)
        for edge_threshold in sorted(edges, reverse=True):
            chosen = largest_holding(crossing, edge_threshold)
            left = inner.where(chosen)
            kept_nodes = drop_dangling(table, left, kept_nodes, had_causes)
            # Each mask is over the edges that the one before it kept: write the last one back through both.
            np.place(chosen, chosen, left.kept(kept_nodes))
            kept_edges = both.copy()
            np.place(kept_edges, both, chosen)
            yield Kept(kept_nodes, kept_edges)


def edges_among(graph: GraphData, nodes: np.ndarray, *, share: float) -> Kept:
    """Masks of given nodes (bool[N]), all of which stay, and of the edges among them that hold a share of their influence."""
    both = graph.edges.kept(nodes)
    inner = graph.edges.where(both)
    np.place(
        both, both, largest_holding(crossing_mass(inner, inverse(inner.magnitudes), graph.nodes.output_weight), share)
    )
    return Kept(nodes, both)


def within_budget(graph: GraphData, *, most_nodes: int = 0, most_edges: int = 0) -> Kept:
    """Masks of at most so many features, errors and positions, and then edges: the most influential ones. 0 is no limit.

    As many are taken as leave no more than that once what dangles is dropped. Tokens and targets always stay. A lower budget
    of nodes keeps a part of what a higher one keeps, before the budget of edges; a lower budget of edges always does.

    Raises:
        ValueError: a budget below 0.
    """
    for name, most in (("most_nodes", most_nodes), ("most_edges", most_edges)):
        whole_number(name, most, least=0)
    nodes, had_causes = graph.nodes, np.diff(graph.edges.indptr) > 0
    stays = always_kept(nodes)
    kept_nodes, kept_edges = np.ones(len(nodes), dtype=bool), np.ones(len(graph.edges), dtype=bool)

    def with_nodes(n_taken: int) -> np.ndarray:
        taken = stays.copy()
        taken[order[:n_taken]] = True
        return drop_dangling(nodes, graph.edges.where(graph.edges.kept(taken)), taken, had_causes)

    if most_nodes and (~stays).sum() > most_nodes:
        order = np.argsort(np.where(stays, np.inf, -node_influence(graph)), kind="stable")
        best = bisect_right(range((~stays).sum() + 1), most_nodes, key=lambda n: (with_nodes(n) & ~stays).sum()) - 1
        kept_nodes = with_nodes(best)
        kept_edges = graph.edges.kept(kept_nodes)

    def with_edges(n_taken: int) -> tuple[np.ndarray, np.ndarray]:
        taken = np.zeros(len(graph.edges), dtype=bool)
        taken[order[:n_taken]] = True
        taken &= kept_edges
        left = drop_dangling(nodes, graph.edges.where(taken), kept_nodes, had_causes)
        return left, graph.edges.kept(left, taken)

    if most_edges and kept_edges.sum() > most_edges:
        order = np.argsort(np.where(kept_edges, -edge_influence(graph), np.inf), kind="stable")
        best = bisect_right(range(kept_edges.sum() + 1), most_edges, key=lambda n: with_edges(n)[1].sum()) - 1
        kept_nodes, kept_edges = with_edges(best)
    return Kept(kept_nodes, kept_edges)


def drop_small(graph: GraphData, below: float) -> Kept:
    """Masks without the edges that are at most the share `below` of their row's inflow.

    Nodes stay that are tokens, targets or logits, that were expanded, or that an edge still leaves.
    Raises `ValueError` for a share outside 0..1.
    """
    check_threshold("below", below)
    nodes, least = graph.nodes, below * graph.nodes.inflow
    large = (np.abs(block.weight) > block.per_edge(least) for block in graph.edges.row_blocks())
    edges = joined(large, len(graph.edges), np.dtype(np.bool_))
    kept = always_kept(nodes) | nodes.expanded
    kept[graph.edges.where(edges).source] = True
    return Kept(kept, edges)


def always_kept(nodes: NodeTable) -> np.ndarray:
    """bool[N], the nodes that pruning never drops: tokens and targets."""
    return nodes.mask(NodeKind.TOKEN, NodeKind.LOGIT) | nodes.is_target


def check_threshold(name: str, threshold: float, *, what: str = "share of influence") -> None:
    """Raise `ValueError` unless a threshold lies between 0 and 1; `what` it is a threshold of is said."""
    if not 0.0 <= real(name, threshold) <= 1.0:
        raise ValueError(f"{name}: expected a {what} between 0 and 1, given {threshold}")


def drop_dangling(nodes: NodeTable, edges: Edges, kept: np.ndarray, had_causes: np.ndarray) -> np.ndarray:
    """bool[N], `kept` without the nodes that lead nowhere or lost all their causes, dropped until nothing changes.

    Args:
        edges: those that are left.
        kept: bool[N], the nodes that are left.
        had_causes: bool[N], the nodes that had edges before pruning.
    """
    stays = always_kept(nodes)
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
