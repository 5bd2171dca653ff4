"""The graph JSON of Neuronpedia and the circuit-tracer front ends (schema version 1).

The schema knows features, errors, embeddings and logits. Two things of ours have no place in it: a learned position
embedding is merged into the embedding node of its position (weights are summed; both enter the residual stream
there), and a target that is a feature stays a feature node, marked as target.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind
from circuits.graph.text import printable, slug

_LINKS_AT_ONCE = 4096
FEATURE, ERROR, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


def cantor_pair(layer: int, index: int) -> int:
    """The one whole number that stands for (layer, index): `(l + i)(l + i + 1) / 2 + i`."""
    return (layer + index) * (layer + index + 1) // 2 + index


def cumulative_influence(influence: np.ndarray) -> np.ndarray:
    """float64[N], share of all influence held by a node and every node above it: smaller is more important."""
    total = influence.sum()
    order = np.argsort(-influence, kind="stable")
    result = np.ones(len(influence))
    if total > 0:
        result[order] = np.minimum(np.cumsum(influence[order]) / total, 1.0)
    return result


@register("neuronpedia", suffix=".neuronpedia.json", description="graph JSON of Neuronpedia and circuit-tracer")
def to_neuronpedia(graph: GraphData) -> dict[str, Any]:
    """The graph as the JSON object that a Neuronpedia upload expects, its links as an iterator."""
    host, ids = _hosts(graph)
    merged = np.bincount(host, weights=node_influence(graph), minlength=len(host))
    shown = np.flatnonzero(host == np.arange(len(host)))
    cumulative = np.ones(len(host))
    cumulative[shown] = cumulative_influence(merged[shown])
    metadata = graph.metadata
    thresholds: dict[str, Any] = {}
    if pruning := metadata.get("pruning"):
        settings = {"node_threshold": pruning["nodes"], "edge_threshold": pruning["edges"]}
        thresholds = {"node_threshold": pruning["nodes"], "pruning_settings": settings}
    return {
        "metadata": {
            "slug": slug(metadata["prompt"]),
            "scan": str(metadata.get("model") or "unknown"),
            "prompt_tokens": [printable(token) for token in metadata["tokens"]],
            "prompt": metadata["prompt"],
            "schema_version": 1,
            "info": {"generator": {"name": "crosstrace"}},
            **thresholds,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, row, ids[row], float(cumulative[row])) for row in shown.tolist()],
        "links": _links(graph, host, ids),
    }


def _hosts(graph: GraphData) -> tuple[np.ndarray, list[str]]:
    """int[N], the node each node is written as, and the ids. Only positions are written as another node: their token.

    A position whose token was removed stands in for it, with an embedding id of its own.
    """
    nodes = graph.nodes
    host, ids = np.arange(len(nodes)), list(nodes.ids())
    token_at = {int(nodes.position[row]): row for row in np.flatnonzero(nodes.mask(NodeKind.TOKEN)).tolist()}
    token_ids = graph.metadata.get("token_ids", [])
    for row in np.flatnonzero(nodes.mask(NodeKind.POSITION)).tolist():
        position = int(nodes.position[row])
        host[row] = token_at.get(position, row)
        token = token_ids[position] if position < len(token_ids) else -1
        ids[row] = f"E_{token}_{position}"
    return host, ids


def _node(graph: GraphData, row: int, name: str, influence: float) -> dict[str, Any]:
    nodes = graph.nodes
    kind, layer, index = NodeKind(int(nodes.kind[row])), int(nodes.layer[row]), int(nodes.index[row])
    position, label = int(nodes.position[row]), printable(nodes.label[row])
    fields: dict[str, Any] = {
        "node_id": name,
        "feature": position,
        "layer": "E",
        "ctx_idx": position,
        "feature_type": EMBEDDING,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{name.rpartition('_')[0]}-{position}",
        "clerp": printable(str(graph.metadata["tokens"][position])) if kind < NodeKind.ERROR else label,
        # Front ends hide nodes above a threshold; targets are roots, not ranked, and always shown.
        "influence": None if nodes.is_target[row] else influence,
        "activation": None,
    }
    if kind is NodeKind.FEATURE:
        fields |= {"feature": cantor_pair(layer, index), "layer": str(layer), "feature_type": FEATURE}
        fields |= {"activation": float(nodes.activation[row]), "jsNodeId": f"{layer}_{index}-0"}
        fields["is_target_logit"] = bool(nodes.is_target[row])
        if nodes.of_attention[row]:  # the schema has one kind of feature: an id and a word keep these apart
            fields |= {"jsNodeId": f"A{layer}_{index}-0", "clerp": f"attention: {label}"}
    elif kind is NodeKind.ERROR:
        fields |= {"feature": -1, "layer": str(layer), "feature_type": ERROR, "jsNodeId": f"{layer}_{position}-0"}
        fields["clerp"] = label or f"Err: {'attention' if nodes.of_attention[row] else 'mlp'} layer {layer}"
    elif kind is NodeKind.LOGIT:
        probability = float(nodes.probability[row])
        shown = name.split("_")
        fields |= {"feature": index, "layer": shown[0], "feature_type": LOGIT, "jsNodeId": f"L_{shown[1]}-{position}"}
        fields |= {"token_prob": probability, "is_target_logit": bool(nodes.is_target[row])}
        fields["clerp"] = f'Output "{label}" (p={probability:.3f})'
    return fields


def _links(graph: GraphData, host: np.ndarray, ids: list[str]) -> Iterator[dict[str, Any]]:
    edges = graph.edges
    source, target = host[edges.source], host[edges.target]
    # Links that positions and tokens share are added up, in the order in which they are first met.
    _, first, place = np.unique(source * len(ids) + target, return_index=True, return_inverse=True)
    weight = np.bincount(place, weights=edges.weight, minlength=len(first))
    order = np.argsort(first)
    for begin in range(0, len(order), _LINKS_AT_ONCE):
        chosen = order[begin : begin + _LINKS_AT_ONCE]
        columns = (source[first[chosen]].tolist(), target[first[chosen]].tolist(), weight[chosen].tolist())
        for start, end, value in zip(*columns, strict=True):
            yield {"source": ids[start], "target": ids[end], "weight": value}
