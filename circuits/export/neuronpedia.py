"""The graph JSON of Neuronpedia and the circuit-tracer front ends (schema version 1).

The schema knows features, errors, embeddings and logits. Two things of ours have no place in it: a learned position
embedding is merged into the embedding node of its position (weights are summed; both enter the residual stream
there), and a target that is a feature stays a feature node, marked as target.

The schema allows further keys. Ours are, on nodes, `output_weight` of targets, `inflow` of expanded nodes and `label` where
`clerp` holds a score too, and on links `direct` and `heads` ([layer, head, weight], the strongest first; what they leave of the
weight is the rest). With them `CircuitGraph.load` gives back the graph. `qk_tracing_results` of nodes are those of
`CircuitGraph.with_qk_results`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from circuits.graph.edge_heads import EdgeRow, ranges
from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.feature_labels import HINT, label_note
from circuits.graph.groups import stored_feature_groups
from circuits.graph.influence import node_influence
from circuits.graph.neuronpedia_schema import EMBEDDING, ERROR, FEATURE, LOGIT, QK_RESULTS, VERSION, cantor_pair
from circuits.graph.nodes import NodeKind
from circuits.graph.text import printable, slug
from replacement.token_texts import visible

_LINKS_AT_ONCE = 4096


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
    metadata, imported = graph.metadata, graph.metadata.get("imported", {})
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
            "info": {"generator": {"name": "crosstrace"}},
            **imported.get("metadata", {}),
            "schema_version": VERSION,
            **({"unknown": imported["unknown"]} if imported else {}),
            **thresholds,
        },
        "qParams": _view(
            {**_supernodes(graph, ids), **imported.get("qParams", {})}, {ids[row] for row in shown.tolist()}
        ),
        "nodes": [_node(graph, row, ids[row], float(cumulative[row])) for row in shown.tolist()],
        "links": _links(graph, host, ids),
        **imported.get("other_keys", {}),
    }


def _supernodes(graph: GraphData, ids: Sequence[str]) -> dict[str, Any]:
    """The groups of several features that a graph carries, pinned: only pinned nodes are shown in groups there."""
    groups = [(group.name, [ids[node] for node in group.members]) for group in stored_feature_groups(graph)]
    return {
        "supernodes": [[name, *members] for name, members in groups],
        "pinnedIds": [name for _, members in groups for name in members],
    }


def _view(imported: Mapping[str, Any], shown: set[str]) -> dict[str, Any]:
    """The state of the viewer: that of the file which the graph was read from, without the nodes that are gone."""
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "", **imported}
    view["pinnedIds"] = [name for name in view["pinnedIds"] if name in shown]
    members = [[label, *(name for name in names if name in shown)] for label, *names in view["supernodes"]]
    view["supernodes"] = [group for group in members if len(group) > 1]
    view["clickedId"] = view["clickedId"] if view["clickedId"] in shown else ""
    return view


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
        "clerp": visible(str(graph.metadata["tokens"][position])) if kind < NodeKind.ERROR else label,
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
        if not label.startswith(HINT) and (note := label_note(graph, row)):
            fields |= {"label": label, "clerp": f"{fields['clerp']} ({note})"}
    elif kind is NodeKind.ERROR:
        fields |= {"feature": -1, "layer": str(layer), "feature_type": ERROR, "jsNodeId": f"{layer}_{position}-0"}
        fields["clerp"] = label or f"Err: {'attention' if nodes.of_attention[row] else 'mlp'} layer {layer}"
    elif kind is NodeKind.LOGIT:
        probability = float(nodes.probability[row])
        shown = name.split("_")
        fields |= {"feature": index, "layer": shown[0], "feature_type": LOGIT, "jsNodeId": f"L_{shown[1]}-{position}"}
        fields |= {"token_prob": probability, "is_target_logit": bool(nodes.is_target[row])}
        fields["clerp"] = f'Output "{label}" (p={probability:.3f})'
    if nodes.is_target[row]:
        fields["output_weight"] = float(nodes.output_weight[row])
    if nodes.expanded[row]:
        fields["inflow"] = float(nodes.inflow[row])
    if name in graph.metadata.get(QK_RESULTS, {}):
        fields[QK_RESULTS] = graph.metadata[QK_RESULTS][name]
    return fields


def _links(graph: GraphData, host: np.ndarray, ids: list[str]) -> Iterator[dict[str, Any]]:
    edges, heads = graph.edges, graph.heads
    source, target = host[edges.source], host[edges.target]
    # Links that positions and tokens share are added up, in the order in which they are first met.
    _, first, place = np.unique(source * len(ids) + target, return_index=True, return_inverse=True)
    weight = np.bincount(place, weights=edges.weight, minlength=len(first))
    by_link, ends = np.argsort(place, kind="stable"), np.cumsum(np.bincount(place, minlength=len(first)))
    order = np.argsort(first)
    for begin in range(0, len(order), _LINKS_AT_ONCE):
        chosen = order[begin : begin + _LINKS_AT_ONCE]
        columns = (source[first[chosen]].tolist(), target[first[chosen]].tolist(), weight[chosen].tolist())
        links = ({"source": ids[a], "target": ids[b], "weight": value} for a, b, value in zip(*columns, strict=True))
        if heads is None:
            yield from links
            continue
        starts, stops = ends[chosen - 1] * (chosen > 0), ends[chosen]
        rows = iter(heads.rows(by_link[ranges(starts, stops)]))
        for link, count in zip(links, (stops - starts).tolist(), strict=True):
            yield link | _link_heads(list(itertools.islice(rows, count)))


def _link_heads(rows: list[EdgeRow]) -> dict[str, Any]:
    """What carries some edges, merged into a link: the direct part, and the heads that are listed, the strongest first."""
    heads = rows[0].heads
    if len(rows) > 1:
        weights: dict[tuple[int, int], float] = defaultdict(float)
        for layer, head, weight in itertools.chain.from_iterable(row.heads for row in rows):
            weights[layer, head] += weight
        merged = sorted(weights.items(), key=lambda item: -abs(item[1]))
        heads = [(layer, head, weight) for (layer, head), weight in merged]
    return {"direct": sum(row.direct for row in rows), "heads": [list(head) for head in heads]}
