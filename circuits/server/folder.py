"""The graphs of a folder by name, and nothing else of it.

A graph is a file in the folder, named as the file, or a subfolder that `circuits trace` wrote, named as the subfolder: its full
graph is `graph.safetensors`, its pruned circuit, with labels and heads, `circuit.safetensors`. Names are looked up among those
listed, so no request can name anything else, and links that lead out of the folder are not listed.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.graph_files import CIRCUIT_FILE, GRAPH_FILE
from circuits.graph.text import shorten
from replacement.files import check_folder

SUFFIXES = (".safetensors", ".json", ".pt")
STATE_SUFFIX = ".state.json"
UPLOAD_BYTES = 2**28
"""Most bytes of a file that is uploaded."""
_UPLOADED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")


class UnknownGraphError(ValueError):
    """No graph of the folder has this name."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph of the folder."""

    name: str
    path: Path
    """Of the full graph where there is one, else of what there is."""
    circuit: Path | None
    """Of the pruned circuit, where that is another file."""
    state: Path
    """Where labels and supernodes are saved."""
    version: tuple[int, ...]
    """Time of change and size of the files: differs once they were written anew."""

    @property
    def changed(self) -> float:
        """Time of change, in seconds since 1970."""
        return self.version[0] / 1e9


class Folder:
    """A folder of graphs."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a folder.

        Raises:
            ValueError: there is no folder at the path.
        """
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise ValueError(f"{path}: expected a folder of graphs, but there is no such folder")

    def graphs(self) -> dict[str, GraphFile]:
        """All graphs by name, sorted."""
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries)
        found = (self._graph_file(name) for name in names)
        return {graph.name: graph for graph in found if graph is not None}

    def graph(self, name: str) -> GraphFile:
        """The graph of a name.

        Raises:
            UnknownGraphError: none of the folder has it.
        """
        known = self.graphs()
        if name not in known:
            raise UnknownGraphError(f"there is no graph {shorten(name, 80)!r} in this folder")
        return known[name]

    def message(self, error: Exception) -> str:
        """The words of an error in one line, without the place of the folder."""
        return " ".join(str(error).replace(f"{self.path}{os.sep}", "").split())

    def free_name(self, stem: str) -> str:
        """A name that nothing in the folder has: the stem, or the stem with a number."""
        taken, number, name = {entry.lower() for entry in os.listdir(self.path)}, 1, stem
        while name in taken:
            number += 1
            name = f"{stem}-{number}"
        return name

    async def receive(self, name: str, content: AsyncIterable[bytes]) -> GraphFile:
        """Keep a graph that comes piece by piece, once it was loaded without an error; nothing is ever overwritten.

        Raises:
            ValueError: a name that is none of a graph file, or a file that holds no graph.
            FileExistsError: something of this name is there.
        """
        if not _UPLOADED.fullmatch(name) or not name.endswith(SUFFIXES) or name.endswith(STATE_SUFFIX):
            raise ValueError(
                f"name: expected letters, digits, dots, dashes and a suffix of {', '.join(SUFFIXES)}, "
                f"given {shorten(name, 80)!r}"
            )
        check_folder(self.path)
        target = self.path / name
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=self.path) as scratch:
            path = Path(scratch) / name
            with path.open("wb") as file:
                async for chunk in content:
                    file.write(chunk)
            await run_in_threadpool(self._keep, path, target)
        return self.graph(name)

    def _keep(self, path: Path, target: Path) -> None:
        if os.path.lexists(target):
            raise FileExistsError(f"name: {target.name} is there already, and is never overwritten")
        try:
            CircuitGraph.load(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), target.name)) from None
        try:
            os.link(path, target)  # fails, unlike a rename, where the name was taken meanwhile
        except FileExistsError:
            raise FileExistsError(f"name: {target.name} is there already, and is never overwritten") from None

    def _graph_file(self, name: str) -> GraphFile | None:
        if name.startswith(".") or not name.isprintable():  # hidden, or bytes that no address can hold
            return None
        place = self.path / name
        files = [place / GRAPH_FILE, place / CIRCUIT_FILE] if place.is_dir() else [place]
        if not place.is_dir() and (not name.endswith(SUFFIXES) or name.endswith(STATE_SUFFIX)):
            return None
        versions = {path: version for path in files if (version := self._version(path))}
        if not versions:
            return None
        first, *others = versions
        facts = tuple(number for version in versions.values() for number in version)
        state = self.path / f"{name}{STATE_SUFFIX}"
        return GraphFile(name, first, others[0] if others else None, state, facts)

    def _version(self, path: Path) -> tuple[int, int] | None:
        """Time of change and size of a regular file inside the folder; None for anything else."""
        with contextlib.suppress(OSError):
            if path.is_file() and path.resolve().is_relative_to(self.path):
                facts = path.stat()
                return facts.st_mtime_ns, facts.st_size
        return None
