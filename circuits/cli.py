"""The `circuits` command: trace a prompt, and prune, export or show a saved graph.

Every mistake of the user is one line `error: ...` on stderr and exit code 2, with nothing written. Models are
imported by the verbs that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import circuits.export  # registers the formats
from circuits.attribution.limits import LABELLED, MAX_NODES, memory_bytes
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import named_conventions
from circuits.graph.exporters import exporter, file_formats
from circuits.graph.neuronpedia_schema import UPLOAD_BYTES
from circuits.graph.pruning import check_threshold
from circuits.graph.text import slug
from circuits.heads.command import heads as heads_command
from circuits.progress import ProgressText
from circuits.report import page, summary
from circuits.validation.command import validate as validate_command
from replacement.command_line import AsJson, ModelOptions, model_options, new_app, path_option, run
from replacement.console import show as show_page
from replacement.console import show_json
from replacement.files import atomic_folder, check_file, check_folder

if TYPE_CHECKING:
    from replacement import ReplacementModel

app = new_app("Trace circuits in a language model, and prune, export or show them.")

NodeThreshold = Annotated[float, typer.Option(help="Share of influence that the kept nodes hold, 0 to 1.")]
EdgeThreshold = Annotated[float, typer.Option(help="Share of edge influence that the kept edges hold, 0 to 1.")]
GraphFile = Annotated[
    Path,
    typer.Argument(
        help="A saved graph: .safetensors, graph JSON of Neuronpedia or circuit-tracer, or circuit-tracer's .pt.",
        show_default=False,
    ),
]

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
GRAPH_FILE = "graph.safetensors"
# format -> file of the pruned circuit; pictures that need Graphviz are left to `circuits export`
CIRCUIT_FILES = {
    name: f"circuit{exporter.suffix}" for name, exporter in file_formats().items() if exporter.fallback is None
}


@app.command()
@model_options
def trace(
    prompt: Annotated[str, typer.Argument(help="The text to trace.", show_default=False)],
    *,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of the top tokens: `Austin`, `Austin@5`, `Austin - Houston`, `feature:2/345@7`; repeatable."
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            help="`linear`: edges run through attention; `features`: attention has features of its own.",
            show_default="features with --attention-crosscoder, else linear",
        ),
    ] = None,
    heads: Annotated[bool, typer.Option(help="Say which heads carry each edge of the pruned circuit.")] = True,
    coverage: Annotated[float, typer.Option(help="Share of influence that is followed back, 0 to 1.")] = 0.99,
    max_nodes: Annotated[int, typer.Option(help="Most features to expand.")] = MAX_NODES,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most memory for the process, such as 4GB; a trace that would need more is refused.",
            show_default="what is available",
        ),
    ] = None,
    drop_below: Annotated[
        float, typer.Option(help="Leave out edges below this share of their target's inflow; they count as lost.")
    ] = 0.0,
    conventions: Annotated[
        str, typer.Option(help="`exact`, or `circuit-tracer` for graphs that agree with that package's.")
    ] = "exact",
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    out: Annotated[
        Path | None, typer.Option(parser=path_option, help="Folder to write to.", show_default="circuit-<prompt>")
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Trace what caused the model's next token; writes the full graph, and the pruned circuit in every format."""
    if not prompt.strip():
        raise ValueError("prompt: expected some text, given none")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes of the command line that are not UTF-8
        raise ValueError("prompt: expected text in UTF-8, given other bytes")
    _check_thresholds(node_threshold, edge_threshold)
    check_threshold("coverage", coverage)
    check_threshold("drop-below", drop_below)
    named_conventions(conventions)
    if max_nodes < 1:
        raise ValueError(f"max-nodes: expected at least 1, given {max_nodes}")
    limit = None if memory is None else memory_bytes(memory)
    options = _with_attention(options, attention)
    folder = check_folder(out if out is not None else Path(f"circuit-{slug(prompt)}"))
    for name in (GRAPH_FILE, *CIRCUIT_FILES.values()):
        check_file(folder / name)

    def work(loaded: ReplacementModel, say: Callable[[str], None]) -> tuple[CircuitGraph, CircuitGraph]:
        progress_text = ProgressText(max_nodes)
        graph = circuits.trace(
            loaded,
            prompt,
            targets=target or None,
            coverage=coverage,
            max_nodes=max_nodes,
            drop_below=drop_below,
            conventions=conventions,
            memory=limit,
            announce=lambda cost: typer.echo(f"estimate: {cost}", err=True),
            progress=lambda expanded, share: say(progress_text(expanded, share)),
        )
        circuit = circuits.with_labels(loaded, graph.prune(nodes=node_threshold, edges=edge_threshold), most=LABELLED)
        return graph, circuits.with_heads(loaded, circuit) if heads else circuit

    graph, circuit = options.use(work)
    files = _write_all(graph, circuit, folder)
    if as_json:
        show_json(summary(graph, circuit, files))
    else:
        show_page(page({"full": graph, "pruned": circuit}, files))
    size = files["neuronpedia"].stat().st_size
    if size > UPLOAD_BYTES:
        remedy = f"Neuronpedia takes up to {UPLOAD_BYTES / 1e6:.0f} MB: use a tighter --edge-threshold (here {edge_threshold})"
        typer.echo(f"{files['neuronpedia']} has {size / 1e6:.0f} MB; {remedy}", err=True)
    if graph.metadata.get("stopped_by") == "interrupt":
        left = f"{100 * graph.metadata['unexpanded_share']:.2g} % of the influence is not expanded"
        typer.echo(f"interrupted: the graph is partial, {left}", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def prune(
    file: GraphFile,
    *,
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    out: Annotated[
        Path | None, typer.Option(parser=path_option, help="File to write.", show_default="FILE-pruned.safetensors")
    ] = None,
) -> None:
    """Prune a saved graph."""
    _check_thresholds(node_threshold, edge_threshold)
    path = check_file(out or file.with_name(f"{file.stem}-pruned.safetensors"))
    graph = CircuitGraph.load(file)
    circuit = graph.prune(nodes=node_threshold, edges=edge_threshold)
    circuit.save(path)
    show_page(page({"full": graph, "pruned": circuit}, {"safetensors": path}))


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
def show(file: GraphFile) -> None:
    """Describe a saved graph: scores, counts, and the strongest path."""
    graph = CircuitGraph.load(file)
    name = "pruned" if "pruning" in graph.metadata else "as read" if "imported" in graph.metadata else "full"
    show_page(page({name: graph}, {}))


app.command("heads")(heads_command)
app.command("validate")(validate_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    return run(app, "circuits", arguments)


def _with_attention(options: ModelOptions, attention: str | None) -> ModelOptions:
    """The options with or without an attention crosscoder, as `--attention` says; naming one implies `features`."""
    if attention not in (None, "linear", "features"):
        raise ValueError(f"attention: expected linear or features, given {attention!r}")
    if attention == "linear" and options.attention_crosscoder is not None:
        raise ValueError("attention: expected features with --attention-crosscoder, given linear")
    return options.with_attention() if attention == "features" else options


def _write_all(graph: CircuitGraph, circuit: CircuitGraph, folder: Path) -> dict[str, Path]:
    """Write every file, or none; other files in the folder stay."""
    with atomic_folder(folder, keep_others=True) as scratch:
        graph.save(scratch / GRAPH_FILE)
        for file_format, name in CIRCUIT_FILES.items():
            circuit.export(file_format, scratch / name)
    return {name: folder / file for name, file in {"graph": GRAPH_FILE, **CIRCUIT_FILES}.items()}


def _check_thresholds(node_threshold: float, edge_threshold: float) -> None:
    check_threshold("node-threshold", node_threshold)
    check_threshold("edge-threshold", edge_threshold)
