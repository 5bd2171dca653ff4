"""The difference of two graphs, such as those of a prompt and its counterfactual: what the second has more than the first.

Nodes and edges are the same as `circuits.graph.alignment` says. What a graph does not have counts as 0 there. Everything is
signed: the difference of B and A is minus that of A and B. Edges into a feature whose causes were not computed in both graphs
are left out, and counted: that they are missing says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from circuits.graph.alignment import Alignment, node_keys, prompt_tokens
from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.rows import NodeRow, node_rows
from circuits.graph.text import short_name
from replacement.token_texts import visible

STATUS = ("vanishes", "shared", "appears")
"""Of a node or edge: in the first graph alone, in both, in the second alone; its place is one more than its sign."""


class Columns(NamedTuple):
    """Figures of the M nodes or edges that either graph has, with 0 where a graph does not have one."""

    rows: np.ndarray
    """int64[M, 2], number in each graph; -1 where it does not have it."""
    size: np.ndarray
    """float64[M, 2], activation of a node (0 if it is no feature) or weight of an edge in each graph."""
    influence: np.ndarray
    """float64[M, 2], share of the output that passes through it; a target's own share included."""

    @property
    def status(self) -> np.ndarray:
        """int64[M], the place in `STATUS`."""
        has = self.rows >= 0
        return has[:, 1].astype(np.int64) - has[:, 0] + 1

    def differing(self) -> np.ndarray:
        """Those with any difference, the largest change of influence first, then of size; equal ones in order."""
        change, size = (np.abs(np.diff(column)[:, 0]) for column in (self.influence, self.size))
        order = np.lexsort((-size, -change))
        return order[(change[order] > 0) | (size[order] > 0) | (self.status[order] != 1)]

    def overlap(self, mask: np.ndarray) -> dict[str, Any]:
        """How far the two agree in the nodes or edges of a mask: counts; the share of all that is shared (Jaccard); and the sum
        of the smaller over the sum of the larger influence of each."""
        counts = np.bincount(self.status[mask], minlength=3).tolist()
        influence = self.influence[mask]
        larger = influence.max(1).sum()
        return {
            "shared": counts[1],
            "only_first": counts[0],
            "only_second": counts[2],
            "jaccard": counts[1] / max(sum(counts), 1),
            "influence_overlap": float(influence.min(1).sum() / larger) if larger else 1.0,
        }


@dataclass(frozen=True, eq=False)
class GraphDifference:
    """Two graphs side by side."""

    first: GraphData
    second: GraphData
    alignment: Alignment
    kinds: np.ndarray
    """int8[M], `NodeKind` of each node of `nodes`."""
    nodes: Columns
    edges: Columns
    ends: np.ndarray
    """int64[E, 2], source and target of each edge, as numbers in `nodes`."""
    not_compared: int
    """Edges into a feature that is not expanded in the other graph."""

    def facts(self, most: int) -> dict[str, Any]:
        """JSON facts, with the `most` largest changes of nodes and edges; see the README of this room."""
        features = self.kinds == NodeKind.FEATURE
        all_edges = np.ones(len(self.ends), dtype=bool)
        differing_nodes, differing_edges = self.nodes.differing(), self.edges.differing()
        differing_nodes = differing_nodes[~np.isin(self.kinds[differing_nodes], (NodeKind.TOKEN, NodeKind.POSITION))]
        return {
            "prompts": [graph.metadata["prompt"] for graph in (self.first, self.second)],
            "tokens": self._tokens(),
            "overlap": {"features": self.nodes.overlap(features), "edges": self.edges.overlap(all_edges)},
            "differing": {"nodes": len(differing_nodes), "edges": len(differing_edges)},
            "edges_not_compared": self.not_compared,
            "nodes": [self._node_facts(node) for node in differing_nodes[:most].tolist()],
            "edges": [self._edge_facts(edge) for edge in differing_edges[:most].tolist()],
        }

    def _tokens(self) -> list[dict[str, Any]]:
        """Positions with different tokens, or that only one prompt has."""
        texts: dict[int, list[str | None]] = {}
        for side, graph in enumerate((self.first, self.second)):
            tokens = graph.metadata["tokens"]
            for position, token in zip(self.alignment.positions(len(tokens)).tolist(), tokens, strict=True):
                texts.setdefault(position, [None, None])[side] = visible(token)
        return [{"position": position, "texts": pair} for position, pair in sorted(texts.items()) if pair[0] != pair[1]]

    def _node_facts(self, node: int) -> dict[str, Any]:
        return {
            "kind": NodeKind(int(self.kinds[node])).name.lower(),
            **self._named(node),
            "status": STATUS[self.nodes.status[node]],
            "activation": self.nodes.size[node].tolist(),
            "influence": self.nodes.influence[node].tolist(),
            "influence_change": float(np.diff(self.nodes.influence[node])[0]),
        }

    def _edge_facts(self, edge: int) -> dict[str, Any]:
        source, target = self.ends[edge].tolist()
        return {
            "source": self._named(source),
            "target": self._named(target),
            "status": STATUS[self.edges.status[edge]],
            "weight": self.edges.size[edge].tolist(),
            "weight_change": float(np.diff(self.edges.size[edge])[0]),
            "influence": self.edges.influence[edge].tolist(),
            "influence_change": float(np.diff(self.edges.influence[edge])[0]),
        }

    def _named(self, node: int) -> dict[str, Any]:
        """Names in both graphs (None where it is not), and labels: those of a token may be two."""
        rows = self.nodes.rows[node].tolist()
        sides = zip((self.first, self.second), self._described, rows, strict=True)
        labels = dict.fromkeys(short_name(graph.nodes, row) for graph, _, row in sides if row >= 0)
        names = [side[row].name if row >= 0 else None for side, row in zip(self._described, rows, strict=True)]
        return {"names": names, "label": " → ".join(labels)}

    @cached_property
    def _described(self) -> tuple[tuple[NodeRow, ...], ...]:
        """All nodes of each graph."""
        return tuple(
            node_rows(graph, np.arange(len(graph.nodes)), np.zeros(len(graph.nodes)))
            for graph in (self.first, self.second)
        )


def difference(first: GraphData, second: GraphData) -> GraphDifference:
    """Compare two graphs.

    Raises:
        ValueError: prompts that cannot be aligned.
    """
    graphs = (first, second)
    alignment = Alignment.of([prompt_tokens(graph.metadata) for graph in graphs])
    keys = [node_keys(graph.nodes, alignment.positions(len(graph.metadata["tokens"]))) for graph in graphs]
    all_keys = np.unique(np.concatenate(keys))
    numbers = [np.searchsorted(all_keys, own) for own in keys]
    kinds = np.zeros(len(all_keys), dtype=np.int8)
    for graph, own in zip(graphs, numbers, strict=True):
        kinds[own] = graph.nodes.kind
    nodes = _side_by_side(
        numbers,
        [graph.nodes.activation for graph in graphs],
        [node_influence(graph) + graph.nodes.output_weight for graph in graphs],
        n_rows=len(all_keys),
    )
    pairs = [
        own[graph.edges.target] * len(all_keys) + own[graph.edges.source]
        for graph, own in zip(graphs, numbers, strict=True)
    ]
    all_pairs = np.unique(np.concatenate(pairs))
    edges = _side_by_side(
        [np.searchsorted(all_pairs, own) for own in pairs],
        [graph.edges.weight for graph in graphs],
        [edge_influence(graph) for graph in graphs],
        n_rows=len(all_pairs),
    )
    target, source = np.divmod(all_pairs, len(all_keys))
    unexpanded = [own[graph.nodes.unexpanded] for graph, own in zip(graphs, numbers, strict=True)]
    known = ~np.isin(target, np.concatenate(unexpanded))
    return GraphDifference(
        first,
        second,
        alignment=alignment,
        kinds=kinds,
        nodes=nodes,
        edges=Columns(*(column[known] for column in edges)),
        ends=np.stack([source, target], axis=1)[known],
        not_compared=int((~known).sum()),
    )


def _side_by_side(
    numbers: list[np.ndarray], size: list[np.ndarray], influence: list[np.ndarray], *, n_rows: int
) -> Columns:
    rows, sizes, shares = np.full((n_rows, 2), -1, dtype=np.int64), np.zeros((n_rows, 2)), np.zeros((n_rows, 2))
    for side, own in enumerate(numbers):
        rows[own, side] = np.arange(len(own))
        sizes[own, side] = size[side]
        shares[own, side] = influence[side]
    return Columns(rows, sizes, shares)
