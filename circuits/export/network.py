"""networkx graphs, and what networkx writes: node-link JSON, and GraphML for Gephi, yEd, Cytoscape and igraph."""

from __future__ import annotations

import io
import json
from typing import Any

import networkx as nx

from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import COLUMNS, NodeKind, Part
from circuits.graph.text import printable


@register("networkx", suffix=None, description="a `networkx.DiGraph`")
def to_networkx(graph: GraphData) -> nx.DiGraph:
    """A directed graph from source to target, keyed by node id, with plain Python attributes.

    Nodes carry every column of the table (`kind` and `part` as lower-case words) and `influence`; edges carry `weight` and
    `influence`, and where heads are known `direct` (the part through no head) and `heads` (the strongest parts in words);
    the graph carries the metadata.
    """
    result = nx.DiGraph(**graph.metadata)
    ids = graph.nodes.ids()
    columns: dict[str, list[Any]] = {name: getattr(graph.nodes, name).tolist() for name in COLUMNS}
    columns["kind"] = [NodeKind(kind).name.lower() for kind in columns["kind"]]
    columns["part"] = [Part(part).name.lower() for part in columns["part"]]
    columns["label"] = list(graph.nodes.label)
    columns["influence"] = node_influence(graph).tolist()
    for row, node in enumerate(ids):
        result.add_node(node, **{name: column[row] for name, column in columns.items()})
    edges = graph.edges
    values = (edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), edge_influence(graph).tolist())
    for edge, (source, target, weight, influence) in enumerate(zip(*values, strict=True)):
        facts: dict[str, Any] = {"weight": weight, "influence": influence}
        if graph.heads is not None:
            facts |= {"direct": float(graph.heads.direct[edge]), "heads": graph.heads.text(edge)}
        result.add_edge(ids[source], ids[target], **facts)
    return result


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
    network = to_networkx(graph)
    for _, facts in network.nodes(data=True):
        facts["label"] = printable(facts["label"])
    network.graph = {
        name: printable(value if isinstance(value, str) else json.dumps(value)) for name, value in network.graph.items()
    }
    buffer = io.BytesIO()
    nx.write_graphml(network, buffer)
    return buffer.getvalue().decode("utf-8")
