"""The table's facts of every graph: what a header says at once, and scores from a thread behind the server.

Scores need the whole graph. They are kept with the time of change and the size of its files, across restarts in
`.crosstrace-table.json` of the folder, so that a folder of a thousand graphs is read once.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from circuits.graph import storage
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import as_stored
from circuits.server.folder import Folder, GraphFile
from circuits.server.saved_state import SavedStates
from replacement.files import read_json, write_atomic
from replacement.token_texts import visible

CACHE_FILE = ".crosstrace-table.json"
SCORED_EDGES = 20_000_000
"""Graphs with more edges are not read for their scores."""
READ_BYTES = 2**30
"""Files of other tools, which have no header, are read up to this size."""
Facts = dict[str, Any]


class Summaries:
    """Rows of the table."""

    def __init__(self, folder: Folder, states: SavedStates) -> None:
        """Take up what was kept for the folder."""
        self._folder, self._states = folder, states
        self._lock = threading.Lock()
        self._whole: dict[str, tuple[list[int], Facts]] = {}
        self._from_header: dict[str, tuple[list[int], Facts]] = {}
        self._pending: set[str] = set()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="summaries")
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            kept = read_json(folder.path / CACHE_FILE)
            self._whole = {name: (version, dict(facts)) for name, (version, facts) in kept.items()}

    def rows(self) -> list[Facts]:
        """A row for every graph of the folder; `pending` where the scores are not there yet."""
        return [self._row(graph) for graph in self._folder.graphs().values()]

    def close(self) -> None:
        """End the thread after the graph that it reads."""
        self._worker.shutdown(cancel_futures=True)
        self._keep()

    def _row(self, graph: GraphFile) -> Facts:
        version, (known_version, facts) = list(graph.version), self._whole.get(graph.name, ([], {}))
        is_pending = known_version != version
        if is_pending:
            facts = self._outline(graph, version)
            with self._lock:
                if graph.name not in self._pending:
                    self._pending.add(graph.name)
                    with contextlib.suppress(RuntimeError):  # closed
                        self._worker.submit(self._read, graph, version)
        saved = self._states.counts(graph)
        return {"name": graph.name, "date": graph.changed, **facts, **saved, "pending": is_pending}

    def _outline(self, graph: GraphFile, version: list[int]) -> Facts:
        known_version, facts = self._from_header.get(graph.name, ([], {}))
        if known_version != version:
            facts = {}
            if graph.path.suffix == ".safetensors":
                with contextlib.suppress(ValueError):  # said when the whole file was read
                    facts = _facts(*storage.outline(graph.path))
            self._from_header[graph.name] = (version, facts)
        return facts

    def _read(self, graph: GraphFile, version: list[int]) -> None:
        try:
            facts = self._read_whole(graph)
        except (ValueError, OSError, MemoryError) as error:
            facts = {"error": self._folder.message(error) or type(error).__name__}
        self._whole[graph.name] = (version, facts)
        with self._lock:
            self._pending.discard(graph.name)
            is_last = not self._pending
        if is_last:
            self._keep()

    def _read_whole(self, graph: GraphFile) -> Facts:
        if graph.path.suffix == ".safetensors":
            metadata, n_nodes, n_edges = storage.outline(graph.path)
            if n_edges > SCORED_EDGES:
                return {**_facts(metadata, n_nodes, n_edges), "note": f"more than {SCORED_EDGES:,} edges: not scored"}
        elif graph.path.stat().st_size > READ_BYTES:
            raise ValueError(f"{graph.path}: more than {READ_BYTES / 1e9:.1f} GB: not read for this table")
        whole = CircuitGraph.load(graph.path)
        scores = whole.scores()
        facts = _facts(whole.metadata, len(whole.nodes), len(whole.edges))
        return {**facts, "replacement": scores.replacement, "completeness": scores.completeness}

    def _keep(self) -> None:
        with contextlib.suppress(ValueError):  # a folder that takes no files
            write_atomic(Path(self._folder.path, CACHE_FILE), json.dumps(dict(self._whole), allow_nan=False))


def _facts(metadata: Mapping[str, Any], n_nodes: int, n_edges: int) -> Facts:
    """What metadata and sizes say. The answer is the likeliest next token, or else the likeliest target."""
    facts = as_stored(metadata)
    answer = max(facts.get("top_tokens") or facts.get("targets") or [{}], key=_chance)
    return {
        "prompt": facts["prompt"],
        "answer": visible(answer.get("token") or ""),
        "probability": _chance(answer) or None,
        "nodes": n_nodes,
        "edges": n_edges,
        "model": facts.get("model", ""),
    }


def _chance(token: Mapping[str, Any]) -> float:
    return float(token.get("probability") or 0.0)
