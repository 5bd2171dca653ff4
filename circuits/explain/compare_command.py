"""`circuits compare`: what graphs of two prompts, or of many, share, and where they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.exporters import file_formats
from circuits.graph.graph_files import GraphFiles
from circuits.graph.pruning import check_threshold
from replacement.command_line import AsJson, path_option
from replacement.console import show as show_page
from replacement.console import show_json
from replacement.files import check_file

Graphs = Annotated[
    list[Path],
    typer.Argument(
        help="Graphs, and folders of them: those of prompts, as `circuits trace` writes them, or of .safetensors files.",
        show_default=False,
    ),
]
Pruned = Annotated[
    bool, typer.Option("--pruned/--full", help="Of a prompt's folder, the pruned circuit or the full graph.")
]


def compare(
    graphs: Graphs,
    *,
    pruned: Pruned = False,
    frequency: Annotated[
        float,
        typer.Option(help="Share of the prompts that a node or edge of the consensus circuit is in, at least, 0 to 1."),
    ] = 0.5,
    most: Annotated[int, typer.Option(min=1, help="Features and edges that are listed.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_option,
            help="File for the consensus circuit, by its suffix: .safetensors, .svg, .html, .dot, .graphml and so on.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what graphs of two prompts share and where they differ; or of many, what is frequent: their consensus."""
    check_threshold("frequency", frequency, what="share of the prompts")
    file_format = "" if out is None else _format_of(check_file(out))
    files = GraphFiles.of(graphs, pruned=pruned)
    if len(files) < 2:
        raise ValueError(f"graphs: expected at least two to compare, given one, {files.files[0].path}")
    from circuits.explain.compare_page import page

    facts, circuit = comparison(files, frequency=frequency, most=most)
    facts["file"] = None if out is None else str(out)
    if out is not None:
        circuit.export(file_format, out)
    if as_json:
        show_json(facts)
    else:
        show_page(page(facts))


def comparison(files: GraphFiles, *, frequency: float, most: int) -> tuple[dict[str, Any], CircuitGraph]:
    """JSON facts of a comparison (see the README of this room), and the consensus circuit."""
    from circuits.explain.consensus import consensus
    from circuits.explain.difference import difference

    with tqdm(total=len(files), desc="compare", unit="graph", disable=None) as bar:
        shared = consensus(files, progress=lambda done: bar.update(done - bar.n))
    of_two = None
    if len(files) == 2:
        first, second = (CircuitGraph.load(file.path) for file in files.files)
        of_two = difference(first, second).facts(most)
    facts = {
        "graphs": [file.name for file in files.files],
        "without_graph": list(files.without),
        "difference": of_two,
        "consensus": shared.facts(frequency=frequency, most=most),
    }
    return facts, shared.circuit(frequency)


def _format_of(path: Path) -> str:
    """The format that files of this suffix have.

    Raises:
        ValueError: a suffix that no format has.
    """
    formats = {exporter.suffix: name for name, exporter in file_formats().items()}  # of two with one suffix, the last
    if path.suffix not in formats:
        raise ValueError(f"out: expected a file that ends in one of {', '.join(map(str, formats))}, given {path}")
    return formats[path.suffix]
