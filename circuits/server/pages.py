"""The viewer's page of a graph: what of the graph it shows, and what the server adds to it."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from html import escape
from typing import Any

from circuits.graph import storage
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import conventions_of
from circuits.server.folder import GraphFile
from circuits.viewer.page import to_html

MOST_NODES, MOST_EDGES = 10_000, 200_000
"""Nodes and edges that a page holds: of a larger graph the most influential ones."""
POLICY = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""Security policy of the page, beside the stricter one that it carries itself."""
HEAD = """<meta name="crosstrace-server" content="{facts}">
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/assets/server_hooks.css">
<script type="module" src="/assets/server_hooks.js"></script>"""
KEPT = 6
"""Pages that are kept once they are made."""


class ViewerPages:
    """Makes the viewer's pages."""

    def __init__(self, *, has_model: bool) -> None:
        """Start with no page made."""
        self._has_model = has_model
        self._made: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, graph: GraphFile, *, full: bool) -> str:
        """The page of a graph's circuit, or of the full graph.

        Raises:
            ValueError: the file is damaged.
        """
        key = (graph.name, graph.version, full)
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
                return self._made[key]
        page = self._make(graph, full=full)
        with self._lock:
            self._made[key] = page
            while len(self._made) > KEPT:
                self._made.popitem(last=False)
        return page

    def _make(self, graph: GraphFile, *, full: bool) -> str:
        if full or graph.circuit is None:
            whole = CircuitGraph.load(graph.path)
            shown = _bounded(whole) if full or "pruning" in whole.metadata else _circuit(whole)
            sizes = len(whole.nodes), len(whole.edges)
        else:
            shown = CircuitGraph.load(graph.circuit)
            sizes = storage.outline(graph.path)[1:]
        facts = {
            "name": graph.name,
            "model": self._has_model,
            "isFull": full,
            "shown": [len(shown.nodes), len(shown.edges)],
            "of": sizes,
        }
        return to_html(shown, head=HEAD.format(facts=escape(json.dumps(facts))))


def _circuit(graph: CircuitGraph) -> CircuitGraph:
    """The circuit that `circuits trace` would make of a full graph."""
    usual = conventions_of(graph.metadata)
    return graph.prune(most_nodes=usual.circuit_nodes, most_edges=usual.circuit_edges)


def _bounded(graph: CircuitGraph) -> CircuitGraph:
    """The graph, or its most influential part where it is too large for a page."""
    if len(graph.nodes) <= MOST_NODES and len(graph.edges) <= MOST_EDGES:
        return graph
    return graph.prune(nodes=1.0, edges=1.0, most_nodes=MOST_NODES, most_edges=MOST_EDGES)
