"""Names of heads written on the edges they carry."""

from __future__ import annotations

import numpy as np

from circuits.graph.edges import GraphData

LEAST = 0.25
"""Smallest part of an edge that a head is named for."""
HEADS_PER_EDGE = 2


def head_tags(graph: GraphData, influence: np.ndarray, *, most: int) -> dict[int, str]:
    """Edge number -> `L1H3` or `L1H3 L0H2`, the strongest first, for the most influential edges that heads carry.

    Args:
        influence: float64[E], influence of the edges.
        most: edges at most.
    """
    found: dict[int, str] = {}
    if graph.heads is None:
        return found
    for edge in np.argsort(-influence, kind="stable").tolist():
        heads = graph.heads.of(edge)
        total = sum(abs(weight) for _, _, weight in heads) + abs(float(graph.heads.direct[edge]))
        total += abs(float(graph.heads.rest[edge]))
        named = [f"L{layer}H{head}" for layer, head, weight in heads[:HEADS_PER_EDGE] if abs(weight) >= LEAST * total]
        if named and influence[edge] > 0:
            found[edge] = " ".join(named)
        if len(found) == most:
            break
    return found
