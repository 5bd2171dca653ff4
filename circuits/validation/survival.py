"""How much of a circuit is found again in the circuit of another graph: of another prompt, or of another crosscoder.

Both graphs are full ones, pruned at the same thresholds. A pairing says which node of the other graph is the same as each node
(`circuits.graph.alignment` for prompts, `circuits.validation.feature_matching` for crosscoders). A feature of the circuit is

    active     if the other graph has the same feature at the same place: it fires there and matters at all
    kept       if the other circuit has it

and an edge is kept if the other circuit has it between the same two nodes. The answer, the output of the largest weight, is the
same node as the other graph's answer, whatever token it is. Influence is that of the full graphs. Targets are no features here.

    overlap = sum of min(I, I') / sum of max(I, I')     over the features of both circuits, I = 0 where a circuit lacks one
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from circuits.graph.alignment import aligned_positions, prompt_tokens, same_nodes
from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.pruning import Kept, prune

PLACES = ("before", "at", "after")
"""Where a position is: before every token that differs, at one that differs, or at an equal one behind it."""
THRESHOLDS = {"nodes": 0.8, "edges": 0.98}
Facts = dict[str, Any]


def thresholds_of(graph: GraphData) -> dict[str, float]:
    """The thresholds that a graph was pruned at, or else the usual ones."""
    pruning: Mapping[str, Any] = graph.metadata.get("pruning", THRESHOLDS)
    return {name: pruning[name] for name in THRESHOLDS}


def explains_the_answer(graph: GraphData) -> bool:
    """Whether a graph is of the most likely tokens at the end of its prompt, as by default."""
    nodes, facts = graph.nodes, graph.metadata
    outputs = nodes.mask(NodeKind.LOGIT)
    at_end = outputs.any() and (nodes.position[outputs] == len(facts["tokens"]) - 1).all()
    likely = [fact.get("token") for fact in facts.get("top_tokens", [])[:1]]
    return bool(at_end and likely == [fact.get("token") for fact in facts.get("targets", [])[:1]])


def survival(graph: GraphData, other: GraphData, pairing: np.ndarray, place_T: Sequence[str]) -> Facts:
    """Shares of a circuit that are found again.

    Args:
        pairing: int[N], the row in `other` of the node that is the same; -1 where there is none.
        place_T: a word for each position of the prompt, by which features are counted.

    Returns:
        `features` and `edges` of the circuit; shares of the features `active` and `kept`, and of their influence
        (`influence_active`, `influence_kept`); of the edges `edges_kept` and, by influence, `edge_influence_kept`; `jaccard` of
        the features and its weighted form, `overlap`; `places`: per word and layer, numbers of `features`, `active` and `kept`,
        and sums of `influence`, `influence_active` and `influence_kept`. NaN where there is nothing to divide by.
    """
    kept, other_kept = (prune(side, **thresholds_of(graph)) for side in (graph, other))
    pairing = _with_answer(graph.nodes, other.nodes, pairing)
    influence, other_influence = node_influence(graph), node_influence(other)
    features, other_features = _features(graph, kept), _features(other, other_kept)
    active = features & (pairing >= 0)
    again = active & other_kept.nodes[pairing]
    common = np.minimum(influence[again], other_influence[pairing[again]]).sum()
    union = influence[features].sum() + other_influence[other_features].sum() - common
    n_union = features.sum() + other_features.sum() - again.sum()
    edge_again, crossing = _edges_again(graph, other, kept, other_kept, pairing)
    return {
        "features": int(features.sum()),
        "active": share(active, features),
        "kept": share(again, features),
        "influence_active": share(active, features, influence),
        "influence_kept": share(again, features, influence),
        "edges": int(kept.edges.sum()),
        "edges_kept": share(edge_again, np.ones_like(edge_again)),
        "edge_influence_kept": share(edge_again, np.ones_like(edge_again), crossing),
        "jaccard": float(again.sum() / n_union) if n_union else float("nan"),
        "overlap": float(common / union) if union else float("nan"),
        "places": _by_place(graph.nodes, place_T, influence, features, active, again),
    }


def prompt_survival(graph: GraphData, other: GraphData) -> Facts:
    """`survival` of a circuit in that of another prompt of the same model, by the place of the words that differ.

    Words are compared where `circuits.graph.alignment` puts them: a word at another distance from both ends counts as another
    word. `equal_tokens` is the share of positions with an equal token at the aligned position.

    Raises:
        ValueError: prompts that cannot be aligned, see `Alignment.of`.
    """
    tokens, other_tokens = prompt_tokens(graph.metadata), prompt_tokens(other.metadata)
    pairing = np.full(len(graph.nodes), -1)
    rows, other_rows = same_nodes(graph, other)
    pairing[rows] = other_rows
    place_T = places(tokens, other_tokens)
    return {"equal_tokens": 1 - place_T.count("at") / len(place_T), **survival(graph, other, pairing, place_T)}


def places(tokens: Sequence[Any], other: Sequence[Any]) -> list[str]:
    """One of `PLACES` for each position of a prompt, compared with another one."""
    aligned = aligned_positions(tokens, other).tolist()
    differs = [place < 0 or other[place] != token for token, place in zip(tokens, aligned, strict=True)]
    first = differs.index(True) if any(differs) else len(tokens)
    return ["at" if differ else "before" if place < first else "after" for place, differ in enumerate(differs)]


def summed_places(rows: Iterable[Facts]) -> list[Facts]:
    """The rows `places` of several comparisons, added up by place and layer."""
    sums: dict[tuple[str, int], Facts] = {}
    for row in rows:
        total = sums.setdefault((row["place"], row["layer"]), {})
        for name, value in row.items():
            total[name] = value if name in ("place", "layer") else total.get(name, 0) + value
    order = {place: number for number, place in enumerate(PLACES)}
    return sorted(sums.values(), key=lambda row: (order.get(row["place"], len(order)), row["layer"]))


def _features(graph: GraphData, kept: Kept) -> np.ndarray:
    return kept.nodes & graph.nodes.mask(NodeKind.FEATURE) & ~graph.nodes.is_target


def share(part: np.ndarray, whole: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Share of a mask that another one holds, by number or by weight; NaN where there is nothing to divide by."""
    weight = np.ones(len(whole)) if weight is None else weight
    total = weight[whole].sum()
    return float(weight[part].sum() / total) if total else float("nan")


def _with_answer(nodes: NodeTable, other: NodeTable, pairing: np.ndarray) -> np.ndarray:
    """The pairing in which the answers are paired with each other and with nothing else."""
    answer, other_answer = (int(np.argmax(table.output_weight)) for table in (nodes, other))
    pairing = np.where(pairing == other_answer, -1, pairing)
    pairing[answer] = other_answer
    return pairing


def _edges_again(
    graph: GraphData, other: GraphData, kept: Kept, other_kept: Kept, pairing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For every edge of the circuit, whether the other circuit has it, and the influence that crosses it."""
    edges, theirs = graph.edges.where(kept.edges), other.edges.where(other_kept.edges)
    target, source = pairing[edges.target], pairing[edges.source]
    keys = target * len(other.nodes) + source
    known = theirs.target.astype(np.int64) * len(other.nodes) + theirs.source
    return (target >= 0) & (source >= 0) & np.isin(keys, known), edge_influence(graph)[kept.edges]


def _by_place(
    nodes: NodeTable,
    place_T: Sequence[str],
    influence: np.ndarray,
    features: np.ndarray,
    active: np.ndarray,
    again: np.ndarray,
) -> list[Facts]:
    words = np.array(place_T)[nodes.position]
    pairs = sorted(set(zip(words[features].tolist(), nodes.layer[features].tolist(), strict=True)))
    rows = []
    for word, layer in pairs:
        here = (words == word) & (nodes.layer == layer)
        masks = {"": features & here, "active": active & here, "kept": again & here}
        counts = {name or "features": int(mask.sum()) for name, mask in masks.items()}
        sums = {f"influence_{name}".rstrip("_"): float(influence[mask].sum()) for name, mask in masks.items()}
        rows.append({"place": word, "layer": layer, **counts, **sums})
    return summed_places(rows)
