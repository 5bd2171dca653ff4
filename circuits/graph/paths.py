"""The paths from tokens to the output that carry most: the circuit in a few sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, node_influence, row_scales
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.outputs import group_name, output_groups
from circuits.graph.text import full_name, short_name
from replacement.token_texts import visible


@dataclass(frozen=True)
class StrongPath:
    """A path from an input token to a target, or to a group of outputs that read as one (`circuits.graph.outputs`).

    A learned position counts as a part of the token at its place.
    """

    nodes: tuple[int, ...]
    """Numbers of its nodes, from the input to the target; of a group of outputs, to the one that it reaches most."""
    targets: tuple[int, ...]
    """The target, or all outputs of the group."""
    share: float
    """The target's output weight times the product of the shares M of its edges: the part of all influence that runs along
    exactly this path. Of a group of outputs, the sum over all of them."""
    token_share: float
    """Influence of the token through all paths of the graph."""
    direct_share: float
    """The part of it that reaches targets through no feature."""


def strongest_paths(graph: GraphData, most: int = 5) -> list[StrongPath]:
    """The strongest path of each input token that passes through a feature, the `most` strongest of them.

    Tokens that reach the output through no feature come last, with their strongest edge. Of paths that read alike (the same
    texts of token, features and target) the strongest alone is listed. Of equal ones the earliest token's comes first.
    """
    nodes, steps = graph.nodes, _Steps(graph)
    mass, direct = node_influence(graph), steps.direct_share
    inputs = np.flatnonzero(nodes.mask(NodeKind.TOKEN, NodeKind.POSITION))
    paths = []
    for position in np.unique(nodes.position[inputs]).tolist():
        here = inputs[nodes.position[inputs] == position]
        candidates = [steps.path(node) for node in here.tolist() if np.isfinite(steps.once[node])]
        if candidates:
            path, strength = max(candidates, key=lambda found: (len(found[0]) > 2, found[1]))
            totals = (float(shares[here].sum()) for shares in (mass, direct))
            paths.append(StrongPath(path, steps.group_of.get(path[-1], path[-1:]), float(np.exp(strength)), *totals))
    paths.sort(key=lambda path: (len(path.nodes) == 2, -path.share))
    distinct = {_reads(graph, path): path for path in reversed(paths)}
    return [path for path in paths if distinct[_reads(graph, path)] is path][:most]


class _Steps:
    """The best continuation of every node towards a target, by the product of shares; sums of logarithms do not underflow.

    Attributes:
        once: float64[N], logarithm of the best product over paths of at least one edge.
        twice: float64[N], the same of at least two.
        direct_share: float64[N], the sum over single edges into targets.
        group_of: output -> the group that it is in.
    """

    def __init__(self, graph: GraphData) -> None:
        edges, scales, n_nodes = graph.edges, row_scales(graph), len(graph.nodes)
        self.once, self.twice, self.direct_share = (
            np.full(n_nodes, -np.inf),
            np.full(n_nodes, -np.inf),
            np.zeros(n_nodes),
        )
        self._after_once, self._after_twice = np.full(n_nodes, -1), np.full(n_nodes, -1)
        self.group_of = {node: group for group in output_groups(graph.nodes) for node in group}
        joined = {
            group: (np.zeros(n_nodes), np.zeros(n_nodes), np.full(n_nodes, -1)) for group in self.group_of.values()
        }
        with np.errstate(divide="ignore"):
            self._ends = np.log(graph.nodes.output_weight)
            for node in np.concatenate(edges.levels).tolist():  # those that feed nothing, so all outputs, come first
                row = slice(edges.indptr[node], edges.indptr[node + 1])
                source, share = edges.source[row], np.abs(edges.weight[row]) * scales[node]
                ends = graph.nodes.output_weight[node] * share
                self.direct_share[source] += ends
                if node in self.group_of:
                    total, best, member = joined[self.group_of[node]]
                    _raise(best, member, source, ends, np.full(len(source), node))
                    total[source] += ends
                    _raise(self.once, self._after_once, source, np.log(total[source]), member[source])
                    continue
                step, following = np.log(share), np.full(len(source), node)
                _raise(self.once, self._after_once, source, step + max(self._ends[node], self.once[node]), following)
                _raise(self.twice, self._after_twice, source, step + self.once[node], following)

    def path(self, start: int) -> tuple[tuple[int, ...], float]:
        """The best path of an input with a feature on it, or else the best edge, and the logarithm of its product."""
        through_feature = bool(np.isfinite(self.twice[start]))
        node = int((self._after_twice if through_feature else self._after_once)[start])
        path = [start, node]
        while (through_feature and len(path) == 2) or self.once[node] > self._ends[node]:
            node = int(self._after_once[node])
            path.append(node)
        return tuple(path), float((self.twice if through_feature else self.once)[start])


def _raise(best: np.ndarray, after: np.ndarray, source: np.ndarray, through: np.ndarray, following: np.ndarray) -> None:
    """Keep the better of what is best and what goes through a node, for each source."""
    better = through > best[source]
    best[source[better]] = through[better]
    after[source[better]] = following[better]


def _reads(graph: GraphData, path: StrongPath) -> tuple[str, ...]:
    """What tells a path from others for a reader: the texts of its nodes, alike neighbours once; names where there are none."""
    nodes = graph.nodes
    token = str(graph.metadata["tokens"][nodes.position[path.nodes[0]]])
    texts = [*(short_name(nodes, node) for node in path.nodes[1:-1]), target_name(nodes, path.targets)]
    return token, *(text for text, _ in itertools.groupby(texts))


def target_name(nodes: NodeTable, targets: Sequence[int]) -> str:
    """What a path leads to: a target's short name, or that of a group of outputs."""
    return short_name(nodes, targets[0]) if len(targets) == 1 else group_name(nodes, targets)


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
    words = [full_name(graph.nodes, path[0])]
    for source, target in itertools.pairwise(path):
        sign = "+" if edge_weight(graph, source, target) > 0 else "−"
        words.append(f"—({sign})→ {full_name(graph.nodes, target)}")
    return " ".join(words)


def path_facts(graph: GraphData, paths: Sequence[StrongPath]) -> list[dict[str, Any]]:
    """Paths as JSON objects: token and position, shares, nodes (id, name, label) and the weights of the edges between them.

    Of a path to a group of outputs, the last node is the output that it reaches most, its label that of the group, the last
    weight the sum over the group, and `outputs` are the ids of all of them.
    """
    ids, nodes, facts = graph.nodes.ids(), graph.nodes, []
    for path in paths:
        position = int(nodes.position[path.nodes[0]])
        steps = [*zip(path.nodes[:-2], zip(path.nodes[1:-1], strict=True), strict=True), (path.nodes[-2], path.targets)]
        labels = [*(short_name(nodes, node) for node in path.nodes[:-1]), target_name(nodes, path.targets)]
        facts.append(
            {
                "token": visible(str(graph.metadata["tokens"][position])),
                "position": position,
                "share": path.share,
                "token_share": path.token_share,
                "direct_share": path.direct_share,
                "nodes": [
                    {
                        "id": ids[node],
                        "name": full_name(nodes, node).partition(" (")[0],
                        "label": label,
                    }
                    for node, label in zip(path.nodes, labels, strict=True)
                ],
                "weights": [edge_weight(graph, source, *targets) for source, targets in steps],
                "outputs": [ids[node] for node in path.targets],
            }
        )
    return facts


def edge_weight(graph: GraphData, source: int, *targets: int) -> float:
    """Weight of the edge between two nodes, or the sum over several targets; raises `ValueError` where there is none."""
    rows = [slice(graph.edges.indptr[target], graph.edges.indptr[target + 1]) for target in targets]
    weight = np.concatenate([graph.edges.weight[row][graph.edges.source[row] == source] for row in rows])
    if not len(weight):
        raise ValueError(
            f"describe_path: expected a path along edges, given none from node {source} to node {targets[0]}"
        )
    return float(weight.sum())
