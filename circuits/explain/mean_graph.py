"""The mean graph of many prompts, collected graph by graph; what its figures mean is said in `circuits.explain.consensus`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from circuits.explain.moments import Moments, MomentsOfMany
from circuits.graph.alignment import Alignment, node_keys
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edges import Edges
from circuits.graph.feature_labels import FEATURE_LABELS, feature_key
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.metadata import CONSENSUS
from circuits.graph.nodes import COLUMNS, NodeKind, NodeTable
from replacement.token_texts import visible

FIGURES = ("activation", "probability", "output_weight", "expanded", "value", "bias", "inflow", "influence")
"""Of a node, those that are collected."""
EDGE_FIGURES = ("weight", "influence")
_OF_ROW = ("expanded", "value", "bias", "inflow")
_ANSWER = 2**62
"""Key of the one output that stands for all, above all others."""
_FIRST_FACTS = (
    "model",
    "model_fingerprint",
    "loaded_from",
    "n_layers",
    "crosscoder",
    "crosscoder_fingerprint",
    "attention",
)
_SHOWN_TEXTS = 2


class MeanGraph(NamedTuple):
    """The mean graph, and what is known of its nodes and edges over the graphs that have them."""

    graph: CircuitGraph
    nodes: Moments
    """Of its nodes, in the order of `FIGURES`."""
    edges: Moments
    """Of its edges, in the order of `EDGE_FIGURES`."""


class GraphSums:
    """Sums over graphs. Nodes have numbers in the order in which they first come."""

    def __init__(self, alignment: Alignment, *, merges_outputs: bool) -> None:
        self.alignment, self.merges_outputs, self.n_graphs = alignment, merges_outputs, 0
        self.numbers: dict[int, int] = {}
        self.columns: dict[str, list[np.ndarray]] = defaultdict(list)  # of the node table, and `key`
        self.nodes, self.edges = MomentsOfMany(len(FIGURES)), MomentsOfMany(len(EDGE_FIGURES))
        self.texts: dict[int, Counter[tuple[int, str]]] = defaultdict(Counter)  # of each node: index and label
        self.tokens: list[Counter[str]] = [Counter() for _ in range(alignment.length)]
        self.prompts: set[str] = set()  # two at most: do they differ?
        self.answer_position = 0
        self.facts: dict[str, Any] = {}
        self.labels: dict[str, Any] = {}
        self.identity_errors: list[float | None] = []

    def add(self, graph: CircuitGraph) -> None:
        """Take one graph."""
        positions = self.alignment.positions(len(graph.metadata["tokens"]))
        keys, weights = self._keys(graph.nodes, positions)
        numbers = self._numbered(graph.nodes, keys, positions)
        influence = node_influence(graph) + graph.nodes.output_weight
        columns = {**{name: getattr(graph.nodes, name) for name in FIGURES[:-1]}, "influence": influence}
        figures = np.stack([columns[name] * (weights if name in _OF_ROW else 1.0) for name in FIGURES], axis=1)
        source, target = graph.edges.source, graph.edges.target
        edge_figures = np.stack([graph.edges.weight * weights[target], edge_influence(graph)], axis=1)
        pairs = (numbers[target] << 32) | numbers[source]
        self.nodes.add(*_summed(numbers, figures) if self.merges_outputs else (numbers, figures))
        self.edges.add(*_summed(pairs, edge_figures) if self.merges_outputs else (pairs, edge_figures))
        self._add_texts(graph, numbers, positions)
        self.n_graphs += 1

    def _keys(self, nodes: NodeTable, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[N], keys of nodes; and float64[N], what each row is multiplied with."""
        keys, weights, outputs = node_keys(nodes, positions), np.ones(len(nodes)), nodes.mask(NodeKind.LOGIT)
        if self.merges_outputs and outputs.any():
            keys[outputs] = _ANSWER
            self.answer_position = max(self.answer_position, int(positions[nodes.position[outputs]].max()))
            weights[outputs] = nodes.output_weight[outputs] / nodes.output_weight[outputs].sum()
        return keys, weights

    def _numbered(self, nodes: NodeTable, keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64[N], number of each node; those of new keys are noted with their columns."""
        known = len(self.numbers)
        numbers = np.array([self.numbers.setdefault(key, len(self.numbers)) for key in keys.tolist()], dtype=np.int64)
        _, first = np.unique(numbers, return_index=True)
        new = first[numbers[first] >= known]
        for name in ("kind", "part", "layer"):
            self.columns[name].append(getattr(nodes, name)[new])
        self.columns["position"].append(positions[nodes.position[new]])
        self.columns["key"].append(keys[new])
        return numbers

    def _add_texts(self, graph: CircuitGraph, numbers: np.ndarray, positions: np.ndarray) -> None:
        for number, index, label in zip(numbers.tolist(), graph.nodes.index.tolist(), graph.nodes.label, strict=True):
            self.texts[number][index, label] += 1
        for position, token in zip(positions.tolist(), graph.metadata["tokens"], strict=True):
            self.tokens[position][token] += 1
        if len(self.prompts) < 2:
            self.prompts.add(graph.metadata["prompt"])
        self.labels |= graph.metadata.get(FEATURE_LABELS, {})
        self.identity_errors.append(graph.identity_error)
        self.facts = self.facts or {name: graph.metadata[name] for name in _FIRST_FACTS if name in graph.metadata}

    def mean(self) -> MeanGraph:
        """The result."""
        nodes, edges = self.nodes.result(), self.edges.result()
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        key = columns.pop("key")
        columns["position"][key == _ANSWER] = self.answer_position
        # Outputs stay in the order in which they came, as the targets of a graph do.
        order = np.lexsort((np.where(columns["kind"] == NodeKind.LOGIT, nodes.keys, key), columns["kind"]))
        row = np.argsort(order)
        nodes = Moments(*(column[order] for column in nodes))
        columns = {name: column[order] for name, column in columns.items()}
        texts = [self.texts[number] for number in order.tolist()]
        indices = [{index for index, _ in counted} for counted in texts]
        columns["index"] = np.array([found.pop() if len(found) == 1 else -1 for found in indices])  # tokens that differ
        # The labels of a feature are names of one thing, those of a token or output are different things.
        shown = np.where(columns["kind"] == NodeKind.FEATURE, 1, _SHOWN_TEXTS).tolist()
        labels = [_joined(_by_label(counted), most) for counted, most in zip(texts, shown, strict=True)]
        table = _mean_table(columns, nodes, labels, self.n_graphs)

        target, source = row[edges.keys >> 32], row[edges.keys & (2**32 - 1)]
        in_rows = np.lexsort((source, target))
        edges = Moments(*(column[in_rows] for column in edges))
        weight = edges.mean[:, 0] * (edges.counts / self.n_graphs)
        mean_edges = Edges.from_coo(target[in_rows], source[in_rows], weight, n_nodes=len(table))
        graph = CircuitGraph(table, mean_edges, self._metadata(table))
        return MeanGraph(graph, nodes, edges)

    def _metadata(self, nodes: NodeTable) -> dict[str, Any]:
        is_known = None not in self.identity_errors
        features = zip(nodes.of_attention.tolist(), nodes.layer.tolist(), nodes.index.tolist(), strict=True)
        names = {feature_key("attention" if attention else "mlp", layer, index) for attention, layer, index in features}
        return {
            **self.facts,
            "prompt": next(iter(self.prompts)) if len(self.prompts) == 1 else f"consensus of {self.n_graphs} prompts",
            "tokens": [_joined(texts) for texts in self.tokens],
            "identity_error": max(filter(None, self.identity_errors), default=0.0) if is_known else None,
            FEATURE_LABELS: {name: self.labels[name] for name in sorted(names & self.labels.keys())},
            CONSENSUS: {"prompts": self.n_graphs, "frequency": 0.0},
        }


def _summed(keys: np.ndarray, figures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, with the sum of its figures."""
    unique, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(unique), figures.shape[1]))
    np.add.at(sums, inverse, figures)
    return unique, sums


def _mean_table(columns: dict[str, np.ndarray], nodes: Moments, labels: Sequence[str], n_graphs: int) -> NodeTable:
    """The nodes of the mean graph."""
    frequency, mean = nodes.counts / n_graphs, dict(zip(FIGURES, nodes.mean.T, strict=True))
    expanded = mean["expanded"] > 0
    of_all = {name: mean[name] * frequency for name in ("probability", "output_weight", "value", "bias", "inflow")}
    of_all["inflow"][expanded] /= mean["expanded"][expanded]
    figures = {**of_all, "activation": mean["activation"], "expanded": expanded}
    table = {name: (columns | figures)[name].astype(dtype) for name, dtype in COLUMNS.items()}
    return NodeTable(**table, label=tuple(labels))


def _by_label(counted: Counter[tuple[int, str]]) -> Counter[str]:
    labels: Counter[str] = Counter()
    for (_, label), count in counted.items():
        labels[label] += count
    return labels


def _joined(texts: Counter[str], most: int = _SHOWN_TEXTS) -> str:
    """A text that all share, or the most frequent ones and how many there are; of at most one, the most frequent alone."""
    ranked = sorted((text for text in texts if text), key=lambda text: (-texts[text], text))
    if len(ranked) <= 1 or most == 1:
        return "".join(ranked[:1])
    return f"{', '.join(map(visible, ranked[:most]))}{' …' if len(ranked) > most else ''} ({len(ranked)})"
