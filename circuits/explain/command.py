"""`circuits explain`: a saved graph as a story of a few sentences, each tested in the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from circuits.explain.claims import MOST_GROUPS
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import check_traced_here
from replacement import console
from replacement.command_line import AsJson, ModelOptions, model_options, path_option
from replacement.files import check_file, write_atomic

if TYPE_CHECKING:
    from replacement import ReplacementModel


@model_options
def explain(
    file: Annotated[Path, typer.Argument(help="A graph saved as .safetensors.", show_default=False)],
    *,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another prompt, which groups are set to the values of; may be given several times.",
            show_default="for the demo the closest probes with other answers, else none",
        ),
    ] = None,
    groups: Annotated[int, typer.Option(help=f"Groups of the story, 2 to {MOST_GROUPS}.")] = MOST_GROUPS,
    controls: Annotated[int, typer.Option(help="Random changes that each ablation is compared with.")] = 99,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the random changes.")] = 0,
    html: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Write the page to this file instead.", show_default=False),
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Tell a graph in a few sentences about groups of features, and test every claim in the model."""
    if html is not None:
        if as_json:
            raise ValueError("html: expected --html or --json, given both")
        check_file(html)
    graph = CircuitGraph.load(file)
    check_traced_here(graph.metadata)
    options = options.for_graph(graph.metadata)

    def work(loaded: ReplacementModel, say: object) -> dict[str, Any]:
        from circuits.explain.counterfactuals import demo_counterfactuals
        from circuits.explain.story import explain_graph

        others = against or (demo_counterfactuals(loaded.language_model, graph) if options.is_demo else [])
        return explain_graph(loaded, graph, against=others, most_groups=groups, controls=controls, seed=seed)

    facts = options.use(work)
    if html is not None:
        from circuits.explain.story_html import html_page

        typer.echo(str(write_atomic(html, html_page(facts))))
    elif as_json:
        console.show_json(facts)
    else:
        from circuits.explain.story_page import page

        console.show(page(facts))
