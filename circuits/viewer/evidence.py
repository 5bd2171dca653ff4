"""What the feature index says about the features of a graph, for the page."""

from __future__ import annotations

from typing import Any

from circuits.graph.edges import GraphData


def evidence(graph: GraphData, index: Any = None) -> dict[str, Any]:
    """The payload's `features`: the record of every feature that the index or the graph's own labels know, by node number."""
    return {}
