"""`circuits prune`: the part of a saved graph that carries its influence, or that the output needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import check_traced_here
from circuits.graph.pruning import check_threshold
from circuits.report import page
from circuits.trace_command import EdgeThreshold, NodeThreshold
from circuits.validation.command import other_prompts
from replacement.command_line import ModelOptions, model_options, path_option
from replacement.console import show
from replacement.files import check_file, read_text

if TYPE_CHECKING:
    from replacement import ReplacementModel

_SEARCHED, _SEED = 16, 1  # `circuits validate` resamples from rows of seed 0


@model_options
def prune(
    file: Annotated[
        Path,
        typer.Argument(
            help="A saved graph: .safetensors, graph JSON of Neuronpedia or circuit-tracer, or circuit-tracer's .pt.",
            show_default=False,
        ),
    ],
    *,
    node_threshold: NodeThreshold = 0.8,
    edge_threshold: EdgeThreshold = 0.98,
    faithful: Annotated[
        float | None,
        typer.Option(
            help="Keep what the output needs instead of what carries influence: add features until the circuit alone, with "
            "features of other prompts in the place of all others, has this faithfulness.",
            show_default="by influence",
        ),
    ] = None,
    most_nodes: Annotated[
        int | None,
        typer.Option(min=1, help="With --faithful: most nodes of the circuit.", show_default="60"),
    ] = None,
    resample: Annotated[
        Path | None,
        typer.Option(
            help="With --faithful: text file with one prompt per line to take those features from, others than `circuits "
            "validate` is given. By default rows of the demo's corpus, for the demo."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="File to write, as safetensors.", show_default="FILE-pruned.safetensors"),
    ] = None,
    options: ModelOptions,
) -> None:
    """Prune a saved graph."""
    check_threshold("node-threshold", node_threshold)
    check_threshold("edge-threshold", edge_threshold)
    for name, given in (("resample", resample), ("most-nodes", most_nodes)):
        if faithful is None and given is not None:
            raise ValueError(f"{name}: expected with --faithful alone, given without it")
    if faithful is not None:
        check_threshold("faithful", faithful, what="faithfulness")
    path = check_file(out or file.with_name(f"{file.stem}-pruned.safetensors"))
    lines = (
        None if resample is None else read_text(resample, expected="a text file with one prompt per line").splitlines()
    )
    graph = CircuitGraph.load(file)
    if faithful is None:
        circuit = graph.prune(nodes=node_threshold, edges=edge_threshold)
    else:
        check_traced_here(graph.metadata)
        options = options.for_graph(graph.metadata)

        def work(loaded: ReplacementModel, say: object) -> CircuitGraph:
            from circuits.validation.faithful import MOST_NODES, prune_faithfully

            others = other_prompts(loaded, graph, lines, is_demo=options.is_demo, most=_SEARCHED, seed=_SEED)
            if not others:
                raise ValueError("resample: expected a file of prompts for a model other than the demo, given none")
            return prune_faithfully(
                loaded, graph, others, faithfulness=faithful, most_nodes=most_nodes or MOST_NODES, edges=edge_threshold
            )

        circuit = options.use(work)
    circuit.save(path)
    before = "before" if "pruning" in graph.metadata else "full"
    show(page({before: graph, "pruned": circuit}, {"safetensors": path}))
