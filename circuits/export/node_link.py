"""networkx graphs, and the node-link JSON that `networkx.node_link_graph` reads back."""

from __future__ import annotations

import json
from typing import Any

import networkx as nx

from circuits.edges import GraphData
from circuits.influence import edge_influence, node_influence
from circuits.nodes import COLUMNS, NodeKind


def to_networkx(graph: GraphData) -> nx.DiGraph:
    """A directed graph from source to target, keyed by node id, with plain Python attributes.

    Nodes carry every column of the table (`kind` as a lower-case word) and `influence`; edges carry `weight` and
    `influence`; the graph carries the metadata.
    """
    result = nx.DiGraph(**graph.metadata)
    ids = graph.nodes.ids()
    columns: dict[str, list[Any]] = {name: getattr(graph.nodes, name).tolist() for name in COLUMNS}
    columns["kind"] = [NodeKind(kind).name.lower() for kind in columns["kind"]]
    columns["label"] = list(graph.nodes.label)
    columns["influence"] = node_influence(graph).tolist()
    for row, node in enumerate(ids):
        result.add_node(node, **{name: column[row] for name, column in columns.items()})
    edges = graph.edges
    values = (edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), edge_influence(graph).tolist())
    for source, target, weight, influence in zip(*values, strict=True):
        result.add_edge(ids[source], ids[target], weight=weight, influence=influence)
    return result


def to_node_link(graph: GraphData) -> dict[str, Any]:
    """The graph as a JSON object; `networkx.node_link_graph(json.load(file))` reads it."""
    data: dict[str, Any] = nx.node_link_data(to_networkx(graph), edges="edges")
    return data


def node_link_json(graph: GraphData) -> str:
    """`to_node_link` as JSON text."""
    return json.dumps(to_node_link(graph), allow_nan=False)
