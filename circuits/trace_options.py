"""Everything that `circuits trace` does to one prompt: trace, prune, label, name heads, write files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuits.export  # registers formats
import circuits.viewer  # noqa: F401 - likewise
from circuits.attribution.limits import LABELLED, MAX_NODES, memory_bytes
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import named_conventions
from circuits.graph.exporters import exporter, file_formats
from circuits.graph.graph_files import GRAPH_FILE
from circuits.graph.pruning import check_threshold

if TYPE_CHECKING:
    from circuits.attribution.estimate import Estimate
    from circuits.attribution.labels import Indexes
    from replacement import ReplacementModel

FORMATS = tuple(name for name, exporter in file_formats().items() if exporter.fallback is None)
"""Of the pruned circuit; pictures that need Graphviz are left to `circuits export`."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of a trace, with the same defaults in Python and on the command line.

    Raises:
        ValueError: a number outside its range, or unknown conventions.
    """

    coverage: float = 0.99
    """Share of influence that is followed back, 0 to 1."""
    max_nodes: int = MAX_NODES
    """Most features to expand."""
    drop_below: float = 0.0
    """Edges below this share of their target's inflow are left out; they count as lost."""
    conventions: str = "exact"
    """`exact`, or `circuit-tracer` for graphs that agree with that package's."""
    node_threshold: float = 0.8
    """Share of influence that the kept nodes hold, 0 to 1."""
    edge_threshold: float = 0.98
    """Share of edge influence that the kept edges hold, 0 to 1."""
    circuit_nodes: int | None = None
    """Most features, errors and positions of the circuit, the most influential ones; 0 for no limit. By default what suits the
    conventions."""
    circuit_edges: int | None = None
    """Most edges of the circuit, likewise."""
    index: str | None = None
    """File of a feature index for labels; by default those beside the crosscoders' weights."""
    use_index: bool = True
    """Whether labels come from feature indexes; without, they are hints alone."""
    heads: bool = True
    """Whether the heads of the pruned circuit's edges are named."""
    groups: bool = False
    """Whether the pruned circuit carries groups of the nodes that do the same (`CircuitGraph.group`), which pictures draw as
    one."""
    inclusion: bool = False
    """Whether the graphs note how often each node is kept over a grid of pruning thresholds, which pictures draw as opacity."""
    memory: str | None = None
    """Most memory for the process, such as `4GB`; what is available by default."""

    def __post_init__(self) -> None:
        for name in ("node_threshold", "edge_threshold", "coverage", "drop_below"):
            check_threshold(name.replace("_", "-"), getattr(self, name))
        named_conventions(self.conventions)
        if self.max_nodes < 1:
            raise ValueError(f"max-nodes: expected at least 1, given {self.max_nodes}")
        for name in ("circuit_nodes", "circuit_edges"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name.replace('_', '-')}: expected at least 0, given {getattr(self, name)}")
        if self.memory is not None:
            memory_bytes(self.memory)

    def trace(
        self,
        model: ReplacementModel,
        prompt: str,
        targets: Iterable[str] | None = None,
        *,
        announce: Callable[[Estimate], None] | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> tuple[CircuitGraph, CircuitGraph]:
        """The full graph of a prompt, and its pruned circuit with labels and heads; see `circuits.trace`."""
        from circuits.attribution.labels import with_labels
        from circuits.attribution.trace import trace
        from circuits.heads.edge_split import replaces_heads, with_heads

        with self.indexes(model) as indexes:
            # What is not said is left to the functions.
            labelling: dict[str, Any] = {} if indexes is None else {"index": indexes}
            graph = trace(
                model,
                prompt,
                targets=list(targets or ()) or None,
                coverage=self.coverage,
                max_nodes=self.max_nodes,
                drop_below=self.drop_below,
                conventions=self.conventions,
                memory=self.memory,
                announce=announce,
                progress=progress,
                **labelling,
            )
            graph = graph.with_inclusion() if self.inclusion else graph
            usual = named_conventions(self.conventions)
            pruned = graph.prune(
                nodes=self.node_threshold,
                edges=self.edge_threshold,
                most_nodes=usual.circuit_nodes if self.circuit_nodes is None else self.circuit_nodes,
                most_edges=usual.circuit_edges if self.circuit_edges is None else self.circuit_edges,
            )
            circuit = with_labels(model, pruned, most=LABELLED, **labelling)
            circuit = with_heads(model, circuit) if self.heads and not replaces_heads(model) else circuit
            return graph, circuit.with_groups(circuit.group()) if self.groups else circuit

    @property
    def page_index(self) -> Sequence[Path] | None:
        """The feature index whose examples the interactive page shows, as `circuits.viewer.page.to_html` takes it."""
        if self.index is None or not self.use_index:
            return None if self.use_index else ()
        return (Path(self.index),)

    @contextmanager
    def indexes(self, model: ReplacementModel) -> Iterator[Indexes]:
        """The feature indexes that labels are taken from: the one that was named, none, or (None) those beside the weights.

        Raises:
            ValueError: the file is missing, no index, or the index of another crosscoder.
        """
        if self.index is None or not self.use_index:
            yield None if self.use_index else ()
            return
        from circuits.attribution.labels import open_indexes
        from replacement.index.store import FeatureIndex

        with FeatureIndex.open(self.index) as index, open_indexes(model, index):
            yield index


def check_formats(names: Iterable[str]) -> tuple[str, ...]:
    """The names of formats of files, each once.

    Raises:
        ValueError: a name that no format has.
    """
    return tuple(dict.fromkeys(exporter(name, writes_files=True).name for name in names))


def files_of(formats: Iterable[str]) -> dict[str, str]:
    """The names of the files that `write_files` writes, by format; the full graph's is called `graph`."""
    suffixes = {name: exporter.suffix for name, exporter in file_formats().items()}
    return {"graph": GRAPH_FILE, **{name: f"circuit{suffixes[name]}" for name in formats}}


def write_files(
    graph: CircuitGraph,
    circuit: CircuitGraph,
    folder: Path,
    formats: Iterable[str],
    *,
    index: Sequence[Path] | None = None,
) -> None:
    """Write the full graph, and the circuit in some formats, into a folder; `index` is that of the interactive page."""
    options: dict[str, dict[str, Any]] = {"html": {"index": index}}
    for name, file in files_of(formats).items():
        if name == "graph":
            graph.save(folder / file)
        else:
            circuit.export(name, folder / file, **options.get(name, {}))


def facts_of(graph: CircuitGraph, circuit: CircuitGraph) -> dict[str, Any]:
    """Figures of one trace for a table: counts, scores, the identity error, and what ended it."""
    full, pruned = graph.scores(), circuit.scores()
    return {
        "nodes": len(graph.nodes),
        "edges": len(graph.edges),
        "replacement": full.replacement,
        "completeness": full.completeness,
        "circuit_nodes": len(circuit.nodes),
        "circuit_edges": len(circuit.edges),
        "circuit_replacement": pruned.replacement,
        "circuit_completeness": pruned.completeness,
        "identity_error": graph.identity_error,
        "stopped_by": graph.metadata["stopped_by"],
    }
