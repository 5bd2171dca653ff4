"""networkx graphs, and what networkx writes: node-link JSON, and GraphML for Gephi, yEd, Cytoscape and igraph."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import networkx as nx

from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import COLUMNS, NodeKind, Part
from circuits.graph.text import printable

Facts = dict[str, list[Any]]
"""Columns of plain Python values, one per node or edge."""

_GRAPHML = {bool: "boolean", int: "long", float: "double", str: "string"}


@register("networkx", suffix=None, description="a `networkx.DiGraph`")
def to_networkx(graph: GraphData) -> nx.DiGraph:
    """A directed graph from source to target, keyed by node id, with plain Python attributes.

    Nodes carry every column of the table (`kind` and `part` as lower-case words) and `influence`; edges carry `weight` and
    `influence`, and where heads are known `direct` (the part through no head) and `heads` (the strongest parts in words);
    the graph carries the metadata.
    """
    result = nx.DiGraph(**graph.metadata)
    ids, edges = graph.nodes.ids(), graph.edges
    nodes = _node_facts(graph)
    for row, node in enumerate(ids):
        result.add_node(node, **{name: column[row] for name, column in nodes.items()})
    columns = _edge_facts(graph)
    facts = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    for source, target, attributes in zip(edges.source.tolist(), edges.target.tolist(), facts, strict=True):
        result.add_edge(ids[source], ids[target], **attributes)
    return result


def _node_facts(graph: GraphData) -> Facts:
    columns: Facts = {name: getattr(graph.nodes, name).tolist() for name in COLUMNS}
    columns["kind"] = [NodeKind(kind).name.lower() for kind in columns["kind"]]
    columns["part"] = [Part(part).name.lower() for part in columns["part"]]
    columns["label"] = list(graph.nodes.label)
    columns["influence"] = node_influence(graph).tolist()
    return columns


def _edge_facts(graph: GraphData) -> Facts:
    columns: Facts = {"weight": graph.edges.weight.tolist(), "influence": edge_influence(graph).tolist()}
    if graph.heads is not None:
        columns["direct"] = graph.heads.direct.tolist()
        columns["heads"] = [graph.heads.text(edge) for edge in range(len(graph.edges))]
    return columns


@register("json", suffix=".json", description="node-link JSON, as networkx and d3 read it")
def to_node_link(graph: GraphData) -> dict[str, Any]:
    """The graph as a JSON object; `networkx.node_link_graph(json.load(file))` reads it.

    Where heads are known, `by_head` of an edge lists its heads as `{layer, head, weight}`, the strongest first.
    """
    network = to_networkx(graph)
    if graph.heads is not None:
        ids, edges = graph.nodes.ids(), graph.edges
        for edge, (source, target) in enumerate(zip(edges.source.tolist(), edges.target.tolist(), strict=True)):
            network.edges[ids[source], ids[target]]["by_head"] = [
                {"layer": layer, "head": head, "weight": weight} for layer, head, weight in graph.heads.of(edge)
            ]
    data: dict[str, Any] = nx.node_link_data(network, edges="edges")
    return data


@register("graphml", suffix=".graphml", description="GraphML, for Gephi, yEd, Cytoscape and igraph")
def to_graphml(graph: GraphData) -> str:
    """The graph as GraphML text.

    Metadata that is not a number or text is written as JSON; control characters are dropped.
    """
    ids, edges = graph.nodes.ids(), graph.edges
    about = {name: [value if isinstance(value, str) else json.dumps(value)] for name, value in graph.metadata.items()}
    keys, (about_data, node_data, edge_data) = _graphml_data({
        "graph": about, "node": _node_facts(graph), "edge": _edge_facts(graph)
    })  # fmt: skip
    ends = zip(edges.source.tolist(), edges.target.tolist(), edge_data, strict=True)
    return "\n".join([
        '<?xml version="1.0" encoding="utf-8"?>',
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">',
        *keys,
        '<graph edgedefault="directed">',
        *about_data,
        *(f'<node id="{node}">{data}</node>' for node, data in zip(ids, node_data, strict=True)),
        *(f'<edge source="{ids[source]}" target="{ids[target]}">{data}</edge>' for source, target, data in ends),
        "</graph>",
        "</graphml>\n",
    ])  # fmt: skip


def _graphml_data(tables: dict[str, Facts]) -> tuple[list[str], list[list[str]]]:
    """GraphML's `key` elements of all columns, and the `data` elements of each row of each table."""
    keys: list[str] = []
    rows = []
    for domain, columns in tables.items():
        cells = []
        for name, column in columns.items():
            key, kind = f"d{len(keys)}", type(column[0]) if column else str
            keys.append(f'<key id="{key}" for="{domain}" attr.name="{escape(name)}" attr.type="{_GRAPHML[kind]}"/>')
            texts = [escape(printable(value)) for value in column] if kind is str else map(json.dumps, column)
            cells.append([f'<data key="{key}">{text}</data>' for text in texts])
        rows.append(["".join(row) for row in zip(*cells, strict=True)])
    return keys, rows
