"""What the `heads` command finds out, question by question, as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.influence import edge_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.text import full_name
from circuits.heads.heat_map import plot_heads
from replacement import console

if TYPE_CHECKING:
    from replacement import ReplacementModel

LEAST = 0.01
"""Heads of an edge are named from this part of its summed magnitudes on."""

CHECK_PROMPTS, CHECK_TOKENS, CHECK_FEATURES = 20, 32, 4
"""Rows of the demo's corpus that rules are checked on, tokens of each, and features of each."""

Facts = dict[str, Any]
"""Names and values that JSON can hold."""


def graph_facts(graph: CircuitGraph, *, top: int) -> Facts:
    """How much influence each head carries, and the strongest edges with their heads.

    An edge's influence is divided among the direct stream, its heads and the rest in proportion to their magnitudes, and
    summed over edges: `sum_e influence_e |c_{e,h}| / sum_j |c_{e,j}|`.

    Args:
        graph: one whose heads are known.
        top: edges named, the most influential ones.
    """
    assert graph.heads is not None
    heads, influence_E = graph.heads, edge_influence(graph)
    edge_P, size_E = heads.edge, heads.magnitudes()
    per_unit_E = np.divide(influence_E, size_E, out=np.zeros_like(influence_E), where=size_E > 0)
    carried_P = per_unit_E[edge_P] * np.abs(heads.weight)
    total = float(influence_E[size_E > 0].sum())

    def carrier(influence: float) -> Facts:
        return {"influence": float(influence), "share": _share(influence, total)}

    names, number_P = np.unique(heads.layer * 1j + heads.head, return_inverse=True)
    carried_N, n_edges_N = np.bincount(number_P, carried_P), np.bincount(number_P)
    rows = [
        {"layer": int(names[n].imag), "head": int(names[n].real)} | carrier(carried_N[n]) | {"edges": int(n_edges_N[n])}
        for n in np.argsort(-carried_N, kind="stable").tolist()
    ]
    strongest = np.argsort(-influence_E, kind="stable")[:top]
    return {
        "prompt": graph.metadata["prompt"],
        "hop": "last",
        "influence": total,
        "heads": rows,
        "direct": carrier(per_unit_E @ np.abs(heads.direct)),
        "rest": carrier(per_unit_E @ np.abs(heads.rest)),
        "edges": [
            _ends(graph, edge)
            | {"influence": float(influence_E[edge]), "carried_by": heads.text(edge, most=4, least=0.0)}
            | {"parts": edge_parts(heads, edge)}
            for edge in strongest.tolist()
        ],
    }


def edge_facts(model: ReplacementModel, graph: CircuitGraph, edge: int) -> Facts:
    """One edge by last and by first hop (`edge_parts` of each), split in a graph of that edge alone."""
    from circuits.heads.edge_split import split_heads

    chosen_E = np.arange(len(graph.edges)) == edge
    kept_N = graph.nodes.mask(NodeKind.LOGIT) | graph.nodes.is_target
    kept_N[[graph.edges.source[edge], graph.edges.target[edge]]] = True
    alone = graph.select(kept_N, chosen_E)

    def parts(hop: str) -> Facts:
        split = split_heads(model, alone, hop=hop)
        return edge_parts(EdgeHeads.from_dense(split.direct_E, split.heads_ELH), 0)

    last = parts("last") if graph.heads is None else edge_parts(graph.heads, edge)
    return {**_ends(graph, edge), "last": last, "first": parts("first")}


def edge_parts(heads: EdgeHeads, edge: int) -> Facts:
    """The direct part of an edge, its heads from `LEAST` of the summed magnitudes on, and the rest."""
    listed, direct = heads.of(edge), float(heads.direct[edge])
    total = heads.magnitude(edge)
    named = [
        {"layer": layer, "head": head, "weight": weight, "share": _share(abs(weight), total)}
        for layer, head, weight in listed
        if total and abs(weight) >= LEAST * total
    ]
    rest = float(heads.rest[edge]) + sum(weight for *_, weight in listed[len(named) :])
    return {"direct": direct, "direct_share": _share(abs(direct), total), "heads": named, "rest": rest}


def feature_facts(
    model: ReplacementModel, graph: CircuitGraph, name: str, *, rule: str, top: int, plot: Path | None
) -> Facts:
    """The players of one feature of the graph's prompt with the credit a rule gives them, strongest first; and what is left.

    Args:
        top: heads named; all others are summed.
        plot: file for a picture of heads x tokens.
    """
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.feature_heads import head_view

    view = head_view(model, traced_tokens(model, graph), name)
    credit, feature = view.credit(rule), view.feature
    columns = np.stack([view.contributions, credit.credit_J, credit.standard_error_J], 1).tolist()
    *players, direct = (dict(zip(("contribution", "credit", "standard_error"), row, strict=True)) for row in columns)
    heads = [
        {
            "name": view.name((layer, head)),
            "layer": layer,
            "head": head,
            **player,
            "encoder_share": float(view.encoder_share_LH[layer, head]),
        }
        for (layer, head), player in zip(view.players, players, strict=True)
    ]
    heads.sort(key=lambda head: -abs(head["contribution"]))
    others = heads[top:]
    facts = ("pre_activation", "activation", "threshold", "bias", "identity_error")
    return {
        "feature": str(feature),
        "part": feature.part,
        "token": view.tokens[feature.position],
        **{name: getattr(view, name) for name in facts},
        "rule": rule,
        "heads": heads[:top],
        "other_heads": {"number": len(others)}
        | {name: math.fsum(head[name] for head in others) for name in ("contribution", "credit")},
        "direct": direct,
        "residual": credit.residual,
        "files": {} if plot is None else {"plot": str(plot_heads(view, plot))},
    }


def attends_facts(model: ReplacementModel, graph: CircuitGraph, place: Mapping[str, Any], *, top: int) -> Facts:
    """Why a head attends to a key: pairs of nodes, and the sums of each node's pairs, largest magnitude first.

    The score is compared with the mean of the other keys, because softmax sees differences only.

    Args:
        place: `layer`, `head`, and where they are given `heads` and the positions `query` and `key`.
        top: pairs and nodes of each side that are named.
    """
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.qk_attribution import attribute_score

    score = attribute_score(model, traced_tokens(model, graph), **place, contrast="mean")
    tokens = model.language_model.prompt_strings(graph.metadata["token_ids"])
    return {"query_token": tokens[score.query], "key_token": tokens[score.key], **score.to_json(top)}


def check_facts(model: ReplacementModel, graph: CircuitGraph | None) -> Facts:
    """Correlation and relative error of every rule on every rung; null where they are not defined.

    Checked on the graph's own prompt, or on rows of the demo's corpus that it was not trained on.
    """
    from circuits.attribution.grounding import traced_tokens
    from circuits.heads.removal_check import check_heads
    from replacement.demo.corpus.mixture import held_out_rows

    if graph is not None:
        check = check_heads(model, [traced_tokens(model, graph)], n_features=CHECK_FEATURES * CHECK_PROMPTS)
    else:
        rows = held_out_rows(model.language_model.tokenizer, n_rows=CHECK_PROMPTS, context=CHECK_TOKENS, seed=0)
        check = check_heads(model, [row.tolist() for row in rows], n_features=CHECK_FEATURES)

    def figures(rule: str, rung: str) -> Facts:
        return {"correlation": check.correlation(rule, rung), "relative_error": check.relative_error(rule, rung)}

    rungs = {rung: {rule: figures(rule, rung) for rule in check.predicted} for rung in check.measured}
    facts = {"prompts": check.n_prompts, "features": check.n_features, "pairs": check.n_pairs}
    return facts | {"rungs": console.finite(rungs)}


def _ends(graph: CircuitGraph, edge: int) -> Facts:
    ids = graph.nodes.ids()
    facts: Facts = {"weight": float(graph.edges.weight[edge])}
    for end in ("source", "target"):
        node = int(getattr(graph.edges, end)[edge])
        facts |= {end: ids[node], f"{end}_name": full_name(graph.nodes, node)}
    return facts


def _share(part: float, total: float) -> float:
    return float(part / total) if total else 0.0
