"""One attention score divided among pairs of nodes, as a value: what `circuits.heads.qk_attribution` makes.

N query nodes, M key nodes. Each side lists its nodes with an effect, then its constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Group

from circuits.graph.nodes import NodeKind, node_id
from circuits.graph.text import head_name, printable
from replacement.console import section, table
from replacement.notebook import repr_html
from replacement.number_checks import integer

ROWS_AT_ONCE = 1024
"""Query nodes whose pairs are held at once."""

Labeller = Callable[[Sequence[int]], list[str]]
"""Readable texts of some source columns, which rise."""


@dataclass(frozen=True, slots=True)
class SourceNode:
    """A node that writes to the residual stream, or the constants of one side."""

    kind: NodeKind | None
    """None for the constants."""
    part: str = "mlp"
    """`mlp` or `attention`: whose output an error or feature is of."""
    layer: int = -1
    """Layer of an error or feature; -1 elsewhere."""
    position: int = -1
    index: int = -1
    """Feature: index in its group. Token: vocabulary id. -1 elsewhere."""
    label: str = ""
    """Readable text; empty until a node is shown."""
    column: int = -1
    """Source column of the prompt (see `circuits.attribution.columns`); -1 for the constants."""

    @property
    def id(self) -> str:
        """The id of this node in graphs (see `NodeTable.ids`); `constants` for the constants."""
        if self.kind is None:
            return "constants"
        of_attention = self.part == "attention"
        return node_id(self.kind, layer=self.layer, position=self.position, index=self.index, of_attention=of_attention)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        facts = asdict(self)
        del facts["column"]
        return {**facts, "kind": "bias" if self.kind is None else self.kind.name.lower()}


@dataclass(frozen=True, slots=True, eq=False)
class QKAttribution:
    """One attention score, divided among pairs of a query node and a key node. The last node of each side is its constants.

    Only nodes with an effect are listed. Pairs are kept as two factors, so that long prompts fit in memory.
    """

    layer: int
    head: int
    """Number of the head, or of the query-key group."""
    heads: str
    """`original` heads of the model, or `replaced`: query-key groups of the low-rank sparse attention in their place."""
    query: int
    """Position that attends."""
    key: int
    """Position attended to."""
    contrast: int | str | None
    """Key position whose score is subtracted, `mean` for the mean over the other visible keys, None for neither."""
    score: float
    """The model's own score, before any soft-cap."""
    pattern: float
    """Attention probability of this key."""
    value: float
    """What the pairs sum to: the score, or its difference to the contrast's; from the model itself."""
    query_nodes: tuple[SourceNode, ...]
    key_nodes: tuple[SourceNode, ...]
    query_vectors_NK: np.ndarray
    """float64[N, K], what each query node puts into the query."""
    key_vectors_MK: np.ndarray
    """float64[M, K], what each key node puts into the key (minus its part of the contrast's keys)."""
    identity_error: float
    """Gap between the sum of all pairs and `value`, relative to it or to 1 % of the summed magnitudes of pairs and scores."""
    _labels: Labeller = field(repr=False)

    def __repr__(self) -> str:
        return f"QKAttribution({self.name}, {self.query} attends to {self.key}: {self.value:+.4g})"

    def __rich__(self) -> Group:
        compared: dict[object, str] = {None: "", "mean": ", above the mean of the other visible keys"}
        against = compared.get(self.contrast, f", above the key at {self.contrast}")
        title = (
            f"{self.name}, position {self.query} attends to {self.key} with {self.pattern:.4f}: "
            f"score{against} {self.value:+.4f} = sum of all pairs"
        )
        rows = (
            (node_words(query.to_json()), node_words(key.to_json()), f"{value:+.4f}")
            for query, key, value in self.top()
        )
        return section(title, table("query node", "key node", "contribution", rows=rows, texts=("key node",)))

    _repr_html_ = repr_html

    @property
    def name(self) -> str:
        """`L2H3`, or `L2Q3` for a query-key group."""
        return head_name(self.layer, self.head, heads=self.heads)

    @property
    def pairs(self) -> np.ndarray:
        """float64[N, M], contribution of every pair; made on each access."""
        return self.query_vectors_NK @ self.key_vectors_MK.T

    def top(self, n: int = 10) -> list[tuple[SourceNode, SourceNode, float]]:
        """The n pairs of largest magnitude, with labelled nodes: query node, key node, contribution.

        Raises:
            ValueError: n is below 1.
        """
        pairs: list[tuple[float, int, int]] = []
        for start in range(0, len(self.query_nodes), ROWS_AT_ONCE):
            block = self.query_vectors_NK[start : start + ROWS_AT_ONCE] @ self.key_vectors_MK.T
            for place in _largest(block.ravel(), n):
                row, column = divmod(int(place), block.shape[1])
                pairs.append((float(block[row, column]), start + row, column))
        pairs = sorted(pairs, key=lambda pair: -abs(pair[0]))[:n]
        queries = self._named([self.query_nodes[query] for _, query, _ in pairs])
        keys = self._named([self.key_nodes[key] for _, _, key in pairs])
        return list(zip(queries, keys, (value for value, _, _ in pairs), strict=True))

    def by_query(self, n: int = 10) -> list[tuple[SourceNode, float]]:
        """The n query nodes of largest magnitude, each with the sum of its pairs.

        Raises:
            ValueError: n is below 1.
        """
        return self._marginal(self.query_nodes, self.query_vectors_NK @ self.key_vectors_MK.sum(0), n)

    def by_key(self, n: int = 10) -> list[tuple[SourceNode, float]]:
        """The same for key nodes."""
        return self._marginal(self.key_nodes, self.key_vectors_MK @ self.query_vectors_NK.sum(0), n)

    def to_json(self, n: int = 50) -> dict[str, Any]:
        """What it says, as plain values for JSON: the facts, and the top n pairs and nodes of each side."""
        facts = (
            "layer",
            "head",
            "heads",
            "name",
            "query",
            "key",
            "contrast",
            "score",
            "pattern",
            "value",
            "identity_error",
        )
        pairs = ((query.to_json(), key.to_json(), value) for query, key, value in self.top(n))
        return {
            **{name: getattr(self, name) for name in facts},
            "pairs": [{"query": query, "key": key, "contribution": value} for query, key, value in pairs],
            "by_query": [node.to_json() | {"contribution": value} for node, value in self.by_query(n)],
            "by_key": [node.to_json() | {"contribution": value} for node, value in self.by_key(n)],
        }

    def contributors(self, n: int = 10) -> dict[str, list[list[Any]]]:
        """The top n pairs and nodes of each side by id, in the form of `qk_tracing_results` of Neuronpedia's graph JSON; for
        `CircuitGraph.with_qk_results`.
        """
        return {
            "pair_wise_contributors": [[query.id, key.id, value] for query, key, value in self.top(n)],
            "top_q_marginal_contributors": [[node.id, value] for node, value in self.by_query(n)],
            "top_k_marginal_contributors": [[node.id, value] for node, value in self.by_key(n)],
        }

    def _marginal(self, nodes: tuple[SourceNode, ...], sums: np.ndarray, n: int) -> list[tuple[SourceNode, float]]:
        chosen = _largest(sums, n)
        return list(zip(self._named([nodes[i] for i in chosen]), sums[chosen].tolist(), strict=True))

    def _named(self, nodes: Sequence[SourceNode]) -> list[SourceNode]:
        """The same nodes with their labels."""
        columns = sorted({node.column for node in nodes if node.kind is not None})
        labels = dict(zip(columns, self._labels(columns), strict=True)) | {-1: "constants"}
        return [replace(node, label=labels[node.column]) for node in nodes]


def node_words(node: Mapping[str, Any]) -> str:
    """A node as `SourceNode.to_json` gives it, in words, as `circuits.graph.text.full_name` writes them."""
    label = printable(node["label"]).strip()
    if node["kind"] == "feature":
        part = "attention " if node["part"] == "attention" else ""
        return f"{part}feature {node['layer']}/{node['index']} at {node['position']}" + (f" ({label})" if label else "")
    if node["kind"] == "token":
        return f'token "{label}" at {node["position"]}'
    return f"{label} at {node['position']}" if node["kind"] == "error" else label


def summed_magnitudes(queries_NK: np.ndarray, keys_MK: np.ndarray) -> float:
    """Sum of |Q_n . K_m| over all pairs."""
    starts = range(0, len(queries_NK), ROWS_AT_ONCE)
    return sum(float(np.abs(queries_NK[start : start + ROWS_AT_ONCE] @ keys_MK.T).sum()) for start in starts)


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """Places of the n values of largest magnitude, in falling order."""
    if integer("n", n) < 1:
        raise ValueError(f"expected to show at least one, got n={n}")
    size = np.abs(values)
    chosen = np.argpartition(-size, n - 1)[:n] if n < len(size) else np.arange(len(size))
    return chosen[np.argsort(-size[chosen], kind="stable")]
