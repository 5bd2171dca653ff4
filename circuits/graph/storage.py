"""The graph file: one `.safetensors` holding the node and edge columns, with labels and metadata as JSON in its header.

The header also holds a digest of everything that loading returns, so that a damaged file is never taken for another graph.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialise
from safetensors.numpy import save_file

from circuits.graph.edge_heads import COLUMNS as HEAD_COLUMNS
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import COLUMNS as EDGE_COLUMNS
from circuits.graph.edges import Edges, GraphData
from circuits.graph.exporters import register
from circuits.graph.half_weights import from_half, to_half
from circuits.graph.nodes import COLUMNS as NODE_COLUMNS
from circuits.graph.nodes import NodeTable
from replacement.files import atomic_file, check_file, checked_path

FORMAT = "crosstrace.circuit"
SCHEMA = 4
"""2 added heads of edges and a bool column `attention`, which 3 replaces by `part`; files of schema 1 have none of them. 3 also
added the digest, which older files lack. 4 holds weights in 16 bits, with an exponent for each row."""


def save(graph: GraphData, path: str | os.PathLike[str], *, weight_bits: int = 32) -> Path:
    """Write a graph atomically, without a copy of its columns in memory.

    Args:
        weight_bits: 32, or 16 for edge weights as in `circuits/graph/half_weights.py`, with `weight_error` in the metadata.

    Raises:
        ValueError: other bits, or a place that cannot be written.
    """
    if weight_bits not in (16, 32):
        raise ValueError(f"weight_bits: expected 16 or 32, given {weight_bits!r}")
    check_file(path)
    tensors, header = _content(graph, weight_bits)
    with atomic_file(path) as scratch:
        try:
            save_file(tensors, scratch, metadata=header)
            _sort_metadata(scratch)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return Path(path)


@register("safetensors", suffix=".safetensors", description="the graph itself, which `CircuitGraph.load` reads")
def to_bytes(graph: GraphData) -> bytes:
    """Content of the graph file."""
    tensors, header = _content(graph, 32)
    content = bytes(serialise(tensors, metadata=header))
    end = 8 + int.from_bytes(content[:8], "little")
    return content[:8] + _with_sorted_metadata(content[8:end]) + content[end:]


def _sort_metadata(path: Path) -> None:
    """The same graph is then written as the same bytes: safetensors orders the texts of its header at random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        file.seek(8)
        file.write(_with_sorted_metadata(header))


def _with_sorted_metadata(header: bytes) -> bytes:
    """A safetensors header with the texts in the order of their names, of the same length."""
    entries = json.loads(header)
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(encoded) <= len(header), "the same entries are no longer"
    return encoded.ljust(len(header))


def _content(graph: GraphData, weight_bits: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns and header."""
    tables = (
        ("nodes", graph.nodes, NODE_COLUMNS),
        ("edges", graph.edges, EDGE_COLUMNS),
        ("heads", graph.heads, HEAD_COLUMNS),
    )
    tensors = {
        f"{name}.{column}": np.ascontiguousarray(getattr(table, column))
        for name, table, columns in tables
        if table is not None
        for column in columns
    }
    metadata = dict(graph.metadata)
    if weight_bits == 16:
        tensors["edges.weight"], tensors["edges.exponent"], error = to_half(graph.edges)
        metadata["weight_error"] = max(error, metadata.get("weight_error", 0.0))
    header = {
        "format": FORMAT,
        "schema": str(SCHEMA if weight_bits == 16 else 3),  # readers of schema 3 know all else
        "labels": json.dumps(graph.nodes.label),
        "metadata": json.dumps(metadata, allow_nan=False),
    }
    header["digest"] = digest(tensors, header)
    return tensors, header


def digest(tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> str:
    """SHA-256 of the tensors (names, dtypes, shapes, values) and of the header's texts, those of another digest left out."""
    result = hashlib.sha256()
    texts = sorted((name, text) for name, text in header.items() if name != "digest")
    shapes = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
    result.update(json.dumps([texts, shapes]).encode())
    for name in sorted(tensors):
        result.update(np.ascontiguousarray(tensors[name]).data)
    return result.hexdigest()


Parts = tuple[NodeTable, Edges, dict[str, Any], EdgeHeads | None]
"""Nodes, edges, metadata and heads of a graph file."""


def graph_file(path: str | os.PathLike[str]) -> Path:
    """The path of a regular file that may hold a graph.

    Raises:
        ValueError: nothing is there, or a folder, a device or a pipe.
    """
    path = checked_path(path)
    if path.is_dir():
        raise ValueError(
            f"{path}: expected a circuit file, given a folder; a traced one holds graph.safetensors and circuit.safetensors"
        )
    if not path.is_file():
        found = "given a device or pipe" if path.exists() else "but there is no such file"
        raise ValueError(f"{path}: expected a circuit file, {found}")
    return path


def load(path: str | os.PathLike[str]) -> Parts:
    """Nodes, edges, metadata and (where the file has them) heads of a graph file.

    Raises `ValueError` naming the file when it is missing, damaged, not a circuit, or written by a newer version.
    """
    path = graph_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        schema = int(header["schema"])
        if (schema >= 3 or "digest" in header) and header["digest"] != digest(tensors, header):
            raise ValueError("its content is not that of its digest")
        if schema < 3:
            tensors["nodes.part"] = tensors.get("nodes.attention", np.zeros_like(tensors["nodes.kind"])).astype(np.int8)
        nodes = NodeTable(**{name: tensors[f"nodes.{name}"] for name in NODE_COLUMNS}, label=_labels(header))
        columns = {name: tensors[f"edges.{name}"] for name in EDGE_COLUMNS}
        edges = Edges(**columns) if schema < 4 else from_half(**columns, exponent=tensors["edges.exponent"])
        heads = None
        if "heads.weight" in tensors:
            heads = EdgeHeads(**{name: tensors[f"heads.{name}"] for name in HEAD_COLUMNS})
        return nodes, edges, _metadata(header), heads
    except _ForeignError as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"{path}: expected a circuit file, given one without {error}") from error
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a circuit file, given one that is damaged or foreign ({error})") from error


def outline(path: str | os.PathLike[str]) -> tuple[dict[str, Any], int, int]:
    """Metadata and numbers of nodes and edges, from the header of a graph file alone, whose columns are not read or checked.

    Raises:
        ValueError: as `load`, as far as the header tells.
    """
    path = graph_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            n_nodes, n_edges = (file.get_slice(name).get_shape()[0] for name in ("nodes.kind", "edges.source"))
            return _metadata(header), n_nodes, n_edges
    except _ForeignError as error:
        raise ValueError(str(error)) from None
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a circuit file, given one that is damaged or foreign ({error})") from error


def _labels(header: Mapping[str, str]) -> tuple[str, ...]:
    labels = json.loads(header["labels"])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("its labels are no list of texts")
    return tuple(labels)


def _metadata(header: Mapping[str, str]) -> dict[str, Any]:
    metadata = json.loads(header["metadata"])
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no object")
    return metadata


class _ForeignError(Exception):
    """The file is whole, but not a circuit that this version reads."""


def _check_header(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise _ForeignError(f"{path}: expected a circuit file, given another kind of safetensors file")
    schema = header.get("schema", "")
    if schema not in map(str, range(1, SCHEMA + 1)):
        raise _ForeignError(
            f"{path}: expected circuit schema {SCHEMA} or older, given {schema or 'none'}; a newer version is needed"
        )
