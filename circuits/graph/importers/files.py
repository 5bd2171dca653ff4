"""Graph files of every kind that is read, told apart by their content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from circuits.graph import storage
from circuits.graph.importers import circuit_tracer, neuronpedia
from circuits.graph.storage import Parts

READERS: tuple[tuple[str, str, Callable[[Path], Parts]], ...] = (
    ("zip", circuit_tracer.FORMAT, circuit_tracer.load),
    ("json", neuronpedia.FORMAT, neuronpedia.load),
)
_LONGEST_HEADER = 2**40
"""Bytes. A safetensors file begins with the length of its header; the first eight bytes of a text are a larger number."""


def load(path: str | os.PathLike[str]) -> Parts:
    """Nodes, edges, metadata and heads of a graph file: our own, Neuronpedia's JSON, or circuit-tracer's JSON or `.pt`.

    Raises:
        ValueError: one line that names the file when it is missing, damaged, of another kind or of a newer version.
    """
    path = storage.graph_file(path)
    content = _kind(path)
    for kind, words, read in READERS:
        if kind == content:
            try:
                parts = read(path)
                parts[1].levels  # noqa: B018 - refuses cycles, which no influence can be computed with
                return parts
            except (ValueError, ArithmeticError, OSError, MemoryError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__  # a MemoryError has no words
                raise ValueError(f"{path}: {words}: {reason}") from error
    return storage.load(path)


def _kind(path: Path) -> str:
    """`zip`, `json`, or anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return "unreadable"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if int.from_bytes(start[:8], "little") < _LONGEST_HEADER and len(start) > 8:
        return "safetensors"
    return "json" if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else "other"
