"""The `circuits` command: trace a prompt, and prune, export or show a saved graph.

Every mistake of the user is one line `error: ...` on stderr and exit code 2, with nothing written. Models are
imported by the one verb that needs them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from circuits.export.formats import FORMATS, check_format
from circuits.export.formats import export as write_format
from circuits.export.neuronpedia import slug
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.pruning import check_threshold
from circuits.heads.command import heads as heads_command
from circuits.report import show as show_report
from circuits.report import summary
from circuits.validation.command import validate as validate_command
from circuits.with_model import with_model
from replacement.files import check_folder

if TYPE_CHECKING:
    from replacement import ReplacementModel

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trace circuits in a language model, and prune, export or show them.",
)

NodeThreshold = Annotated[float, typer.Option(help="Share of influence that the kept nodes hold, 0 to 1.")]
EdgeThreshold = Annotated[float, typer.Option(help="Share of edge influence that the kept edges hold, 0 to 1.")]
GraphFile = Annotated[Path, typer.Argument(help="A graph saved as .safetensors.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]

# format -> file of the pruned circuit
CIRCUIT_FILES = {
    "safetensors": "circuit.safetensors",
    "svg": "circuit.svg",
    "dot": "circuit.dot",
    "graphml": "circuit.graphml",
    "json": "circuit.json",
    "neuronpedia": "circuit.neuronpedia.json",
}


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="The text to trace.", show_default=False)],
    *,
    model: Annotated[str, typer.Option(help="`demo`, a hub name or a Hugging Face folder.")] = "demo",
    crosscoder: Annotated[str, typer.Option(help="`demo` or a crosscoder checkpoint folder.")] = "demo",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Instead of the top tokens: `Austin`, `Austin@5`, `Austin - Houston`, `feature:2/345@7`; repeatable."
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="`linear`: edges run through attention; `features`: attention has features of its own.")
    ] = "linear",
    attention_crosscoder: Annotated[
        str, typer.Option(help="With `--attention features`: `demo` or a checkpoint folder.")
    ] = "demo",
    heads: Annotated[bool, typer.Option(help="Say which heads carry each edge of the pruned circuit.")] = True,
    coverage: Annotated[float, typer.Option(help="Share of influence that is followed back, 0 to 1.")] = 0.99,
    max_nodes: Annotated[int | None, typer.Option(help="Most features to expand.", show_default="no limit")] = None,
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    out: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="circuit-<prompt>")] = None,
    as_json: AsJson = False,
) -> None:
    """Trace what caused the model's next token; writes the full graph, and the pruned circuit in every format."""
    if not prompt.strip():
        raise ValueError("prompt: expected some text, given none")
    _check_thresholds(node_threshold, edge_threshold)
    if not 0.0 <= coverage <= 1.0:
        raise ValueError(f"coverage: expected a share of influence between 0 and 1, given {coverage}")
    if max_nodes is not None and max_nodes < 1:
        raise ValueError(f"max-nodes: expected at least 1, given {max_nodes}")
    if attention not in ("linear", "features"):
        raise ValueError(f"attention: expected linear or features, given {attention!r}")
    folder = check_folder(out if out is not None else Path(f"circuit-{slug(prompt)}"))

    def work(loaded: ReplacementModel, say: Callable[[str], None]) -> tuple[CircuitGraph, CircuitGraph]:
        import circuits

        graph = circuits.trace(
            loaded,
            prompt,
            targets=target or None,
            coverage=coverage,
            max_nodes=max_nodes,
            progress=lambda expanded, share: say(f"{expanded} features expanded, {100 * share:.2g} % left"),
        )
        circuit = graph.prune(nodes=node_threshold, edges=edge_threshold)
        return graph, circuits.with_heads(loaded, circuit) if heads else circuit

    graph, circuit = with_model(
        work,
        model=model,
        crosscoder=crosscoder,
        attention_crosscoder=attention_crosscoder if attention == "features" else None,
    )
    files = _write_all(graph, circuit, folder)
    if as_json:
        typer.echo(json.dumps(summary(graph, circuit, files)))
    else:
        show_report(Console(), {"full": graph, "pruned": circuit}, files)


@app.command()
def prune(
    file: GraphFile,
    *,
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="FILE-pruned.safetensors")] = None,
) -> None:
    """Prune a saved graph."""
    _check_thresholds(node_threshold, edge_threshold)
    graph = CircuitGraph.load(file)
    circuit = graph.prune(nodes=node_threshold, edges=edge_threshold)
    path = circuit.save(out or file.with_name(f"{file.stem}-pruned.safetensors"))
    show_report(Console(), {"full": graph, "pruned": circuit}, {"safetensors": path})


@app.command()
def export(
    file: GraphFile,
    *,
    file_format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
) -> None:
    """Write a saved graph in another format."""
    check_format(file_format)
    typer.echo(str(write_format(CircuitGraph.load(file), file_format, out)))


@app.command()
def show(file: GraphFile) -> None:
    """Describe a saved graph: scores, counts, and the strongest path."""
    graph = CircuitGraph.load(file)
    show_report(Console(), {"pruned" if "pruning" in graph.metadata else "full": graph}, {})


app.command("heads")(heads_command)
app.command("validate")(validate_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(arguments or ["--help"], prog_name="circuits", standalone_mode=False)
    except typer.TyperException as error:
        return _fail(error.format_message())
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def _write_all(graph: CircuitGraph, circuit: CircuitGraph, folder: Path) -> dict[str, Path]:
    """Write every file, or none: all are made in a folder beside the target and moved when the last one is done."""
    names = {"graph": "graph.safetensors", **CIRCUIT_FILES}
    for name in names.values():
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name}: expected a file name, given a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder if folder.is_dir() else folder.parent
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=beside) as scratch:
        graph.save(Path(scratch) / names["graph"])
        for file_format, name in CIRCUIT_FILES.items():
            write_format(circuit, file_format, Path(scratch) / name)
        folder.mkdir(exist_ok=True)
        for name in names.values():
            os.replace(Path(scratch) / name, folder / name)
    return {file_format: folder / name for file_format, name in names.items()}


def _fail(message: str) -> int:
    """One line, whatever a library put into its message."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _check_thresholds(node_threshold: float, edge_threshold: float) -> None:
    check_threshold("node-threshold", node_threshold)
    check_threshold("edge-threshold", edge_threshold)
