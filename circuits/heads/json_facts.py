"""What the `heads` command says, as plain values for JSON: about a graph, an edge, a feature, a score and a check of rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.influence import edge_influence
from circuits.graph.text import full_name

if TYPE_CHECKING:
    from circuits.heads.feature_heads import HeadView
    from circuits.heads.qk_attribution import QKAttribution
    from circuits.heads.removal_check import HeadCheck

LEAST = 0.01
"""Heads of an edge are named from this part of its summed magnitudes on."""

Facts = dict[str, Any]


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
    edge_P = np.repeat(np.arange(len(heads)), np.diff(heads.indptr))
    size_E = np.bincount(edge_P, np.abs(heads.weight), minlength=len(heads))
    size_E = size_E + np.abs(heads.direct) + np.abs(heads.rest)
    per_unit_E = np.divide(influence_E, size_E, out=np.zeros_like(influence_E), where=size_E > 0)
    carried_P = per_unit_E[edge_P] * np.abs(heads.weight)
    total = float(influence_E[size_E > 0].sum())
    names, number_P = np.unique(heads.layer * 1j + heads.head, return_inverse=True)
    carried_N, n_edges_N = np.bincount(number_P, carried_P), np.bincount(number_P)
    rows = [
        {
            "layer": int(names[n].imag),
            "head": int(names[n].real),
            "influence": float(carried_N[n]),
            "share": _share(carried_N[n], total),
            "edges": int(n_edges_N[n]),
        }
        for n in np.argsort(-carried_N, kind="stable").tolist()
    ]
    apart = {"direct": float(per_unit_E @ np.abs(heads.direct)), "rest": float(per_unit_E @ np.abs(heads.rest))}
    strongest = np.argsort(-influence_E, kind="stable")[:top]
    return {
        "prompt": graph.metadata["prompt"],
        "hop": "last",
        "influence": total,
        "heads": rows,
        **{name: {"influence": value, "share": _share(value, total)} for name, value in apart.items()},
        "edges": [
            _ends(graph, edge)
            | {"influence": float(influence_E[edge]), "carried_by": heads.text(edge, most=4, least=0.0)}
            | {"parts": edge_parts(heads, edge)}
            for edge in strongest.tolist()
        ],
    }


def edge_facts(graph: CircuitGraph, edge: int, *, last: Facts, first: Facts) -> Facts:
    """One edge by last and by first hop (`edge_parts` of each)."""
    return {**_ends(graph, edge), "last": last, "first": first}


def edge_parts(heads: EdgeHeads, edge: int) -> Facts:
    """The direct part of an edge, its heads from `LEAST` of the summed magnitudes on, and the rest."""
    listed, direct = heads.of(edge), float(heads.direct[edge])
    total = sum(abs(weight) for *_, weight in listed) + abs(direct) + abs(float(heads.rest[edge]))
    named = [
        {"layer": layer, "head": head, "weight": weight, "share": _share(abs(weight), total)}
        for layer, head, weight in listed
        if total and abs(weight) >= LEAST * total
    ]
    rest = float(heads.rest[edge]) + sum(weight for *_, weight in listed[len(named) :])
    return {"direct": direct, "direct_share": _share(abs(direct), total), "heads": named, "rest": rest}


def feature_facts(view: HeadView, rule: str, *, top: int) -> Facts:
    """The players of one feature with the credit a rule gives them, strongest first; and what is left.

    Args:
        top: heads named; all others are summed.
    """
    credit, feature = view.credit(rule), view.feature
    columns = (view.contributions, credit.credit_J, credit.standard_error_J)
    *players, direct = (
        {"contribution": contribution, "credit": share, "standard_error": error}
        for contribution, share, error in zip(*(column.tolist() for column in columns), strict=True)
    )
    heads = [
        {"layer": layer, "head": head, **player, "encoder_share": float(view.encoder_share_LH[layer, head])}
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
        "other_heads": {
            "number": len(others),
            **{name: math.fsum(head[name] for head in others) for name in ("contribution", "credit")},
        },
        "direct": direct,
        "residual": credit.residual,
    }


def attends_facts(score: QKAttribution, tokens: Sequence[str], *, top: int) -> Facts:
    """Why a head attends to a key: pairs of nodes, and the sums of each node's pairs, largest magnitude first.

    Args:
        score: the divided score.
        tokens: the prompt, token by token.
        top: pairs and nodes of each side that are named.
    """
    return {"query_token": tokens[score.query], "key_token": tokens[score.key], **score.to_json(top)}


def check_facts(check: HeadCheck) -> Facts:
    """Correlation and relative error of every rule on every rung; null where they are not defined."""
    return {
        "prompts": check.n_prompts,
        "features": check.n_features,
        "pairs": check.n_pairs,
        "rungs": {
            rung: {
                rule: {
                    "correlation": _number(check.correlation(rule, rung)),
                    "relative_error": _number(check.relative_error(rule, rung)),
                }
                for rule in check.predicted
            }
            for rung in check.measured
        },
    }


def _ends(graph: CircuitGraph, edge: int) -> Facts:
    source, target = int(graph.edges.source[edge]), int(graph.edges.target[edge])
    ids = graph.nodes.ids()
    return {
        "source": ids[source],
        "source_name": full_name(graph.nodes, source),
        "target": ids[target],
        "target_name": full_name(graph.nodes, target),
        "weight": float(graph.edges.weight[edge]),
    }


def _share(part: float, total: float) -> float:
    return float(part / total) if total else 0.0


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
