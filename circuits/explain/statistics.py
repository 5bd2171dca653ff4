"""Statistics of a graph as one row of numbers, the same columns for every graph of a model: input of a classifier or a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.influence import edge_influence, node_influence, row_scales
from circuits.graph.nodes import NodeKind
from circuits.graph.paths import average_path_length
from circuits.graph.scores import mass_balance, scores
from replacement.token_texts import visible

TEXTS = ("id", "prompt", "answer")
"""Columns of text: name of the graph, its prompt, and the likeliest next token."""
COLUMNS: dict[str, tuple[str, str]] = {
    "tokens": ("count", "tokens of the prompt"),
    "outputs": ("count", "targets that are tokens"),
    "answer_probability": ("probability", "of the likeliest next token"),
    "answer_margin": ("probability", "of the likeliest next token minus that of the second"),
    "answer_value": (
        "logit",
        "value of the target that owns most of the output (logits are centred over the vocabulary)",
    ),
    "nodes": ("count", "all nodes"),
    "features": ("count", "features"),
    "expanded": ("count", "features whose causes were computed"),
    "errors": ("count", "error nodes"),
    "edges": ("count", "edges"),
    "fan_in": ("edges", "mean number of edges into a node that has any"),
    "fan_in_largest": ("edges", "largest number of edges into a node"),
    "fan_in_effective": (
        "edges",
        "exp of the entropy of a node's inputs by |weight|, mean over nodes weighted with influence",
    ),
    "fan_out": ("edges", "mean number of edges out of a node that has any"),
    "depth": ("edges", "longest path"),
    "path_length": ("edges", "mean path from the output back to where it ends, weighted with influence"),
    "replacement": ("share", "replacement score"),
    "completeness": ("share", "completeness score"),
    "input_share": ("share", "of the output that ends in tokens and learned positions"),
    "error_share": ("share", "of the output that ends in errors"),
    "unexpanded_share": ("share", "of the output that ends in features whose causes were not computed"),
    "lost_share": ("share", "of the output that ends in removed edges or in nodes that only biases cause"),
    "direct_share": ("share", "of the output that ends in inputs after a single edge"),
    "negative_share": ("share", "of the influence of all edges, what passes through those of negative weight"),
    "influence_entropy": ("nats", "entropy of the features' influence"),
    "influence_largest": ("share", "influence of the most influential feature"),
    "features_80": ("count", "fewest features that hold 80 % of the features' influence"),
    "activation_mean": ("activation", "mean over the features"),
    "activation_largest": ("activation", "largest of the features"),
    "token_first_share": ("share", "of what ends in inputs, that at the first position"),
    "token_last_share": ("share", "of what ends in inputs, that at the last position"),
    "token_largest_share": ("share", "of what ends in inputs, that at the position that has most"),
    "token_entropy": ("nats", "entropy of what ends in inputs over positions"),
}
"""Columns of numbers: unit, and what it is; one that a graph does not tell is NaN."""
LAYER_COLUMNS: dict[str, tuple[str, str]] = {
    "features_layer": ("count", "features of this layer"),
    "influence_layer": ("share", "sum of the influence of this layer's features"),
    "error_layer": ("share", "of the output that ends in errors of this layer"),
}
"""For every layer one, numbered from 0: `features_layer_0`."""


def columns(n_layers: int) -> dict[str, tuple[str, str]]:
    """All columns of numbers of a model with so many layers."""
    of_layers = {
        f"{name}_{layer}": (unit, text.replace("this layer", f"layer {layer}"))
        for name, (unit, text) in LAYER_COLUMNS.items()
        for layer in range(n_layers)
    }
    return COLUMNS | of_layers


def graph_statistics(graph: GraphData, *, name: str = "") -> dict[str, str | int | float]:
    """One row: the columns of `TEXTS` and `columns(n_layers)`."""
    likely = sorted(_chances(graph.metadata), key=lambda chance: -chance[1])
    row = {
        "id": name,
        "prompt": str(graph.metadata["prompt"]),
        "answer": likely[0][0] if likely else "",
        "tokens": len(graph.metadata["tokens"]),
        "answer_probability": likely[0][1] if likely else math.nan,
        "answer_margin": likely[0][1] - likely[1][1] if len(likely) > 1 else math.nan,
    }
    influence = node_influence(graph)
    parts = (
        _sizes(graph),
        _shape(graph, influence),
        _shares(graph),
        _features(graph, influence),
        _inputs(graph, influence),
    )
    found: dict[str, Any] = row | {name: value for part in parts for name, value in part.items()}
    return {name: found[name] for name in (*TEXTS, *columns(graph.metadata["n_layers"]))}


def _chances(facts: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Likely next tokens, or where a graph does not have them, its targets, with probabilities."""
    tokens = facts.get("top_tokens") or facts.get("targets") or ()
    return [
        (visible(token.get("token") or ""), float(token["probability"])) for token in tokens if token.get("probability")
    ]


def _sizes(graph: GraphData) -> dict[str, int | float]:
    nodes = graph.nodes
    features = nodes.mask(NodeKind.FEATURE)
    return {
        "nodes": len(nodes),
        "outputs": int(nodes.mask(NodeKind.LOGIT).sum()),
        "answer_value": float(nodes.value[nodes.output_weight.argmax()]),
        "features": int(features.sum()),
        "expanded": int((features & nodes.expanded).sum()),
        "errors": int(nodes.mask(NodeKind.ERROR).sum()),
        "edges": len(graph.edges),
    }


def _shape(graph: GraphData, influence: np.ndarray) -> dict[str, int | float]:
    edges = graph.edges
    into, out = np.diff(edges.indptr), np.zeros(edges.n_nodes, dtype=np.int64)
    for block in edges.row_blocks():
        np.add.at(out, block.source, 1)
    inverse_sum = np.zeros(edges.n_nodes)
    has_inputs = edges.magnitudes > 0
    inverse_sum[has_inputs] = 1 / edges.magnitudes[has_inputs]
    entropy = edges.row_sums(lambda block: _surprise(np.abs(block.weight) * block.per_edge(inverse_sum)))
    through = (influence + graph.nodes.output_weight) * has_inputs
    return {
        "fan_in": float(into[into > 0].mean()) if into.any() else 0.0,
        "fan_in_largest": int(into.max()),
        "fan_in_effective": float((through * np.exp(entropy)).sum() / through.sum()) if through.any() else 0.0,
        "fan_out": float(out[out > 0].mean()) if out.any() else 0.0,
        "depth": len(edges.levels) - 1,
        "path_length": average_path_length(graph),
    }


def _shares(graph: GraphData) -> dict[str, int | float]:
    nodes, crossing = graph.nodes, edge_influence(graph)
    score, balance = scores(graph), mass_balance(graph)
    inputs, total = nodes.mask(NodeKind.TOKEN, NodeKind.POSITION), crossing.sum()
    direct = inputs[graph.edges.source] & nodes.is_target[graph.edges.target]
    rate = nodes.output_weight * row_scales(graph)
    single = np.abs(graph.edges.weight[direct]) * rate[graph.edges.target[direct]]
    return {
        "replacement": score.replacement,
        "completeness": score.completeness,
        "input_share": balance.inputs,
        "error_share": balance.errors,
        "unexpanded_share": balance.unexpanded,
        "lost_share": balance.lost,
        "direct_share": float(single.sum()),
        "negative_share": float(crossing[graph.edges.weight < 0].sum() / total) if total else 0.0,
    }


def _features(graph: GraphData, influence: np.ndarray) -> dict[str, int | float]:
    nodes, n_layers = graph.nodes, graph.metadata["n_layers"]
    features, errors = nodes.mask(NodeKind.FEATURE), nodes.mask(NodeKind.ERROR)
    ranked = np.sort(influence[features])[::-1]
    activation = nodes.activation[features]
    held = np.cumsum(ranked)
    by_layer = {
        "features_layer": np.bincount(nodes.layer[features], minlength=n_layers),
        "influence_layer": np.bincount(nodes.layer[features], influence[features], minlength=n_layers),
        "error_layer": np.bincount(nodes.layer[errors], influence[errors], minlength=n_layers),
    }
    return {
        "influence_entropy": _entropy(ranked),
        "influence_largest": float(ranked[0]) if len(ranked) else 0.0,
        "features_80": int(np.searchsorted(held, 0.8 * held[-1])) + 1 if len(ranked) and held[-1] else 0,
        "activation_mean": float(activation.mean()) if len(activation) else 0.0,
        "activation_largest": float(activation.max()) if len(activation) else 0.0,
        **{f"{name}_{layer}": counts[layer].item() for name, counts in by_layer.items() for layer in range(n_layers)},
    }


def _inputs(graph: GraphData, influence: np.ndarray) -> dict[str, int | float]:
    inputs = graph.nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)
    of_position = np.bincount(graph.nodes.position[inputs], influence[inputs], minlength=len(graph.metadata["tokens"]))
    total = of_position.sum()
    shares = of_position / total if total else of_position
    return {
        "token_first_share": float(shares[0]),
        "token_last_share": float(shares[-1]),
        "token_largest_share": float(shares.max()),
        "token_entropy": _entropy(of_position),
    }


def _entropy(amounts: np.ndarray) -> float:
    """Of amounts as shares of their sum, in nats; 0 for none."""
    total = amounts.sum()
    return float(_surprise(amounts / total).sum()) if total else 0.0


def _surprise(shares: np.ndarray) -> np.ndarray:
    """`-p log p`, 0 where p is 0."""
    return -shares * np.log(np.where(shares > 0, shares, 1.0))
