"""The paths from tokens to the output that carry most: the circuit in a few sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, row_scales
from circuits.graph.nodes import NodeKind
from circuits.graph.text import full_name


@dataclass(frozen=True)
class StrongPath:
    """A path from a token to the output."""

    nodes: tuple[int, ...]
    """Numbers of its nodes, from the token to the target."""
    share: float
    """The target's output weight times the product of the shares M of its edges: the part of all influence that runs along
    exactly this path."""


def strongest_paths(graph: GraphData, most: int = 5) -> list[StrongPath]:
    """The strongest path of each token to the target with the largest output weight; the `most` strongest of them, by share.

    Empty when no token reaches that target. Of equally strong paths the one that starts at the earliest token comes first.
    """
    edges, nodes = graph.edges, graph.nodes
    scales = row_scales(graph)
    target = int(np.argmax(nodes.output_weight))
    best = np.full(len(nodes), -np.inf)
    best[target] = 0.0
    towards = np.full(len(nodes), -1)
    for node in np.concatenate(edges.levels):
        if best[node] == -np.inf:
            continue
        row = slice(edges.indptr[node], edges.indptr[node + 1])
        with np.errstate(divide="ignore"):  # sums of logarithms do not underflow on long paths
            through = best[node] + np.log(np.abs(edges.weight[row]) * scales[node])
        better = through > best[edges.source[row]]
        best[edges.source[row][better]] = through[better]
        towards[edges.source[row][better]] = node
    tokens = np.flatnonzero(nodes.mask(NodeKind.TOKEN) & np.isfinite(best))
    paths = []
    for token in tokens[np.argsort(-best[tokens], kind="stable")][:most].tolist():
        path = [token]
        while towards[path[-1]] >= 0:
            path.append(int(towards[path[-1]]))
        paths.append(StrongPath(tuple(path), float(nodes.output_weight[target] * np.exp(best[token]))))
    return paths


def strongest_path(graph: GraphData) -> tuple[int, ...]:
    """Nodes of the first of `strongest_paths`; empty when there is none."""
    paths = strongest_paths(graph, most=1)
    return paths[0].nodes if paths else ()


def average_path_length(graph: GraphData) -> float:
    """Mean number of edges on the paths from the output back to where they end, weighted with their influence.

    Paths end at inputs, errors, features that were not expanded, and removed edges. It is the sum of all edge influences.
    """
    return float(edge_influence(graph).sum())


def describe_path(graph: GraphData, path: Sequence[int]) -> str:
    """A path in words: names of its nodes joined by arrows that carry the sign of each edge.

    Raises `ValueError` when two neighbours on the path are not joined by an edge.
    """
    if not path:
        return "no path from a token to the output"
    edges, words = graph.edges, [full_name(graph.nodes, path[0])]
    for source, target in itertools.pairwise(path):
        row = slice(edges.indptr[target], edges.indptr[target + 1])
        weight = edges.weight[row][edges.source[row] == source]
        if not len(weight):
            raise ValueError(
                f"describe_path: expected a path along edges, given none from node {source} to node {target}"
            )
        sign = "+" if weight[0] > 0 else "−"
        words.append(f"—({sign})→ {full_name(graph.nodes, target)}")
    return " ".join(words)
