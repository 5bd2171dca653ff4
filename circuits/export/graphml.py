"""GraphML, for Gephi, yEd, Cytoscape and igraph."""

from __future__ import annotations

import io
import json

import networkx as nx

from circuits.export.node_link import to_networkx
from circuits.graph.edges import GraphData
from circuits.graph.text import printable


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
