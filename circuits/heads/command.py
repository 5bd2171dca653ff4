"""`circuits heads`: which attention heads carry a graph, an edge or a feature, why a head attends, and a check of credit rules.

Without a choice the heads of a saved graph; `--edge`, `--feature`, `--attends` or `--check` choose another question. A
model is loaded only where the file does not hold the answer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console, RenderableType

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.nodes import NodeKind
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
from circuits.with_model import with_model as with_loaded

if TYPE_CHECKING:
    from torch import Tensor

    from replacement import ReplacementModel

CHECK_PROMPTS, CHECK_TOKENS, CHECK_FEATURES = 20, 32, 4
_FEATURE = re.compile(r"(?:(feature|attention):)?(\d+)/(\d+)(?:@(-?\d+))?")
_ATTENDS = re.compile(r"(\d+)\.(\d+)(?:@(-?\d+))?(?:<(-?\d+))?")
_SIMILAR = 4

WithModel = Callable[[Callable[["ReplacementModel"], Facts]], Facts]
"""Loads the model that the options name and gives it to a function."""


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
        str | None, typer.Option(help=f"Credit with --feature: one of {', '.join(RULES)}; {DEFAULT_RULE} by default.")
    ] = None,
    top: Annotated[int, typer.Option(help="Edges, heads or pairs named.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="With --feature: draw heads x tokens, .svg or .png.")] = None,
    model: Annotated[str, typer.Option(help="`demo`, a hub name or a Hugging Face folder.")] = "demo",
    crosscoder: Annotated[str, typer.Option(help="`demo` or a crosscoder checkpoint folder.")] = "demo",
    attention: Annotated[str, typer.Option(help="`linear` or `features`, as the graph was traced.")] = "linear",
    attention_crosscoder: Annotated[
        str, typer.Option(help="With `--attention features`: `demo` or a checkpoint folder.")
    ] = "demo",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Say which attention heads carry a graph, an edge or a feature, and why a head attends where it does."""
    _check_question(file, edge=edge, feature=feature, attends=attends, check=check)
    _check_options(feature=feature, rule=rule, top=top, plot=plot, attention=attention)

    def with_model(work: Callable[[ReplacementModel], Facts]) -> Facts:
        chosen = attention_crosscoder if attention == "features" else None
        return with_loaded(
            lambda loaded, _: work(loaded), model=model, crosscoder=crosscoder, attention_crosscoder=chosen
        )

    page: Callable[[Facts], RenderableType]
    graph = None if file is None else CircuitGraph.load(file)
    if graph is not None:
        _check_attention(graph, attention)
    if check or graph is None:
        if graph is None and model != "demo":
            raise ValueError(
                f"--check draws prompts of the demo's corpus: give a graph of {model}, whose prompt is used"
            )
        facts, page = with_model(lambda loaded: _check(loaded, graph)), check_page
    elif edge is not None:
        number = find_edge(graph, edge)
        facts, page = with_model(lambda loaded: _edge(loaded, graph, number)), edge_page
    elif feature is not None:
        facts = with_model(
            lambda loaded: _feature(loaded, graph, feature, rule=rule or DEFAULT_RULE, top=top, plot=plot)
        )
        page = feature_page
    elif attends is not None:
        facts, page = with_model(lambda loaded: _attends(loaded, graph, attends, top)), attends_page
    else:
        split = graph if graph.heads is not None else None
        facts = graph_facts(split, top=top) if split else with_model(lambda loaded: _graph(loaded, graph, top))
        page = graph_page
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        Console().print(page(facts), highlight=False, markup=False, soft_wrap=False)


def find_edge(graph: CircuitGraph, text: str) -> int:
    """Number of the edge written `SOURCE->TARGET`.

    Raises:
        ValueError: another form, an id that is not in the graph (similar ones are named), or no such edge (the target's
            strongest sources are named).
    """
    source_id, arrow, target_id = (part.strip() for part in text.partition("->"))
    if not (arrow and source_id and target_id):
        raise ValueError(f"edge: expected two node ids as SOURCE->TARGET, given {text!r}")
    ids = graph.nodes.ids()
    for one in (source_id, target_id):
        if one not in ids:
            similar = difflib.get_close_matches(one, ids, n=_SIMILAR, cutoff=0.5)
            hint = f"; similar ones: {', '.join(similar)}" if similar else ""
            raise ValueError(f"edge: the graph has no node {one}{hint}")
    source, target = ids.index(source_id), ids.index(target_id)
    into = graph.edges.into(np.array([target]))
    found = into[graph.edges.source[into] == source]
    if not len(found):
        strongest = into[np.argsort(-np.abs(graph.edges.weight[into]), kind="stable")][:_SIMILAR]
        names = ", ".join(ids[graph.edges.source[one]] for one in strongest)
        known = f"{target_id} is reached from {names or 'no node'}"
        raise ValueError(f"edge: the graph has no edge {source_id}->{target_id}; {known}")
    return int(found[0])


def _check_question(
    file: Path | None, *, edge: str | None, feature: str | None, attends: str | None, check: bool
) -> None:
    """Raise `ValueError` for questions that do not fit together or are not well formed, before anything is read."""
    if sum(one is not None for one in (edge, feature, attends)) + check > 1:
        raise ValueError("expected one of --edge, --feature, --attends and --check, given several")
    if file is None and not check:
        raise ValueError("expected a graph, given none: it may be left out with --check only")
    if feature is not None and _FEATURE.fullmatch(feature.strip()) is None:
        raise ValueError(f"feature: expected layer/index@position such as 2/345@7, given {feature!r}")
    if attends is not None and _ATTENDS.fullmatch(attends.strip()) is None:
        raise ValueError(f"attends: expected layer.head, layer.head@query or layer.head@query<key, given {attends!r}")


def _check_options(*, feature: str | None, rule: str | None, top: int, plot: Path | None, attention: str) -> None:
    """Raise `ValueError` for other options that are wrong, before anything is read."""
    if rule is not None and rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, given {rule!r}")
    if rule is not None and feature is None:
        raise ValueError("rule: expected together with --feature")
    if top < 1:
        raise ValueError(f"top: expected at least 1, given {top}")
    if attention not in ("linear", "features"):
        raise ValueError(f"attention: expected linear or features, given {attention!r}")
    if plot is not None:
        if feature is None:
            raise ValueError("plot: expected together with --feature")
        from circuits.heads.heat_map import check_picture

        check_picture(plot)


def _check_attention(graph: CircuitGraph, attention: str) -> None:
    traced = "linear" if graph.metadata.get("attention", "linear") == "linear" else "features"
    if traced != attention:
        raise ValueError(f"attention: the graph was traced with --attention {traced}, given {attention}")


def _graph(model: ReplacementModel, graph: CircuitGraph, top: int) -> Facts:
    from circuits.heads.edge_split import with_heads

    return graph_facts(with_heads(model, graph), top=top)


def _edge(model: ReplacementModel, graph: CircuitGraph, number: int) -> Facts:
    """Both hops of one edge, split in a graph of that edge alone."""
    from circuits.heads.edge_split import split_heads

    chosen_E = np.zeros(len(graph.edges), dtype=bool)
    chosen_E[number] = True
    kept_N = graph.nodes.mask(NodeKind.LOGIT) | graph.nodes.is_target
    kept_N[[graph.edges.source[number], graph.edges.target[number]]] = True
    alone = CircuitGraph(graph.nodes.select(kept_N), graph.edges.select(kept_N, chosen_E), graph.metadata)

    def parts(hop: str) -> Facts:
        split = split_heads(model, alone, hop=hop)
        return edge_parts(EdgeHeads.from_dense(split.direct_E, split.heads_ELH), 0)

    last = parts("last") if graph.heads is None else edge_parts(graph.heads, number)
    return edge_facts(graph, number, last=last, first=parts("first"))


def _feature(
    model: ReplacementModel, graph: CircuitGraph, text: str, *, rule: str, top: int, plot: Path | None
) -> Facts:
    from circuits.heads.feature_heads import head_view
    from circuits.heads.heat_map import plot_heads

    view = head_view(model, _tokens(model, graph), text)
    files = {} if plot is None else {"plot": str(plot_heads(view, plot))}
    return {**feature_facts(view, rule, top=top), "files": files}


def _attends(model: ReplacementModel, graph: CircuitGraph, text: str, top: int) -> Facts:
    """Against the mean of the other keys, because softmax sees differences only."""
    from circuits.heads.qk_attributor import attribute_score

    match = _ATTENDS.fullmatch(text.strip())
    assert match is not None  # checked with the options
    layer, head, query, key = match.groups()
    found = attribute_score(
        model,
        _tokens(model, graph),
        layer=int(layer),
        head=int(head),
        query=int(query or -1),
        key=None if key is None else int(key),
        contrast="mean",
    )
    return attends_facts(found, tuple(model.language_model.token_strings(graph.metadata["token_ids"])), top=top)


def _check(model: ReplacementModel, graph: CircuitGraph | None) -> Facts:
    """Of the graph's own prompt, or of rows of the demo's corpus that it was not trained on."""
    import torch

    from circuits.heads.removal_check import check_heads

    if graph is not None:
        prompts = [_tokens(model, graph)]
        return check_facts(check_heads(model, prompts, n_features=CHECK_FEATURES * CHECK_PROMPTS))
    from replacement.demo.corpus.mixture import held_out_rows

    tokenizer = model.language_model.tokenizer
    rows = held_out_rows(tokenizer, n_rows=CHECK_PROMPTS, context=CHECK_TOKENS, seed=0)
    return check_facts(check_heads(model, [torch.from_numpy(row) for row in rows], n_features=CHECK_FEATURES))


def _tokens(model: ReplacementModel, graph: CircuitGraph) -> Tensor:
    """The graph's prompt.

    Raises:
        ValueError: it was traced in another model, or does not say which tokens it explains.
    """
    import torch

    facts, lm = graph.metadata, model.language_model
    if "token_ids" not in facts or "model_fingerprint" not in facts:
        raise ValueError("the graph does not name its model and tokens: expected one made by circuits.trace")
    if facts["model_fingerprint"] != lm.fingerprint:
        raise ValueError(f"the graph was traced in {facts['model']}, whose weights are not those of {lm.name}")
    return torch.tensor(facts["token_ids"], device=lm.device)
