"""Graph files of many prompts: named one by one, or found in folders; read one after the other, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.graph import storage
from circuits.graph.circuit_graph import CircuitGraph
from replacement.files import checked_path

GRAPH_FILE, CIRCUIT_FILE = "graph.safetensors", "circuit.safetensors"
"""The full graph and its pruned circuit in a folder of one prompt, as `circuits trace` writes it."""
_SAME = {
    "model": "model",
    "model_fingerprint": "weights of the model",
    "crosscoder_fingerprint": "crosscoder",
    "n_layers": "number of layers",
    "conventions": "conventions",
}
"""Facts in which graphs must agree to be compared, in words."""


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph."""

    name: str
    """Of the prompt's folder, or of the file without its suffix."""
    path: Path

    def metadata(self) -> Mapping[str, Any]:
        """The graph's facts, from the header of the file alone where it has one.

        Raises:
            ValueError: no graph file.
        """
        if self.path.suffix == ".safetensors":
            return storage.outline(self.path)[0]
        return CircuitGraph.load(self.path).metadata


@dataclass(frozen=True)
class GraphFiles:
    """Graph files in the order given, those of a folder by name."""

    files: tuple[GraphFile, ...]
    without: tuple[str, ...] = field(default=())
    """Folders of prompts that hold no graph: tracing failed, or did not finish."""

    @classmethod
    def of(cls, paths: Sequence[str | Path], *, pruned: bool = False) -> GraphFiles:
        """The graphs of files and folders: `graphs/ID/` of one prompt, a folder of such folders, or of `.safetensors` files.

        Args:
            pruned: take the pruned circuit of a prompt's folder, not its full graph.

        Raises:
            ValueError: a path with nothing there, or a folder without graphs.
        """
        file_name, files, without = CIRCUIT_FILE if pruned else GRAPH_FILE, list[GraphFile](), list[str]()
        for path in map(checked_path, paths):
            if not path.is_dir():
                files.append(GraphFile(path.stem, storage.graph_file(path)))
                continue
            places = [path] if (path / file_name).is_file() else _inside(path)
            prompts = [place for place in places if place.is_dir()]
            found = [GraphFile(p.name, p / file_name) for p in prompts if (p / file_name).is_file()]
            found += [GraphFile(p.stem, p) for p in places if p.suffix == ".safetensors" and p.is_file()]
            if not found:
                raise ValueError(
                    f"{path}: expected a folder of graphs, such as `circuits trace --prompts` writes; given none"
                )
            files += sorted(found, key=lambda file: file.path)
            without += [place.name for place in prompts if not (place / file_name).is_file()]
        return cls(tuple(files), tuple(without))

    def __len__(self) -> int:
        return len(self.files)

    def metadata(self) -> Iterator[tuple[GraphFile, Mapping[str, Any]]]:
        """Each file with its facts.

        Raises:
            ValueError: a file that is no graph, or one of another model or crosscoder than the first.
        """
        first: Mapping[str, Any] = {}
        for file in self.files:
            facts = file.metadata()
            first = first or facts
            for name, words in _SAME.items():
                if facts.get(name) != first.get(name):
                    raise ValueError(
                        f"{file.path}: expected the {words} of {self.files[0].path} ({first.get(name, 'not known')}), given "
                        f"{facts.get(name, 'not known')}: graphs of one model and crosscoder can be compared"
                    )
            yield file, facts

    def graphs(self, progress: Callable[[int], None] | None = None) -> Iterator[tuple[GraphFile, CircuitGraph]]:
        """Each file with its graph; `progress` is called with the number of graphs that are done."""
        for number, file in enumerate(self.files):
            yield file, CircuitGraph.load(file.path)
            if progress is not None:
                progress(number + 1)


def _inside(folder: Path) -> list[Path]:
    return [place for place in folder.iterdir() if not place.name.startswith(".")]  # hidden ones are being written
