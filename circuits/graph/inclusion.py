"""How often nodes and edges are kept over many pruning thresholds: what of a circuit does not hang on the choice of them.

    inclusion frequency = share of the pairs (threshold of nodes, threshold of edges) at which `prune` keeps the node or edge

    core         frequency 1: kept at every pair, the strict consensus
    contingent   in between: whether it is shown depends on the thresholds
    noise        frequency of at most 0.2: kept at no pair, or by the most generous fifth of them alone

Core, contingent and noise follow Parekh 2026, "CIRCUS: Circuit Consensus under Uncertainty". Tokens and targets, which pruning
never drops, have frequency 1 and belong to none of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.pruning import always_kept, pruned_at

NODES = (0.5, 0.6, 0.7, 0.8, 0.9)
EDGES = (0.9, 0.95, 0.98, 0.99)
"""Thresholds: the usual ones are 0.8 and 0.98."""
NOISE = 0.2
"""Largest frequency of what counts as noise."""
CLASSES = ("core", "contingent", "noise")
INCLUSION = "inclusion"
"""Key of the metadata: an object with the thresholds of `nodes` and `edges`, and `frequency` by the id of every node that is
kept anywhere but not everywhere by rule."""


@dataclass(frozen=True)
class Inclusion:
    """Inclusion frequencies of one graph."""

    nodes: np.ndarray
    """float64[N]."""
    edges: np.ndarray
    """float64[E]."""


def inclusion(graph: GraphData, *, nodes: Sequence[float] = NODES, edges: Sequence[float] = EDGES) -> Inclusion:
    """Inclusion frequencies over a grid of thresholds; one sweep for each threshold of nodes, see `pruned_at`.

    Raises:
        ValueError: no thresholds, one twice, or one outside 0..1.
    """
    for name, thresholds in (("nodes", nodes), ("edges", edges)):
        if not thresholds or len(set(thresholds)) < len(thresholds):
            raise ValueError(f"{name}: expected thresholds that differ, at least one, given {list(thresholds)}")
    n_pairs = len(nodes) * len(edges)
    node_counts, edge_counts = np.zeros(len(graph.nodes), dtype=np.int32), np.zeros(len(graph.edges), dtype=np.int32)
    for kept in pruned_at(graph, nodes, edges):
        node_counts += kept.nodes
        edge_counts += kept.edges
    return Inclusion(node_counts / n_pairs, edge_counts / n_pairs)


def classes(frequency: np.ndarray) -> np.ndarray:
    """int8, the number in `CLASSES` that each inclusion frequency stands for."""
    return np.where(frequency == 1, 0, np.where(frequency > NOISE, 1, 2)).astype(np.int8)


def inclusion_facts(
    graph: GraphData, *, nodes: Sequence[float] = NODES, edges: Sequence[float] = EDGES
) -> dict[str, Any]:
    """What `metadata["inclusion"]` holds."""
    frequency = inclusion(graph, nodes=nodes, edges=edges).nodes
    ids = graph.nodes.ids()
    stored = np.flatnonzero((frequency > 0) & ~always_kept(graph.nodes)).tolist()
    by_id = {ids[node]: float(frequency[node]) for node in stored}
    return {"nodes": list(map(float, nodes)), "edges": list(map(float, edges)), "frequency": by_id}


def stored_inclusion(graph: GraphData) -> np.ndarray | None:
    """float64[N], the inclusion frequencies that a graph carries in its metadata; None if it carries none."""
    if INCLUSION not in graph.metadata:
        return None
    frequency, always = graph.metadata[INCLUSION]["frequency"], always_kept(graph.nodes)
    return np.where(always, 1.0, [frequency.get(name, 0.0) for name in graph.nodes.ids()])


def are_inclusion_facts(value: object) -> bool:
    """Whether this may be metadata of the key `INCLUSION`."""

    def is_share(number: object) -> bool:
        return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1

    if not isinstance(value, dict) or not isinstance(value.get("frequency"), dict):
        return False
    thresholds = [value.get("nodes"), value.get("edges")]
    has_grid = all(isinstance(shares, list) and all(map(is_share, shares)) for shares in thresholds)
    return has_grid and all(map(is_share, value["frequency"].values()))
