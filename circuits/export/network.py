"""networkx graphs, and what networkx writes: node-link JSON, and GraphML for Gephi, yEd, Cytoscape and igraph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

import networkx as nx
import numpy as np

from circuits.graph.edge_heads import EdgeRow
from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.feature_labels import label_note
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import COLUMNS, NodeKind, Part
from circuits.graph.text import printable

Facts = dict[str, list[Any]]
"""Columns of plain Python values, one per node or edge."""

_EDGES_AT_ONCE = 4096
_GRAPHML = {bool: "boolean", int: "long", float: "double", str: "string"}


@register("networkx", suffix=None, description="a `networkx.DiGraph`")
def to_networkx(graph: GraphData) -> nx.DiGraph:
    """A directed graph from source to target, keyed by node id, with plain Python attributes.

    Nodes carry every column of the table (`kind` and `part` as lower-case words), `influence` and `label_note`, which
    says how good a feature's label is; edges carry `weight` and
    `influence`, and where heads are known `direct` (the part through no head) and `heads` (the strongest parts in words);
    the graph carries the metadata.
    """
    result = nx.DiGraph(**graph.metadata)
    ids, edges, influence = graph.nodes.ids(), graph.edges, edge_influence(graph)
    for node, facts in zip(ids, _rows(_node_facts(graph)), strict=True):
        result.add_node(node, **facts)
    for block in _blocks(len(edges)):
        ends = zip(edges.source[block].tolist(), edges.target[block].tolist(), strict=True)
        for (source, target), facts in zip(ends, _rows(_edge_facts(graph, block, influence)), strict=True):
            result.add_edge(ids[source], ids[target], **facts)
    return result


def _blocks(n: int) -> Iterator[slice]:
    """Slices of n rows: as Python values, edges take a hundred times the memory of their columns."""
    return (slice(begin, begin + _EDGES_AT_ONCE) for begin in range(0, n, _EDGES_AT_ONCE))


def _rows(columns: Facts) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _node_facts(graph: GraphData) -> Facts:
    columns: Facts = {name: getattr(graph.nodes, name).tolist() for name in COLUMNS}
    columns["kind"] = [NodeKind(kind).name.lower() for kind in columns["kind"]]
    columns["part"] = [Part(part).name.lower() for part in columns["part"]]
    columns["label"] = list(graph.nodes.label)
    columns["label_note"] = [label_note(graph, row) for row in range(len(graph.nodes))]
    columns["influence"] = node_influence(graph).tolist()
    return columns


def _edge_facts(graph: GraphData, block: slice, influence: np.ndarray, rows: list[EdgeRow] | None = None) -> Facts:
    """Facts of a block of edges; `rows` are the heads of the block, if they are known already."""
    columns: Facts = {"weight": graph.edges.weight[block].tolist(), "influence": influence[block].tolist()}
    if graph.heads is not None:
        columns["direct"] = graph.heads.direct[block].tolist()
        columns["heads"] = [row.text() for row in rows or graph.heads.rows(block)]
    return columns


@register("json", suffix=".json", description="node-link JSON, as networkx and d3 read it")
def to_node_link(graph: GraphData) -> dict[str, Any]:
    """The graph as a JSON object, its edges as an iterator; `networkx.node_link_graph(json.load(file))` reads the file.

    Where heads are known, `by_head` of an edge lists its heads as `[layer, head, weight]`, the strongest first.
    """
    nodes = zip(graph.nodes.ids(), _rows(_node_facts(graph)), strict=True)
    return {
        "directed": True,
        "multigraph": False,
        "graph": dict(graph.metadata),
        "nodes": [{**facts, "id": name} for name, facts in nodes],
        "edges": _links(graph),
    }


def _links(graph: GraphData) -> Iterator[dict[str, Any]]:
    ids, edges, influence = graph.nodes.ids(), graph.edges, edge_influence(graph)
    for block in _blocks(len(edges)):
        rows = None if graph.heads is None else graph.heads.rows(block)
        columns = _edge_facts(graph, block, influence, rows)
        if rows is not None:
            columns["by_head"] = [row.heads for row in rows]
        columns["source"] = [ids[node] for node in edges.source[block].tolist()]
        columns["target"] = [ids[node] for node in edges.target[block].tolist()]
        yield from _rows(columns)


@register("graphml", suffix=".graphml", description="GraphML, for Gephi, yEd, Cytoscape and igraph")
def to_graphml(graph: GraphData) -> Iterator[str]:
    """The graph as pieces of GraphML text.

    Metadata that is not a number or text is written as JSON; control characters are dropped.
    """
    ids, edges, influence = graph.nodes.ids(), graph.edges, edge_influence(graph)
    about = {name: [value if isinstance(value, str) else json.dumps(value)] for name, value in graph.metadata.items()}
    nodes, first = _node_facts(graph), _edge_facts(graph, slice(0, 1), influence)
    keys = _GraphMLKeys({"graph": about, "node": nodes, "edge": first})
    yield '<?xml version="1.0" encoding="utf-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    yield "".join(
        f"{line}\n" for line in (*keys.declared, '<graph edgedefault="directed">', *keys.data("graph", about))
    )
    yield "".join(
        f'<node id="{node}">{data}</node>\n' for node, data in zip(ids, keys.data("node", nodes), strict=True)
    )
    for block in _blocks(len(edges)):
        data = keys.data("edge", _edge_facts(graph, block, influence))
        ends = zip(edges.source[block].tolist(), edges.target[block].tolist(), data, strict=True)
        yield "".join(
            f'<edge source="{ids[source]}" target="{ids[target]}">{text}</edge>\n' for source, target, text in ends
        )
    yield "</graph>\n</graphml>\n"


class _GraphMLKeys:
    """GraphML's `key` elements of the columns of some tables, and the `data` elements that refer to them."""

    def __init__(self, tables: dict[str, Facts]) -> None:
        self.declared: list[str] = []
        self._keys: dict[tuple[str, str], tuple[str, type]] = {}
        for domain, columns in tables.items():
            for name, column in columns.items():
                key, kind = f"d{len(self._keys)}", type(column[0]) if column else str
                self._keys[domain, name] = key, kind
                attributes = f'attr.name="{escape(name)}" attr.type="{_GRAPHML[kind]}"'
                self.declared.append(f'<key id="{key}" for="{domain}" {attributes}/>')

    def data(self, domain: str, columns: Facts) -> Iterator[str]:
        """The `data` elements of each row."""
        cells = []
        for name, column in columns.items():
            key, kind = self._keys[domain, name]
            texts = [escape(printable(value)) for value in column] if kind is str else map(json.dumps, column)
            cells.append([f'<data key="{key}">{text}</data>' for text in texts])
        return ("".join(row) for row in zip(*cells, strict=True))
