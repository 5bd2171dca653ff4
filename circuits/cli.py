"""The `circuits` command: trace a prompt, and prune, export, show or serve saved graphs.

Every mistake of the user is one line `error: ...` on stderr and exit code 2, with nothing written. Models are
imported by the verbs that need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from circuits.explain.command import explain as explain_command
from circuits.explain.compare_command import compare as compare_command
from circuits.explain.global_command import global_ as global_command
from circuits.explain.statistics_command import statistics as statistics_command
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.exporters import exporter, file_formats
from circuits.heads.command import heads as heads_command
from circuits.prune_command import prune as prune_command
from circuits.report import page, summary
from circuits.server.command import serve as serve_command
from circuits.trace_command import trace as trace_command
from circuits.validation.command import validate as validate_command
from replacement.command_line import AsJson, new_app, path_option, run
from replacement.console import show as show_page
from replacement.console import show_json
from replacement.files import check_file

app = new_app("Trace circuits in a language model, and prune, export, show or serve them.")

GraphFile = Annotated[
    Path,
    typer.Argument(
        help="A saved graph: .safetensors, graph JSON of Neuronpedia or circuit-tracer, or circuit-tracer's .pt.",
        show_default=False,
    ),
]

app.command("trace")(trace_command)


app.command("prune")(prune_command)


@app.command()
def export(
    file: GraphFile,
    *,
    file_format: Annotated[
        str, typer.Option("--format", help=f"One of {', '.join(file_formats())}.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(parser=path_option, help="File to write.", show_default=False)],
) -> None:
    """Write a saved graph in another format."""
    exporter(file_format, writes_files=True)
    check_file(out)
    typer.echo(str(CircuitGraph.load(file).export(file_format, out)))


@app.command()
def show(
    file: GraphFile,
    *,
    html: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Write the interactive page to this file instead.", show_default=False),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(
            help="Feature index whose examples the page shows.", show_default="features.sqlite beside the crosscoder"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Describe a saved graph: scores, counts, and the strongest paths; or make it a page to explore."""
    if index is not None and html is None:
        raise ValueError("index: expected --html beside it, given none")
    if html is not None:
        if as_json:
            raise ValueError("html: expected --html or --json, given both")
        check_file(html)
        graph = CircuitGraph.load(file)
        typer.echo(str(graph.to_html(html, index=None if index is None else [index])))
        return
    graph = CircuitGraph.load(file)
    if as_json:
        show_json(summary(graph, graph, {}))
        return
    name = "pruned" if "pruning" in graph.metadata else "as read" if "imported" in graph.metadata else "full"
    show_page(page({name: graph}, {}))


app.command("heads")(heads_command)
app.command("validate")(validate_command)
app.command("explain")(explain_command)
app.command("compare")(compare_command)
app.command("statistics")(statistics_command)
app.command("global")(global_command)
app.command("serve")(serve_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    return run(app, "circuits", arguments)
