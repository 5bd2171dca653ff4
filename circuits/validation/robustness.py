"""Robustness: how much of a circuit survives a change that should not matter.

Three changes are made: of the pruning thresholds, of the prompt's words, and of the crosscoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from circuits.attribution.trace import trace
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.inclusion import CLASSES, EDGES, NODES, NOISE, classes, inclusion
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.pruning import always_kept, prune
from circuits.validation.agreement import mean_of_known
from circuits.validation.feature_matching import LEAST, check_comparable, paired_nodes
from circuits.validation.survival import (
    Facts,
    explains_the_answer,
    prompt_survival,
    share,
    summed_places,
    survival,
    thresholds_of,
)
from replacement import Crosscoder, ReplacementModel
from replacement.crosscoder.joint import split
from replacement.language_model.prompts import Prompt

_SHARES = ("active", "kept", "influence_active", "influence_kept", "edges_kept", "edge_influence_kept")
_MEANS = ("equal_tokens", *_SHARES, "jaccard", "overlap")


def robustness(
    model: ReplacementModel,
    graph: CircuitGraph,
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    other_crosscoder: Crosscoder | None = None,
) -> Facts:
    """What `circuits validate` says about robustness, as plain JSON values.

    Args:
        model: the model the graph was traced in.
        graph: a full graph of the model's answer; its circuit is what it is pruned to at the usual thresholds.
        prompts: kind -> prompts that should have the same circuit.
        other_crosscoder: another crosscoder of the model's MLPs, such as one trained with another seed.

    Raises:
        ValueError: prompts or a crosscoder for a graph of other targets than the answer, a prompt that cannot be aligned with
            the graph's, or a crosscoder of another model or with other reads and writes.
    """
    if (prompts or other_crosscoder is not None) and not explains_the_answer(graph):
        raise ValueError(
            "expected a graph of the model's answer to compare with other prompts or another crosscoder, given one of other "
            "targets"
        )
    by_kind = [_kind_facts(model, graph, kind, texts) for kind, texts in (prompts or {}).items()]
    crosscoder = None if other_crosscoder is None else _crosscoder_facts(model, graph, other_crosscoder)
    return {"thresholds": threshold_facts(graph), "prompts": by_kind, "crosscoder": crosscoder}


def threshold_facts(graph: CircuitGraph) -> Facts:
    """How many nodes and edges are core, contingent and noise, with their shares of influence."""
    frequency, kept = inclusion(graph), prune(graph, **thresholds_of(graph))
    ranked = ~always_kept(graph.nodes)
    masses = {"nodes": node_influence(graph) * ranked, "edges": edge_influence(graph)}
    numbers = {"nodes": np.where(ranked, classes(frequency.nodes), -1), "edges": classes(frequency.edges)}
    rows = []
    for number, name in enumerate(CLASSES):
        row: Facts = {"class": name}
        for things, in_circuit in (("nodes", kept.nodes), ("edges", kept.edges)):
            mask, mass = numbers[things] == number, masses[things]
            row |= {things: int(mask.sum()), f"circuit_{things}": int((mask & in_circuit).sum())}
            row[f"{things}_influence"] = float(mass[mask].sum() / mass.sum()) if mass.any() else float("nan")
        rows.append(row)
    return {"nodes": list(NODES), "edges": list(EDGES), "noise": NOISE, "classes": rows}


def _kind_facts(model: ReplacementModel, graph: CircuitGraph, kind: str, prompts: Sequence[str]) -> Facts:
    answer, every = _answer(graph), []
    for prompt in prompts:
        other = _traced_alike(model, graph, prompt)
        try:
            facts = prompt_survival(graph, other)
        except ValueError as error:
            raise ValueError(f"{kind}: {prompt!r:.80}: {error}") from error
        other_answer = _answer(other)
        same = bool(graph.nodes.index[answer] == other.nodes.index[other_answer])
        every.append({"prompt": prompt, "answer": other.nodes.label[other_answer], "same_answer": same, **facts})
    return {
        "kind": kind,
        "prompts": len(every),
        "same_answers": sum(facts["same_answer"] for facts in every),
        **{name: mean_of_known(np.array([facts[name] for facts in every])) for name in _MEANS},
        "places": summed_places(row for facts in every for row in facts["places"]),
        "every": [{name: fact for name, fact in facts.items() if name != "places"} for facts in every],
    }


def _crosscoder_facts(model: ReplacementModel, graph: CircuitGraph, crosscoder: Crosscoder) -> Facts:
    mlps, *_ = split(crosscoder)  # of a joint one, too, only the MLPs are exchanged
    other_model = ReplacementModel(model.language_model, mlps, attention_crosscoder=model.attention_crosscoder)
    check_comparable(model.crosscoder, other_model.crosscoder)
    other = _traced_alike(other_model, graph, graph.metadata["token_ids"])
    circuit = prune(graph, **thresholds_of(graph)).nodes
    pairing = paired_nodes(graph, other, model.crosscoder, other_model.crosscoder, circuit)
    compared, influence = ~np.isnan(pairing.likeness_N), node_influence(graph)
    return {
        "least_likeness": LEAST,
        "likeness": mean_of_known(pairing.likeness_N),
        "matched": share(pairing.matched_N, compared),
        "influence_matched": share(pairing.matched_N, compared, influence),
        **survival(graph, other, pairing.row_N, ["all"] * len(graph.metadata["tokens"])),
    }


def _traced_alike(model: ReplacementModel, graph: CircuitGraph, prompt: Prompt) -> CircuitGraph:
    """The graph of another prompt or crosscoder, with the settings of this one and without labels."""
    facts: Mapping[str, Any] = graph.metadata
    return trace(
        model,
        prompt,
        coverage=facts.get("coverage", 0.99),
        drop_below=facts.get("dropped_below", 0.0),
        conventions=facts.get("conventions", "exact"),
        index=(),
    )


def _answer(graph: CircuitGraph) -> int:
    """Row of the most likely output."""
    return int(np.argmax(graph.nodes.output_weight))
