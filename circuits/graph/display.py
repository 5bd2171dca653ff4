"""What a notebook shows of a graph: the interactive page in a frame, and the picture where frames and scripts are stripped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from circuits.graph.exporters import exporter
from replacement.notebook import frame

if TYPE_CHECKING:
    from circuits.graph.circuit_graph import CircuitGraph

MOST_NODES, MOST_EDGES = 1000, 20_000
"""Of a larger graph the pruned circuit is shown: the page is stored in the notebook."""


def mime_bundle(graph: CircuitGraph) -> dict[str, str]:
    """The page, the picture and one line of text, by MIME type."""
    shown, note = graph, ""
    if len(graph.nodes) > MOST_NODES or len(graph.edges) > MOST_EDGES:
        shown = graph.prune(most_nodes=MOST_NODES, most_edges=MOST_EDGES)
        note = (
            f"The graph has {len(graph.nodes):,} nodes and {len(graph.edges):,} edges. Shown is its pruned circuit: "
            f"{len(shown.nodes):,} nodes, {len(shown.edges):,} edges. `graph.to_html(path)` writes the page of the whole graph."
        )
    picture = shown.to_svg()
    page = frame(exporter("html").convert(shown), picture=picture, title=repr(shown), note=note)
    return {"text/html": page, "image/svg+xml": picture, "text/plain": repr(graph)}
