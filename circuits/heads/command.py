"""`circuits heads`: which attention heads carry a graph, an edge or a feature, why a head attends, and a check of credit rules.

Without a choice the heads of a saved graph; `--edge`, `--feature`, `--attends` or `--check` choose another question. A
model is loaded only where the file does not hold the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.metadata import check_traced_here
from circuits.graph.rows import edge_number
from circuits.graph.text import parse_feature_name, shorten
from circuits.heads import pages
from circuits.heads.facts import Facts, attends_facts, check_facts, edge_facts, feature_facts, graph_facts
from circuits.heads.heat_map import check_picture
from circuits.heads.relu_credit import DEFAULT_RULE, RULES
from replacement.command_line import AsJson, ModelOptions, model_options, path_option
from replacement.console import show, show_json

if TYPE_CHECKING:
    from replacement import ReplacementModel

_ATTENDS = re.compile(r"(attention:)?(\d{1,40})\.(\d{1,40})(?:@(-?\d{1,40}))?(?:<(-?\d{1,40}))?")
_LONGEST_ECHO = 60
"""Characters of a wrong input that an error message repeats."""


@model_options
def heads(
    file: Annotated[
        Path | None, typer.Argument(help="A saved graph, .safetensors or graph JSON; may be left out with --check.")
    ] = None,
    *,
    edge: Annotated[str | None, typer.Option(help="One edge, `SOURCE->TARGET`, by node ids.")] = None,
    feature: Annotated[
        str | None, typer.Option(help="One active feature of the graph's prompt: `2/345@7`, `attention:2/345@7`.")
    ] = None,
    attends: Annotated[
        str | None,
        typer.Option(
            help="Why a head, `layer.head`, attends: `2.0`; from position 9, `2.0@9`; to position 5, `'2.0@9<5'` "
            "(quoted). Negative positions count from the end; left out, the last one, and the key attended to most. "
            "`attention:2.0`: a query-key group of the low-rank sparse attention that replaces attention."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Remove heads in the model and compare with what every rule predicts.")
    ] = False,
    rule: Annotated[
        str | None,
        typer.Option(help=f"Credit with --feature: one of {', '.join(RULES)}.", show_default=DEFAULT_RULE),
    ] = None,
    top: Annotated[int, typer.Option(help="Edges, heads or pairs named.")] = 10,
    plot: Annotated[
        Path | None, typer.Option(parser=path_option, help="With --feature: draw heads x tokens, .svg or .png.")
    ] = None,
    options: ModelOptions,
    as_json: AsJson = False,
) -> None:
    """Say which attention heads carry a graph, an edge or a feature, and why a head attends where it does."""
    if sum(question is not None for question in (edge, feature, attends)) + check > 1:
        raise ValueError("expected one of --edge, --feature, --attends and --check, given several")
    if top < 1:
        raise ValueError(f"top: expected at least 1, given {top}")
    place = None if attends is None else _parse_attends(attends)
    _check_feature(feature, rule, plot)
    graph = None if file is None else CircuitGraph.load(file)

    def ask(question: Callable[[ReplacementModel], Facts]) -> Facts:
        if graph is not None:
            check_traced_here(graph.metadata)
        chosen = options if graph is None else options.for_graph(graph.metadata)
        return chosen.use(lambda model, _: question(model))

    if graph is None and not check:
        raise ValueError("expected a graph, given none: it may be left out with --check only")
    if graph is None and not options.is_demo:
        raise ValueError(
            f"--check draws prompts of the demo's corpus: give a graph of {options.model}, whose prompt is used"
        )
    page: Callable[[Facts], Group]
    if graph is None or check:
        facts, page = ask(lambda model: check_facts(model, graph)), pages.check_page
    else:
        rule = rule or DEFAULT_RULE
        facts, page = _answer(graph, ask, edge=edge, feature=feature, place=place, rule=rule, top=top, plot=plot)
    if as_json:
        show_json(facts)
    else:
        show(page(facts))


def _answer(
    graph: CircuitGraph,
    ask: Callable[[Callable[[ReplacementModel], Facts]], Facts],
    *,
    edge: str | None,
    feature: str | None,
    place: dict[str, int | str] | None,
    rule: str,
    top: int,
    plot: Path | None,
) -> tuple[Facts, Callable[[Facts], Group]]:
    """What was asked of a graph, and the page for it.

    Args:
        ask: asks a question of the model, which is loaded for it.
        place: of the head whose attention is asked for.
    """
    if edge is not None:
        number = edge_number(graph, edge)
        return ask(lambda model: edge_facts(model, graph, number)), pages.edge_page
    if feature is not None:
        facts = ask(lambda model: feature_facts(model, graph, feature, rule=rule, top=top, plot=plot))
        return facts, pages.feature_page
    if place is not None:
        return ask(lambda model: attends_facts(model, graph, place, top=top)), pages.attends_page
    if graph.heads is not None:
        return graph_facts(graph, top=top), pages.graph_page
    from circuits.heads.edge_split import with_heads

    return ask(lambda model: graph_facts(with_heads(model, graph), top=top)), pages.graph_page


def _check_feature(text: str | None, rule: str | None, plot: Path | None) -> None:
    """Raise `ValueError`, before anything is read, for a wrong name of a feature and wrong options beside it."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, given {shorten(rule, _LONGEST_ECHO)!r}")
    for name, given in (("rule", rule), ("plot", plot)):
        if given is not None and text is None:
            raise ValueError(f"{name}: expected together with --feature")
    if text is None:
        return
    if plot is not None:
        check_picture(plot)
    try:
        parse_feature_name(text)
    except ValueError as error:
        raise ValueError(f"feature: {error}") from error


def _parse_attends(text: str) -> dict[str, int | str]:
    """Layer, head and, where they are given, positions of query and key; whether it is a head of the original model."""
    match = _ATTENDS.fullmatch(text.strip())
    if match is None:
        given = shorten(text, _LONGEST_ECHO)
        raise ValueError(f"attends: expected layer.head, layer.head@query or layer.head@query<key, given {given!r}")
    prefix, *numbers = match.groups()
    names = ("layer", "head", "query", "key")
    place = {name: int(number) for name, number in zip(names, numbers, strict=True) if number is not None}
    return {**place, "heads": "replaced" if prefix else "original"}
