"""`circuits heads`: which attention heads carry a graph, an edge or a feature, why a head attends, and a check of credit rules.

Without a choice the heads of a saved graph; `--edge`, `--feature`, `--attends` or `--check` choose another question. A
model is loaded only where the file does not hold the answer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import RenderableType

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.nodes import NodeKind
from circuits.graph.text import parse_feature_name, shorten
from circuits.heads.heat_map import check_picture, plot_heads
from circuits.heads.json_facts import (
    Facts,
    attends_facts,
    check_facts,
    edge_facts,
    edge_parts,
    feature_facts,
    graph_facts,
)
from circuits.heads.pages import attends_page, check_page, edge_page, feature_page, graph_page
from circuits.heads.relu_credit import DEFAULT_RULE, RULES
from replacement.command_line import AsJson, ModelOptions, model_options
from replacement.console import show, show_json

if TYPE_CHECKING:
    from replacement import ReplacementModel

CHECK_PROMPTS, CHECK_TOKENS, CHECK_FEATURES = 20, 32, 4
_ATTENDS = re.compile(r"(\d+)\.(\d+)(?:@(-?\d+))?(?:<(-?\d+))?")
_SIMILAR = 4
_LONGEST_ECHO = 60
"""Characters of a wrong input that an error message repeats."""


@model_options
def heads(
    file: Annotated[
        Path | None, typer.Argument(help="A graph saved as .safetensors; may be left out with --check.")
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
            "(quoted). Negative positions count from the end; left out, the last one, and the key attended to most."
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
    plot: Annotated[Path | None, typer.Option(help="With --feature: draw heads x tokens, .svg or .png.")] = None,
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
        chosen = options if graph is None else options.for_graph(graph.metadata)
        return chosen.use(lambda model, _: question(model))

    page: Callable[[Facts], RenderableType]
    if graph is None and not check:
        raise ValueError("expected a graph, given none: it may be left out with --check only")
    if graph is None and not options.is_demo:
        raise ValueError(
            f"--check draws prompts of the demo's corpus: give a graph of {options.model}, whose prompt is used"
        )
    if graph is None or check:
        facts, page = ask(lambda model: _check(model, graph)), check_page
    elif edge is not None:
        number = find_edge(graph, edge)
        facts, page = ask(lambda model: _edge(model, graph, number)), edge_page
    elif feature is not None:
        facts = ask(lambda model: _feature(model, graph, feature, rule=rule or DEFAULT_RULE, top=top, plot=plot))
        page = feature_page
    elif place is not None:
        facts, page = ask(lambda model: _attends(model, graph, place, top=top)), attends_page
    else:
        facts = graph_facts(graph, top=top) if graph.heads is not None else ask(lambda model: _graph(model, graph, top))
        page = graph_page
    if as_json:
        show_json(facts)
    else:
        show(page(facts))


def find_edge(graph: CircuitGraph, text: str) -> int:
    """Number of the edge written `SOURCE->TARGET`.

    Raises:
        ValueError: another form, an id that is not in the graph (similar ones are named), or no such edge (the target's
            strongest sources are named).
    """
    source_id, arrow, target_id = (part.strip() for part in text.partition("->"))
    if not (arrow and source_id and target_id):
        raise ValueError(f"edge: expected two node ids as SOURCE->TARGET, given {shorten(text, _LONGEST_ECHO)!r}")
    ids = graph.nodes.ids()
    for node_id in (source_id, target_id):
        if node_id not in ids:
            shown = shorten(node_id, _LONGEST_ECHO)
            similar = difflib.get_close_matches(shown, ids, n=_SIMILAR, cutoff=0.5)
            hint = f"; similar ones: {', '.join(similar)}" if similar else ""
            raise ValueError(f"edge: the graph has no node {shown}{hint}")
    source, target = ids.index(source_id), ids.index(target_id)
    into = graph.edges.into(np.array([target]))
    matches = into[graph.edges.source[into] == source]
    if not len(matches):
        strongest = into[np.argsort(-np.abs(graph.edges.weight[into]), kind="stable")][:_SIMILAR]
        names = ", ".join(ids[graph.edges.source[number]] for number in strongest)
        known = f"{target_id} is reached from {names or 'no node'}"
        raise ValueError(f"edge: the graph has no edge {source_id}->{target_id}; {known}")
    return int(matches[0])


def _check_feature(text: str | None, rule: str | None, plot: Path | None) -> None:
    """Raise `ValueError`, before anything is read, for a wrong name of a feature and wrong options beside it."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, given {shorten(rule, _LONGEST_ECHO)!r}")
    if text is None:
        for name, given in (("rule", rule), ("plot", plot)):
            if given is not None:
                raise ValueError(f"{name}: expected together with --feature")
        return
    if plot is not None:
        check_picture(plot)
    try:
        parse_feature_name(text)
    except ValueError as error:
        raise ValueError(f"feature: {error}") from error


def _parse_attends(text: str) -> dict[str, int]:
    """Layer, head and, where they are given, positions of query and key."""
    match = _ATTENDS.fullmatch(text.strip())
    if match is None:
        given = shorten(text, _LONGEST_ECHO)
        raise ValueError(f"attends: expected layer.head, layer.head@query or layer.head@query<key, given {given!r}")
    names = ("layer", "head", "query", "key")
    return {name: int(number) for name, number in zip(names, match.groups(), strict=True) if number is not None}


def _graph(model: ReplacementModel, graph: CircuitGraph, top: int) -> Facts:
    from circuits.heads.edge_split import with_heads

    return graph_facts(with_heads(model, graph), top=top)


def _edge(model: ReplacementModel, graph: CircuitGraph, number: int) -> Facts:
    """Both hops of one edge, split in a graph of that edge alone."""
    from circuits.heads.edge_split import split_heads

    chosen_E = np.arange(len(graph.edges)) == number
    kept_N = graph.nodes.mask(NodeKind.LOGIT) | graph.nodes.is_target
    kept_N[[graph.edges.source[number], graph.edges.target[number]]] = True
    alone = CircuitGraph(graph.nodes.select(kept_N), graph.edges.select(kept_N, chosen_E), graph.metadata)

    def parts(hop: str) -> Facts:
        split = split_heads(model, alone, hop=hop)
        return edge_parts(EdgeHeads.from_dense(split.direct_E, split.heads_ELH), 0)

    last = parts("last") if graph.heads is None else edge_parts(graph.heads, number)
    return edge_facts(graph, number, last=last, first=parts("first"))


def _feature(
    model: ReplacementModel, graph: CircuitGraph, name: str, *, rule: str, top: int, plot: Path | None
) -> Facts:
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.feature_heads import head_view

    view = head_view(model, traced_tokens(model, graph), name)
    files = {} if plot is None else {"plot": str(plot_heads(view, plot))}
    return {**feature_facts(view, rule, top=top), "files": files}


def _attends(model: ReplacementModel, graph: CircuitGraph, place: dict[str, int], *, top: int) -> Facts:
    """Against the mean of the other keys, because softmax sees differences only."""
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.qk_attributor import QKAttributor

    attribution = QKAttributor(model, traced_tokens(model, graph)).score(**place, contrast="mean")
    return attends_facts(attribution, model.language_model.token_strings(graph.metadata["token_ids"]), top=top)


def _check(model: ReplacementModel, graph: CircuitGraph | None) -> Facts:
    """Of the graph's own prompt, or of rows of the demo's corpus that it was not trained on."""
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.removal_check import check_heads
    from replacement.demo.corpus.mixture import held_out_rows

    if graph is not None:
        prompt = traced_tokens(model, graph)
        return check_facts(check_heads(model, [prompt], n_features=CHECK_FEATURES * CHECK_PROMPTS))
    rows = held_out_rows(model.language_model.tokenizer, n_rows=CHECK_PROMPTS, context=CHECK_TOKENS, seed=0)
    return check_facts(check_heads(model, [row.tolist() for row in rows], n_features=CHECK_FEATURES))
