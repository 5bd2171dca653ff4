"""A graph as the page's payload: JSON whose numeric columns are base64 of little-endian typed arrays.

`assets/data.js` decodes it; `README.md` lists its fields.
"""

from __future__ import annotations

import base64
from dataclasses import asdict
from typing import Any

import numpy as np

from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import FEATURE_LABELS
from circuits.graph.groups import GROUPS, Grouping
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.outputs import group_name, output_groups
from circuits.graph.rows import node_rows
from circuits.graph.scores import scores
from circuits.graph.text import printable, short_name
from replacement.token_texts import visible

VERSION = 1
"""Of the payload and of saved states."""
HEADS = (3, 8)
"""Heads of an edge that the page holds at least and at most, the strongest; weaker ones are added to `rest`."""
MOST_HEADS = 60_000
"""Heads of all edges, above which an edge has fewer: a page must stay small enough to open."""
_WHOLE = ("u1", "i1", "u2", "i2", "i4")
_ALONE = (FEATURE_LABELS, GROUPS, "prompt", "tokens", "token_ids")
"""Metadata that is elsewhere in the payload or in the evidence."""


def payload(graph: GraphData) -> dict[str, Any]:
    """The graph as a JSON object, without the evidence of its features."""
    facts = graph.metadata
    return {
        "version": VERSION,
        "prompt": facts["prompt"],
        "tokens": [visible(token) for token in facts["tokens"]],
        "nLayers": facts["n_layers"],
        "scores": asdict(scores(graph)),
        "metadata": {name: fact for name, fact in facts.items() if name not in _ALONE},
        "groups": _groups(graph),
        "nodes": _nodes(graph),
        "edges": {
            "rowStart": column(graph.edges.indptr),
            "source": column(graph.edges.source),
            "weight": column(graph.edges.weight),
        },
        "heads": None if graph.heads is None else _heads(graph.heads),
    }


def column(values: np.ndarray) -> list[str]:
    """`[type, base64]`: floats as they are, whole numbers in the smallest type that holds all of them.

    Whole numbers beyond 32 bits become float64, which is exact up to 2^53.
    """
    if values.dtype.kind == "f":
        kind = f"f{values.dtype.itemsize}"
    else:
        low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        kind = next((name for name in _WHOLE if np.iinfo(name).min <= low and high <= np.iinfo(name).max), "f8")
    return [kind, base64.b64encode(values.astype(f"<{kind}").tobytes()).decode("ascii")]


def _nodes(graph: GraphData) -> dict[str, Any]:
    nodes, influence = graph.nodes, node_influence(graph)
    rows = node_rows(graph, np.arange(len(nodes)), influence)
    exact = {"outputWeight": nodes.output_weight, "inflow": nodes.inflow, "influence": influence}
    rounded = {
        "value": nodes.value,
        "bias": nodes.bias,
        "activation": nodes.activation,
        "probability": nodes.probability,
    }
    whole = {name: getattr(nodes, name) for name in ("kind", "part", "layer", "position", "index", "expanded")}
    return {
        "count": len(nodes),
        "id": [row.id for row in rows],
        "name": [row.name for row in rows],
        "label": [_label(nodes, row) for row in range(len(nodes))],
        **{name: column(values) for name, values in whole.items()},
        **{name: column(values.astype(np.float32)) for name, values in rounded.items()},
        **{name: column(values) for name, values in exact.items()},
    }


def _groups(graph: GraphData) -> list[dict[str, Any]]:
    """The groups that a graph carries, by numbers of nodes; of one that carries none, the outputs that read as one answer."""
    if GROUPS in graph.metadata:
        return [
            {"name": printable(group.name), "kind": group.kind, "members": list(group.members)}
            for group in Grouping.of(graph).groups
        ]
    return [
        {"name": group_name(graph.nodes, members), "kind": "outputs", "members": list(members)}
        for members in output_groups(graph.nodes)
    ]


def _label(nodes: NodeTable, row: int) -> str:
    """What people read on a node; empty for a feature without a label."""
    return printable(nodes.label[row]).strip() if nodes.kind[row] == NodeKind.FEATURE else short_name(nodes, row)


def _heads(heads: EdgeHeads) -> dict[str, Any]:
    """The strongest heads of every edge; parts are 16-bit fractions of the edge's largest part, an error of at most 0.002 %."""
    rank = np.arange(len(heads.weight)) - heads.indptr[heads.edge]
    kept = rank < np.clip(MOST_HEADS // max(len(heads), 1), *HEADS)
    rest = heads.rest + np.bincount(heads.edge[~kept], heads.weight[~kept], minlength=len(heads))
    edge, weight = heads.edge[kept], heads.weight[kept]
    scale = np.maximum(np.abs(heads.direct), np.abs(rest))
    np.maximum.at(scale, edge, np.abs(weight))
    per_step = np.divide(32767.0, scale, out=np.zeros_like(scale), where=scale > 0)
    parts = {"direct": heads.direct * per_step, "rest": rest * per_step, "weight": weight * per_step[edge]}
    return {
        "rowStart": column(np.concatenate([[0], np.cumsum(np.bincount(edge, minlength=len(heads)))])),
        "layer": column(heads.layer[kept]),
        "head": column(heads.head[kept]),
        "scale": column(scale.astype(np.float32)),
        **{name: column(np.rint(values).astype(np.int16)) for name, values in parts.items()},
    }
