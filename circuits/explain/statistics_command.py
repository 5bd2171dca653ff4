"""`circuits statistics`: one row of numbers for every graph."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from circuits.explain.compare_command import Graphs, Pruned
from circuits.graph.graph_files import GraphFiles
from replacement.command_line import AsJson, path_option
from replacement.console import pairs, section, show_json, table
from replacement.console import show as show_page
from replacement.files import atomic_file, check_file


def statistics(
    graphs: Graphs,
    *,
    pruned: Pruned = False,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_option, help="File for the rows, .csv or .parquet (needs pyarrow).", show_default="none"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a row of statistics for every graph, ready for a classifier, and sum the columns up."""
    from circuits.explain.statistics_file import check_suffix

    if out is not None:
        check_suffix(check_file(out))
    facts = write_statistics(GraphFiles.of(graphs, pruned=pruned), out)
    if as_json:
        show_json(facts)
        return
    rows = (
        (name, row["unit"], *(f"{row[key]:.4g}" for key in ("mean", "spread", "smallest", "largest")))
        for name, row in facts["columns"].items()
    )
    heads = ("column", "unit", "mean", "spread", "smallest", "largest")
    counts = {
        "graphs": facts["graphs"],
        "without a graph": len(facts["without_graph"]),
        "file": out or "none: see --out",
    }
    show_page(section("Rows", pairs(counts.items(), width=16)))
    show_page(section("Columns", table(*heads, rows=rows, texts=("unit",))))


def write_statistics(files: GraphFiles, out: Path | None = None) -> dict[str, Any]:
    """Write a row for every graph to a CSV or Parquet file, reading one graph at a time, and return JSON facts.

    Raises:
        ValueError: a file that is no graph, of another model or crosscoder than the first, or that cannot be written.
    """
    from circuits.explain.statistics import columns, graph_statistics
    from circuits.explain.statistics_file import Summary, row_writer

    [n_layers] = {facts["n_layers"] for _, facts in files.metadata()}
    named = columns(n_layers)
    summary, write = Summary(list(named)), None
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(files), desc="statistics", unit="graph", disable=None))
        if out is not None:
            scratch = stack.enter_context(atomic_file(out))
            write = stack.enter_context(row_writer(scratch, named, suffix=out.suffix))
        for file, graph in files.graphs():
            row = graph_statistics(graph, name=file.name)
            summary.add(row)
            if write is not None:
                write(row)
            bar.update()
    return {
        "graphs": len(files),
        "without_graph": list(files.without),
        "file": None if out is None else str(out),
        "columns": {name: {"unit": named[name][0], **figures} for name, figures in summary.facts().items()},
    }
