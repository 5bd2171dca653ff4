"""`circuits trace`: one prompt, or a file of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.conventions import EXACT
from circuits.graph.neuronpedia_schema import UPLOAD_BYTES
from circuits.graph.text import slug
from circuits.many_prompts import FORMATS as FORMATS_OF_MANY
from circuits.many_prompts import SUMMARY_FILE, PromptLine, read_prompts, trace_many
from circuits.progress import ProgressText
from circuits.report import page, summary
from circuits.trace_options import FORMATS, TraceOptions, check_formats, files_of, write_files
from replacement.command_line import AsJson, Memory, ModelOptions, model_options, path_option
from replacement.console import pairs, section, show_json
from replacement.console import show as show_page
from replacement.files import atomic_folder, check_file, check_folder

if TYPE_CHECKING:
    from replacement import ReplacementModel

NodeThreshold = Annotated[float, typer.Option(help="Share of influence that the kept nodes hold, 0 to 1.")]
EdgeThreshold = Annotated[float, typer.Option(help="Share of edge influence that the kept edges hold, 0 to 1.")]
DEFAULTS = TraceOptions()
FAILED, INTERRUPTED = 1, 130
"""Exit codes where prompts of a file could not be traced, and after Ctrl-C."""
MANY = "Many prompts"
"""Title of these options in the help."""


@model_options
def trace(
    prompt: Annotated[str | None, typer.Argument(help="The text to trace.", show_default=False)] = None,
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
    groups: Annotated[
        bool, typer.Option(help="Group the circuit's nodes that do the same; pictures draw a group as one box.")
    ] = False,
    inclusion: Annotated[
        bool,
        typer.Option(
            help="Note how often each node is kept over a grid of pruning thresholds; pictures draw it as opacity."
        ),
    ] = False,
    coverage: Annotated[float, typer.Option(help="Share of influence that is followed back, 0 to 1.")] = 0.99,
    max_nodes: Annotated[int, typer.Option(help="Most features to expand.")] = DEFAULTS.max_nodes,
    memory: Memory = None,
    drop_below: Annotated[
        float, typer.Option(help="Leave out edges below this share of their target's inflow; they count as lost.")
    ] = 0.0,
    conventions: Annotated[
        str, typer.Option(help="`exact`, or `circuit-tracer` for graphs that agree with that package's.")
    ] = "exact",
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    circuit_nodes: Annotated[
        int | None,
        typer.Option(
            help="Most features, errors and positions of the circuit; 0 for no limit.",
            show_default=f"{EXACT.circuit_nodes}; no limit with --conventions circuit-tracer",
        ),
    ] = None,
    circuit_edges: Annotated[
        int | None,
        typer.Option(
            help="Most edges of the circuit; 0 for no limit.", show_default=f"{EXACT.circuit_edges}; no limit likewise"
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="Feature index for labels.", show_default="features.sqlite beside the crosscoder"),
    ] = None,
    use_index: Annotated[bool, typer.Option("--use-index/--no-index", help="Take labels from feature indexes.")] = True,
    file_format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"Of the pruned circuit: {', '.join(FORMATS)}; repeatable.",
            show_default=f"all; with --prompts {', '.join(FORMATS_OF_MANY)}",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path_option, help="Folder to write to.", show_default="circuit-<prompt>")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=MANY,
            help="Instead of PROMPT: a file with one JSON object per line, with a prompt, and if wanted an id and a target. "
            "Each prompt gets a folder in OUT, and OUT/summary.csv a row. Traced prompts are not traced again; run it "
            "under torchrun to share the work. Exit code 1 where some could not be traced.",
            show_default=False,
        ),
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Trace what caused the model's next token; writes the full graph, and the pruned circuit in every format."""
    tracing = TraceOptions(
        coverage=coverage,
        max_nodes=max_nodes,
        drop_below=drop_below,
        conventions=conventions,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        circuit_nodes=circuit_nodes,
        circuit_edges=circuit_edges,
        index=None if index is None else str(index.absolute()),
        use_index=use_index,
        heads=heads,
        groups=groups,
        inclusion=inclusion,
        memory=memory,
    )
    options = _with_attention(options, attention)
    _check_index(index)
    if prompts is not None:
        if prompt is not None or target:
            raise ValueError("prompts: expected a file alone, given a prompt or a target beside it")
        if out is None:
            raise ValueError("out: expected a folder for the prompts' folders, given none")
        _trace_file(prompts, out, options, tracing, check_formats(file_format or FORMATS_OF_MANY), as_json=as_json)
        return
    prompt = _checked_prompt(prompt)
    folder = check_folder(out if out is not None else Path(f"circuit-{slug(prompt)}"))
    formats = check_formats(file_format or FORMATS)
    _trace_prompt(prompt, target, folder, options, tracing, formats, as_json=as_json)


def _check_index(index: Path | None) -> None:
    """Refuse a wrong file before it costs loading the model."""
    if index is not None:
        from replacement.index.store import FeatureIndex

        FeatureIndex.open(index).close()


def _checked_prompt(prompt: str | None) -> str:
    if prompt is None or not prompt.strip():
        raise ValueError("prompt: expected some text, given none")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes of the command line that are not UTF-8
        raise ValueError("prompt: expected text in UTF-8, given other bytes")
    return prompt


def _trace_prompt(
    prompt: str,
    target: list[str] | None,
    folder: Path,
    options: ModelOptions,
    tracing: TraceOptions,
    formats: tuple[str, ...],
    *,
    as_json: bool,
) -> None:
    for name in files_of(formats).values():
        check_file(folder / name)

    def work(loaded: ReplacementModel, say: Callable[[str], None]) -> tuple[CircuitGraph, CircuitGraph]:
        progress_text = ProgressText(tracing.max_nodes)
        return tracing.trace(
            loaded,
            prompt,
            target,
            announce=lambda cost: typer.echo(f"estimate: {cost}", err=True),
            progress=lambda expanded, share: say(progress_text(expanded, share)),
        )

    graph, circuit = options.use(work)
    files = write_all(graph, circuit, folder, formats, index=tracing.page_index)
    _warn_of_size(files, tracing)
    if as_json:
        show_json(summary(graph, circuit, files))
    else:
        show_page(page({"full": graph, "pruned": circuit}, files))
    if graph.metadata.get("stopped_by") == "interrupt":
        left = f"{100 * graph.metadata['unexpanded_share']:.2g} % of the influence is not expanded"
        typer.echo(f"interrupted: the graph is partial, {left}", err=True)
        raise typer.Exit(INTERRUPTED)


def _warn_of_size(files: dict[str, Path], tracing: TraceOptions) -> None:
    """Say so where a file is too large to be uploaded."""
    if "neuronpedia" in files and (size := files["neuronpedia"].stat().st_size) > UPLOAD_BYTES:
        limit, threshold = UPLOAD_BYTES / 1e6, tracing.edge_threshold
        remedy = f"Neuronpedia takes up to {limit:.0f} MB: use a tighter --edge-threshold (here {threshold})"
        typer.echo(f"{files['neuronpedia']} has {size / 1e6:.0f} MB; {remedy}", err=True)


def write_all(
    graph: CircuitGraph,
    circuit: CircuitGraph,
    folder: Path,
    formats: tuple[str, ...] = FORMATS,
    *,
    index: Sequence[Path] | None = None,
) -> dict[str, Path]:
    """Write every file, or none; other files in the folder stay. Returns the files by format."""
    with atomic_folder(folder, keep_others=True) as scratch:
        write_files(graph, circuit, scratch, formats, index=index)
    return {name: folder / file for name, file in files_of(formats).items()}


def _trace_file(
    file: Path, out: Path, options: ModelOptions, tracing: TraceOptions, formats: tuple[str, ...], *, as_json: bool
) -> None:
    lines = read_prompts(file)
    if options.device == "cuda":  # every process of a machine has a GPU of its own
        options = replace(options, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    part, n_parts = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    check_folder(out)
    model = options.use(lambda loaded, _: loaded)  # a bar needs the terminal without the spinner
    rows = _with_bar(model, lines, out, tracing, formats, part, n_parts)
    failed = [row for row in rows if row["status"] == "failed"]
    if part == 0:
        facts = {"prompts": len(rows), "failed": len(failed), "summary": str(out / SUMMARY_FILE)}
        if as_json:
            show_json(facts)
        else:
            show_page(section("Prompts", pairs(facts.items())))
            for row in failed:
                typer.echo(f"failed: {row['id']}: {row['error']}", err=True)
    if failed:
        raise typer.Exit(FAILED)


def _with_bar(
    model: ReplacementModel,
    lines: list[PromptLine],
    out: Path,
    tracing: TraceOptions,
    formats: tuple[str, ...],
    part: int,
    n_parts: int,
) -> list[dict[str, Any]]:
    """Trace, with a bar in the first process if it is attached to a terminal."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        tqdm(total=len(lines), desc="trace", unit="prompt", disable=True if part else None) as bar,
    ):

        def progress(finished: int) -> None:
            bar.update(finished - bar.n)

        return trace_many(
            model, lines, out, options=tracing, formats=formats, part=part, n_parts=n_parts, progress=progress
        )


def _with_attention(options: ModelOptions, attention: str | None) -> ModelOptions:
    """The options with or without an attention crosscoder, as `--attention` says; naming one implies `features`."""
    if attention not in (None, "linear", "features"):
        raise ValueError(f"attention: expected linear or features, given {attention!r}")
    if attention == "linear" and options.attention_crosscoder is not None:
        raise ValueError("attention: expected features with --attention-crosscoder, given linear")
    if attention == "linear" and options.is_joint:
        raise ValueError("attention: expected features with a joint crosscoder, given linear")
    return options.with_attention() if attention == "features" else options
