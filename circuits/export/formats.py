"""The export formats by name, and writing them to files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from circuits.export.dot import GraphvizMissingError, render, to_dot
from circuits.export.graphml import to_graphml
from circuits.export.neuronpedia import neuronpedia_json
from circuits.export.node_link import node_link_json
from circuits.export.svg import to_svg
from circuits.graph.edges import GraphData
from circuits.graph.storage import save
from replacement.files import check_folder, write_atomic

_TEXT: dict[str, Callable[[GraphData], str]] = {
    "svg": to_svg,
    "dot": to_dot,
    "graphml": to_graphml,
    "json": node_link_json,
    "neuronpedia": neuronpedia_json,
}
_PICTURES = {"dot-svg": "svg", "dot-png": "png", "dot-pdf": "pdf"}

FORMATS = (*_TEXT, *_PICTURES, "safetensors")
"""Names of the formats: our own `svg`, Graphviz text and pictures (`dot...`), node-link `json`, and so on."""


def check_format(name: str) -> None:
    """Raise `ValueError` that lists the formats unless `name` is one."""
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, given {name!r}")


def export(graph: GraphData, name: str, path: str | os.PathLike[str]) -> Path:
    """Write `graph` to `path` in the format `name`, atomically, and return the path.

    Raises `ValueError` for an unknown format or a place that cannot be written, before anything is computed, and
    `GraphvizMissingError` when a picture needs the missing `dot` program; the DOT text is then written beside it.
    """
    check_format(name)
    path = Path(path)
    check_folder(path.parent)
    if name == "safetensors":
        return save(graph, path)
    if name in _TEXT:
        return write_atomic(path, _TEXT[name](graph))
    dot = to_dot(graph)
    try:
        picture = render(dot, _PICTURES[name])
    except GraphvizMissingError as error:
        instead = write_atomic(path.with_suffix(".dot"), dot)
        raise GraphvizMissingError(f"{error}; the graph was written as text to {instead}") from error
    return write_atomic(path, picture)
