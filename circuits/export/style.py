"""What all pictures of a circuit share: colours that colour-blind readers and grey print tell apart, rows, names of heads."""

from __future__ import annotations

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.nodes import NodeKind, NodeTable

# kind -> (fill, outline, text)
NODE_COLOURS: dict[NodeKind, tuple[str, str, str]] = {
    NodeKind.TOKEN: ("#eef1f5", "#8a94a3", "#1f2933"),
    NodeKind.POSITION: ("#f7f8fa", "#b4bcc8", "#4b5563"),
    NodeKind.ERROR: ("#c9ced6", "#9aa3af", "#4b5563"),
    NodeKind.FEATURE: ("#ffffff", "#5b7083", "#1f2933"),
    NodeKind.LOGIT: ("#fdf1cf", "#b98900", "#3d2f00"),
}

LEAST_SHARE = 0.25
"""Smallest part of an edge that a head is named for."""
HEADS_PER_EDGE = 2

# weight > 0 -> colour: Okabe and Ito's blue and vermilion.
EDGE_COLOURS = {True: "#0072b2", False: "#d55e00"}


def emphasis(influence: np.ndarray) -> np.ndarray:
    """float64[E] in 0..1, strength of drawing: an edge's influence relative to the strongest edge, to the power 0.6."""
    top = influence.max(initial=0.0)
    return (influence / top) ** 0.6 if top > 0 else np.zeros(len(influence))


def picture_rows(nodes: NodeTable) -> np.ndarray:
    """int64[N], row of each node in a picture, upwards: inputs -1, then attention and MLP of each layer in turn.

    Logits have the row after the last layer's.
    """
    layer = nodes.layer.astype(np.int64)
    return np.where(layer < 0, -1, 2 * layer + (~nodes.of_attention & (nodes.kind != NodeKind.LOGIT)))


def row_title(row: int) -> str:
    """What the row of features is called at its left."""
    return "input" if row < 0 else f"layer {row // 2}" if row % 2 else f"attention {row // 2}"


def head_tags(graph: GraphData, influence: np.ndarray, *, most: int) -> dict[int, str]:
    """Edge number -> `L1H3` or `L1H3 L0H2`, the strongest first, for the most influential edges that heads carry.

    Args:
        influence: float64[E], influence of the edges.
        most: edges at most.
    """
    tags: dict[int, str] = {}
    if graph.heads is None:
        return tags
    for edge in np.argsort(-influence, kind="stable").tolist():
        heads = graph.heads.of(edge)
        least = LEAST_SHARE * graph.heads.magnitude(edge)
        named = [f"L{layer}H{head}" for layer, head, weight in heads[:HEADS_PER_EDGE] if abs(weight) >= least]
        if named and influence[edge] > 0:
            tags[edge] = " ".join(named)
        if len(tags) == most:
            break
    return tags
