"""`CircuitGraph`: the circuit of one prompt as a plain value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.display import mime_bundle
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges, GraphData
from circuits.graph.exporters import export, exporter, whole
from circuits.graph.grouping import group
from circuits.graph.groups import GROUPS, Grouping, without_nodes
from circuits.graph.importers.files import load
from circuits.graph.inclusion import EDGES, INCLUSION, NODES, inclusion_facts
from circuits.graph.influence import node_influence
from circuits.graph.metadata import as_stored
from circuits.graph.neuronpedia_schema import QK_RESULTS
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.pruning import drop_small, prune, within_budget
from circuits.graph.rows import EdgeRow, NodeRow, Rows, node_number, node_rows, top_edges, top_nodes
from circuits.graph.scores import Scores, scores
from circuits.graph.storage import save

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False, repr=False)
class CircuitGraph(GraphData):
    """Nodes, edges and metadata of one traced prompt; never changed in place.

    Raises `ValueError` when the parts do not fit together: edges over another number of nodes, output weights that
    do not sum to 1, a node behind the end of the prompt, edges into a node that was not expanded, kept edges that
    exceed the recorded inflow, heads that do not sum to their edge, or metadata that is incomplete or cannot be
    written as JSON.
    """

    def __post_init__(self) -> None:
        for name, kind in (("nodes", NodeTable), ("edges", Edges)):
            if not isinstance(getattr(self, name), kind):
                given = type(getattr(self, name)).__name__
                raise ValueError(f"CircuitGraph.{name}: expected {kind.__name__}, given {given}")
        object.__setattr__(self, "metadata", as_stored(self.metadata))
        _check_fit(self.nodes, self.edges, n_tokens=len(self.metadata["tokens"]))
        if self.heads is not None:
            _check_heads(self.heads, self.edges, self.nodes.inflow)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CircuitGraph):
            return NotImplemented
        same = self.nodes == other.nodes and self.edges == other.edges and self.heads == other.heads
        return same and self.metadata == other.metadata

    def __repr__(self) -> str:
        count = self.counts()
        return (
            f"CircuitGraph({self.metadata['prompt']!r}: {count['total']} nodes, {count['features']} features, "
            f"{count['errors']} errors, {count['edges']} edges)"
        )

    @property
    def identity_error(self) -> float | None:
        """Largest relative violation of `value = sum of incoming edges + bias` seen while the full graph was traced.

        Relative to the value, or to 1 % of the summed magnitudes where the value is a smaller remainder of large terms. None
        where it is not known, in graphs of other tools.
        """
        error = self.metadata["identity_error"]
        return None if error is None else float(error)

    def counts(self) -> dict[str, int]:
        """Numbers of nodes by kind (`total`, `features`, `errors`, `tokens`, `positions`, `logits`) and of `edges`."""
        kinds = {"features": NodeKind.FEATURE, "errors": NodeKind.ERROR, "tokens": NodeKind.TOKEN}
        kinds |= {"positions": NodeKind.POSITION, "logits": NodeKind.LOGIT}
        by_kind = {name: int(self.nodes.mask(kind).sum()) for name, kind in kinds.items()}
        return {"total": len(self.nodes), **by_kind, "edges": len(self.edges)}

    def scores(self) -> Scores:
        """Replacement and completeness; whatever was removed or not expanded counts as error."""
        return scores(self)

    def influence(self) -> np.ndarray:
        """float64[N], share of the output that reaches each node through all paths."""
        return node_influence(self)

    def top_nodes(self, count: int | None = 20) -> Rows[NodeRow]:
        """The most influential nodes of all kinds, as rows; all of them for None."""
        return top_nodes(self, count)

    def features(self) -> Rows[NodeRow]:
        """All features, the most influential first, as rows."""
        return top_nodes(self, None, NodeKind.FEATURE)

    def top_edges(self, count: int | None = 20) -> Rows[EdgeRow]:
        """The most influential edges, as rows; all of them for None."""
        return top_edges(self, count)

    def node(self, name: str | int) -> NodeRow:
        """One node: by the name of a feature (`2/345@7`, `attention:2/345@-1`), by id (`2_345_7`) or by number.

        Raises `ValueError` for a node that the graph does not have.
        """
        return node_rows(self, np.array([node_number(self, name)]), node_influence(self) + self.nodes.output_weight)[0]

    def prune(
        self, *, nodes: float = 0.8, edges: float = 0.98, most_nodes: int = 0, most_edges: int = 0
    ) -> CircuitGraph:
        """The smallest subgraph with that share of node influence, then of edge influence (see `circuits/graph/pruning.py`).

        Args:
            nodes, edges: the shares.
            most_nodes, most_edges: a budget besides: at most so many features, errors and positions, and edges; 0 for none.

        What was asked for is noted in `metadata["pruning"]`, and under `before_budget` what a budget that took something away
        found: counts and scores.

        Raises `ValueError` for thresholds outside 0..1, or a budget below 0.
        """
        kept = prune(self, nodes=nodes, edges=edges)
        facts: dict[str, Any] = {"nodes": float(nodes), "edges": float(edges)}
        circuit = self.select(kept.nodes, kept.edges)
        kept = within_budget(circuit, most_nodes=most_nodes, most_edges=most_edges)
        if not (kept.nodes.all() and kept.edges.all()):
            found = {"nodes": len(circuit.nodes), "edges": len(circuit.edges), **asdict(circuit.scores())}
            facts |= {"most_nodes": most_nodes, "most_edges": most_edges, "before_budget": found}
            circuit = circuit.select(kept.nodes, kept.edges)
        return replace(circuit, metadata={**self.metadata, "pruning": facts})

    def select(self, nodes: np.ndarray, edges: np.ndarray) -> CircuitGraph:
        """The nodes where `nodes` (bool[N]) is true, and the edges among them where `edges` (bool[E]) is."""
        graph = super().select(nodes, edges)
        if GROUPS not in self.metadata:
            return graph
        removed = {name for name, kept in zip(self.nodes.ids(), nodes.tolist(), strict=True) if not kept}
        return replace(graph, metadata={**self.metadata, GROUPS: without_nodes(self.metadata[GROUPS], removed)})

    def group(
        self,
        *,
        max_groups: int | None = None,
        neighbours: int | None = 1,
        signatures: np.ndarray | None = None,
    ) -> Grouping:
        """Features that do the same, as groups with names; tokens, errors and outputs in groups of their own.

        How features are compared, and the loss that sets the number of groups: see `circuits/graph/grouping.py`.

        >>> grouping = graph.prune().group()                                           # doctest: +SKIP
        >>> [group.name for group in grouping.groups], grouping.edges()                # doctest: +SKIP

        Args:
            max_groups: most groups of features; of more, the least influential are put together.
            neighbours: how far apart the positions of a group may be; None for any distance.
            signatures: float[N, probes], activation of every feature on probe prompts (rows of other nodes are not read).

        Raises:
            ValueError: `max_groups` below 1, `neighbours` below 0, or signatures of another shape.
        """
        return group(self, max_groups=max_groups, neighbours=neighbours, signatures=signatures)

    def with_groups(self, grouping: Grouping) -> CircuitGraph:
        """The graph with groups in its metadata, where pictures and pages find them.

        Raises:
            ValueError: they are the groups of a graph with other nodes.
        """
        if grouping.graph.nodes.ids() != self.nodes.ids():
            raise ValueError("groups: expected a grouping of this graph's nodes, given one of a graph with other nodes")
        return replace(self, metadata={**self.metadata, GROUPS: grouping.metadata()})

    def drop_edges(self, *, below: float) -> CircuitGraph:
        """Without the edges that are at most the share `below` of their row's inflow, and the nodes that only they kept.

        The inflow stays on record, so what was dropped counts as lost and the replacement score never rises.
        `metadata["dropped_below"]` notes the share. Raises `ValueError` for a share outside 0..1.
        """
        kept = drop_small(self, below)
        share = max(float(below), self.metadata.get("dropped_below", 0.0))
        return replace(self.select(kept.nodes, kept.edges), metadata={**self.metadata, "dropped_below": share})

    def with_inclusion(self, *, nodes: Sequence[float] = NODES, edges: Sequence[float] = EDGES) -> CircuitGraph:
        """The graph with a note, in `metadata["inclusion"]`, of how often each node is kept over a grid of pruning thresholds.

        Circuits pruned from it keep the note, and pictures draw it as opacity. See `circuits.graph.inclusion`.

        Args:
            nodes, edges: the thresholds, every pair of which is tried.

        Raises:
            ValueError: no thresholds, one twice, or one outside 0..1.
        """
        return replace(self, metadata={**self.metadata, INCLUSION: inclusion_facts(self, nodes=nodes, edges=edges)})

    def with_qk_results(self, results: Mapping[str | int, Mapping[str, Any]]) -> CircuitGraph:
        """The graph with attention scores divided among pairs of nodes, which Neuronpedia's graph JSON holds per node.

        >>> graph.with_qk_results({"attention:2/345@7": attribution.contributors()})    # doctest: +SKIP

        Args:
            results: name, id or number of a node -> the pairs and marginals of an attention score that it depends on, as
                `QKAttribution.contributors` gives them. Other nodes keep theirs.

        Raises:
            ValueError: a node that the graph does not have, or results of another form.
        """
        ids = self.nodes.ids()
        named = {ids[node_number(self, name)]: dict(result) for name, result in results.items()}
        return replace(self, metadata={**self.metadata, QK_RESULTS: {**self.metadata.get(QK_RESULTS, {}), **named}})

    def save(self, path: str | os.PathLike[str], *, weight_bits: int = 32) -> Path:
        """Write the graph to one `.safetensors` file, atomically.

        With `weight_bits=16` edge weights take half the space, each with an error of at most 0.05 % (where it is above 4e-9 of
        its row's largest); `metadata["weight_error"]` of the loaded graph is the largest error.
        """
        return save(self, path, weight_bits=weight_bits)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CircuitGraph:
        """Read a file written by `save`, graph JSON of Neuronpedia or circuit-tracer, or circuit-tracer's `.pt` file.

        The kind of a file is told by its content. `metadata["imported"]` of a graph of another tool says what it was read from
        and what is not known; its `identity_error` is None. No code in a file is ever run.

        Raises one `ValueError` naming the file when it is missing, damaged, foreign or of a newer version.
        """
        nodes, edges, metadata, heads = load(path)
        try:
            return cls(nodes, edges, metadata, heads)
        except ValueError as error:
            raise ValueError(
                f"{path}: expected a circuit file, given one that is damaged or foreign ({error})"
            ) from error

    def to_networkx(self) -> nx.DiGraph:
        """A `networkx.DiGraph` from source to target, keyed by node id, with every column as plain attributes."""
        result: nx.DiGraph = exporter("networkx").convert(self)
        return result

    def to_dot(self) -> str:
        """Graphviz text, one rank per layer."""
        return "".join(exporter("dot").convert(self))

    def to_svg(self, *, max_nodes: int = 80) -> str:
        """The token x layer picture; of a larger graph the most influential nodes, and a caption that says so."""
        return str(exporter("svg").convert(self, max_nodes=max_nodes))

    def to_html(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the interactive page to `path`, atomically; it opens in a browser without a network or a server.

        `index` is a feature index whose labels and examples it shows, `()` for none; by default the one beside the crosscoder's
        weights. See `circuits.viewer.page.to_html`.
        """
        return export(self, "html", path, **options)

    def to_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write GraphML to `path`, atomically."""
        return export(self, "graphml", path)

    def to_json(self) -> dict[str, Any]:
        """Node-link JSON object, as `networkx.node_link_graph` reads it."""
        return whole(exporter("json").convert(self))

    def to_neuronpedia(self) -> dict[str, Any]:
        """The graph JSON object of Neuronpedia and circuit-tracer front ends."""
        return whole(exporter("neuronpedia").convert(self))

    def export(self, name: str, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the graph, atomically, in a format of `circuits.graph.exporters.file_formats`; others raise `ValueError`.

        Options are those of the format's conversion, such as `index` of `html`.
        """
        return export(self, name, path, **options)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """What notebooks show; see `circuits.graph.display`."""
        return mime_bundle(self)


def _check_fit(nodes: NodeTable, edges: Edges, *, n_tokens: int) -> None:
    if edges.n_nodes != len(nodes):
        raise ValueError(f"CircuitGraph.edges: expected edges among {len(nodes)} nodes, given {edges.n_nodes}")
    if len(nodes) and nodes.position.max() >= n_tokens:
        raise ValueError(f"CircuitGraph.nodes: expected positions below {n_tokens}, given {nodes.position.max()}")
    total = float(nodes.output_weight.sum())
    if abs(total - 1.0) > 1e-6:
        raise ValueError(f"CircuitGraph.nodes: expected output weights that sum to 1, given {total}")
    for row in np.flatnonzero((np.diff(edges.indptr) > 0) & ~nodes.expanded):
        raise ValueError(f"CircuitGraph.edges: expected edges into expanded nodes only, given some into node {row}")
    kept = edges.magnitudes
    for row in np.flatnonzero(kept > nodes.inflow * (1 + 1e-3) + 1e-12):
        raise ValueError(
            f"CircuitGraph.nodes: expected an inflow of at least the kept edges' {kept[row]:.6g} in row {row}, "
            f"given {nodes.inflow[row]:.6g}"
        )


def _check_heads(heads: EdgeHeads, edges: Edges, inflow: np.ndarray) -> None:
    if len(heads) != len(edges):
        raise ValueError(f"CircuitGraph.heads: expected heads of {len(edges)} edges, given {len(heads)}")
    weight, total = edges.weight.astype(np.float64), heads.totals()
    # An edge that is a tiny remainder of its row is only as exact as the row's rounding.
    allowed = np.maximum(1e-3 * np.maximum(np.abs(weight), heads.magnitudes()), 1e-5 * inflow[edges.target])
    for edge in np.flatnonzero(np.abs(total - weight) > allowed):
        raise ValueError(
            f"CircuitGraph.heads: expected parts that sum to the edge's {weight[edge]:.6g}, "
            f"given {total[edge]:.6g} for edge {edge}"
        )
