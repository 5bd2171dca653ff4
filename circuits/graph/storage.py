"""The graph file: one `.safetensors` holding the node and edge columns, with labels and metadata as JSON in its
header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise

from circuits.graph.edge_heads import COLUMNS as HEAD_COLUMNS
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges, GraphData
from circuits.graph.exporters import register
from circuits.graph.nodes import COLUMNS, NodeTable
from replacement.files import write_atomic

FORMAT = "crosstrace.circuit"
SCHEMA = 3
"""2 added heads of edges and a bool column `attention`, which 3 replaces by `part`; files of schema 1 have none of them."""
_EDGE_COLUMNS = ("indptr", "source", "weight")


def save(graph: GraphData, path: str | os.PathLike[str]) -> Path:
    """Write a graph atomically. Raises `ValueError` when the place cannot be written."""
    return write_atomic(path, to_bytes(graph))


@register("safetensors", suffix=".safetensors", description="the graph itself, which `CircuitGraph.load` reads")
def to_bytes(graph: GraphData) -> bytes:
    """Content of the graph file."""
    tensors = {f"nodes.{name}": np.ascontiguousarray(getattr(graph.nodes, name)) for name in COLUMNS}
    tensors |= {f"edges.{name}": np.ascontiguousarray(getattr(graph.edges, name)) for name in _EDGE_COLUMNS}
    if graph.heads is not None:
        tensors |= {f"heads.{name}": np.ascontiguousarray(getattr(graph.heads, name)) for name in HEAD_COLUMNS}
    header = {
        "format": FORMAT,
        "schema": str(SCHEMA),
        "labels": json.dumps(graph.nodes.label),
        "metadata": json.dumps(dict(graph.metadata), allow_nan=False),
    }
    return bytes(serialise(tensors, metadata=header))


def load(path: str | os.PathLike[str]) -> tuple[NodeTable, Edges, dict[str, Any], EdgeHeads | None]:
    """Nodes, edges, metadata and (where the file has them) heads of a graph file.

    Raises `ValueError` naming the file when it is missing, damaged, not a circuit, or written by a newer version.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a circuit file, given a folder; a traced one holds circuit.safetensors")
    if not path.is_file():
        raise ValueError(f"{path}: expected a circuit file, but there is no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            nodes = {name: file.get_tensor(f"nodes.{name}") for name in COLUMNS.keys() - {"part"}}
            if int(header["schema"]) >= 3:
                nodes["part"] = file.get_tensor("nodes.part")
            elif header["schema"] == "2":
                nodes["part"] = file.get_tensor("nodes.attention").astype(COLUMNS["part"])
            else:
                nodes["part"] = np.zeros(len(nodes["kind"]), COLUMNS["part"])
            edges = Edges(**{name: file.get_tensor(f"edges.{name}") for name in _EDGE_COLUMNS})
            heads = None
            if "heads.weight" in file.keys():  # noqa: SIM118 - not a dictionary
                heads = EdgeHeads(**{name: file.get_tensor(f"heads.{name}") for name in HEAD_COLUMNS})
        table = NodeTable(**nodes, label=tuple(json.loads(header["labels"])))
        return table, edges, json.loads(header["metadata"]), heads
    except _ForeignError as error:
        raise ValueError(str(error)) from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a circuit file, given one that is damaged or foreign ({error})") from error


class _ForeignError(Exception):
    """The file is whole, but not a circuit that this version reads."""


def _check_header(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise _ForeignError(f"{path}: expected a circuit file, given another kind of safetensors file")
    schema = header.get("schema", "")
    if not schema.isdecimal() or int(schema) > SCHEMA:
        raise _ForeignError(
            f"{path}: expected circuit schema {SCHEMA} or older, given {schema or 'none'}; a newer version is needed"
        )
