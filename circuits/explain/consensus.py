"""The consensus of many prompts: how often each node and edge occurs, its mean and spread, and the mean graph.

In the mean graph, a circuit itself, the weight of an edge, and value, bias, inflow and output weight of a node, are means over
ALL prompts, with 0 for those that do not have it. Because means are linear, `value = sum of incoming edges + bias` holds there,
too, and scores are defined: what has opposite signs in two prompts cancels in the edge, stays in the inflow, counts as lost.
Where the causes of a node were not computed in some prompts, its inflow there is taken to be that of the others, and counts as
lost as well. The activation of a feature is a mean over the prompts that have it. The mean of copies of a graph is that graph.

Outputs: where the prompts' targets differ, they become one node, the answer. Its row is the mean of each prompt's targets,
weighted with their share of the output: a circuit of many sums says what moves the answer, whichever number that is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from circuits.explain.mean_graph import EDGE_FIGURES, FIGURES, GraphSums
from circuits.explain.moments import Moments
from circuits.graph.alignment import Alignment, prompt_tokens
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.graph_files import GraphFiles
from circuits.graph.metadata import CONSENSUS
from circuits.graph.nodes import NodeKind
from circuits.graph.pruning import check_threshold
from circuits.graph.rows import node_rows
from circuits.graph.text import short_name


@dataclass(frozen=True, eq=False)
class Consensus:
    """What graphs of many prompts share. Means and spreads are over the prompts that have the node or edge."""

    n_graphs: int
    alignment: Alignment
    merges_outputs: bool
    """Whether the prompts' targets differ and are one node here."""
    graph: CircuitGraph
    """The mean graph, of all nodes and edges that any prompt has."""
    nodes: Moments
    """Of its nodes, in the order of `FIGURES`."""
    edges: Moments
    """Of its edges, in the order of `EDGE_FIGURES`."""

    @property
    def node_frequency(self) -> np.ndarray:
        """float64[N], share of the prompts that have the node."""
        return np.asarray(self.nodes.counts / self.n_graphs)

    @property
    def edge_frequency(self) -> np.ndarray:
        """float64[E], share of the prompts that have the edge."""
        return np.asarray(self.edges.counts / self.n_graphs)

    def circuit(self, frequency: float = 0.5) -> CircuitGraph:
        """The mean graph of the nodes and edges that at least this share of the prompts has; all others count as lost.

        Targets stay. Raises `ValueError` for a share outside 0..1.
        """
        check_threshold("frequency", frequency, what="share of the prompts")
        nodes = (self.node_frequency >= frequency) | self.graph.nodes.is_target
        circuit = self.graph.select(nodes, self.edge_frequency >= frequency)
        figures = (self._figures(self.nodes, row, "activation", "influence") for row in np.flatnonzero(nodes).tolist())
        by_id = dict(zip(circuit.nodes.ids(), figures, strict=True))
        note = {"prompts": self.n_graphs, "frequency": float(frequency), "nodes": by_id}
        return replace(circuit, metadata={**circuit.metadata, CONSENSUS: note})

    def facts(self, *, frequency: float = 0.5, most: int = 20) -> dict[str, Any]:
        """JSON facts, with the `most` features and edges of the largest mean influence; see the README of this room."""
        circuit, nodes = self.circuit(frequency), self.graph.nodes
        features, edges = np.flatnonzero(nodes.mask(NodeKind.FEATURE)), np.arange(len(self.edges.keys))
        of_nodes = _mean_of_all(self.nodes, FIGURES.index("influence"), self.n_graphs)
        of_edges = _mean_of_all(self.edges, EDGE_FIGURES.index("influence"), self.n_graphs)
        named = node_rows(self.graph, np.arange(len(nodes)), of_nodes)
        top_edges = np.argsort(-of_edges, kind="stable")[:most]
        source, target = (end[top_edges].tolist() for end in (self.graph.edges.source, self.graph.edges.target))
        return {
            "prompts": self.n_graphs,
            "tokens": self.graph.metadata["tokens"],
            "outputs": "merged" if self.merges_outputs else "kept",
            "circuit": {
                "frequency": frequency,
                "nodes": len(circuit.nodes),
                "edges": len(circuit.edges),
                **asdict(circuit.scores()),
            },
            "counts": {
                name: self._counts(moments.counts[rows], frequency)
                for name, moments, rows in (("features", self.nodes, features), ("edges", self.edges, edges))
            },
            "features": [
                {
                    "name": named[row].name,
                    "label": named[row].label,
                    **self._figures(self.nodes, row, "activation", "influence"),
                    "influence_of_all": float(of_nodes[row]),
                }
                for row in features[np.argsort(-of_nodes[features], kind="stable")][:most].tolist()
            ],
            "edges": [
                {
                    **{
                        end: {"name": named[row].name, "label": short_name(nodes, row)}
                        for end, row in zip(("source", "target"), ends, strict=True)
                    },
                    **self._figures(self.edges, edge, *EDGE_FIGURES),
                    "influence_of_all": float(of_edges[edge]),
                }
                for edge, *ends in zip(top_edges.tolist(), source, target, strict=True)
            ],
        }

    def _counts(self, counts: np.ndarray, frequency: float) -> dict[str, int]:
        """How many are in any prompt, in that share of them, in all, and in one alone."""
        of_circuit, of_all = counts / self.n_graphs >= frequency, counts == self.n_graphs
        figures = {"any": len(counts), "circuit": of_circuit.sum(), "all": of_all.sum(), "one": (counts == 1).sum()}
        return {name: int(count) for name, count in figures.items()}

    def _figures(self, moments: Moments, row: int, *names: str) -> dict[str, float]:
        """Frequency, and mean and spread of some figures over the prompts that have a node or edge."""
        known = EDGE_FIGURES if moments is self.edges else FIGURES
        figures = {"frequency": float(moments.counts[row] / self.n_graphs)}
        for name in names:
            column = known.index(name)
            figures[name] = float(moments.mean[row, column])
            figures[f"{name}_spread"] = float(moments.spread(row)[column])
        return figures


def _mean_of_all(moments: Moments, column: int, n_graphs: int) -> np.ndarray:
    """float64[K], the mean over all prompts of a figure that is 0 where there is none."""
    return np.asarray(moments.mean[:, column] * moments.counts / n_graphs)


def consensus(files: GraphFiles, *, progress: Callable[[int], None] | None = None) -> Consensus:
    """Read graphs one after the other; memory grows with the different nodes and edges, not with the number of prompts.

    Headers are read first: prompts are aligned, and their targets compared.

    Raises:
        ValueError: no graphs, a file that is none, another model or crosscoder, or prompts that cannot be aligned.
    """
    outputs = set()

    def prompts() -> Iterator[Sequence[Hashable]]:
        for _, facts in files.metadata():
            outputs.add(_outputs(facts))
            yield prompt_tokens(facts)

    alignment = Alignment.of(prompts())
    sums = GraphSums(alignment, merges_outputs=len(outputs) > 1)
    for _, graph in files.graphs(progress):
        sums.add(graph)
    return Consensus(sums.n_graphs, alignment, sums.merges_outputs, *sums.mean())


def _outputs(facts: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """The targets of a graph, with positions counted from the end."""
    length = len(facts["tokens"])
    return tuple(
        (target.get("token"), target.get("token_id"), length - target.get("position", length))
        for target in facts.get("targets", ())
    )
