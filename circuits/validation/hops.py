"""Hop fidelity: how much of the influence of some nodes takes steps in between instead of jumping to the output."""

from __future__ import annotations

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.influence import row_scales, sweep
from circuits.graph.nodes import NodeKind


def hop_fidelity(graph: GraphData, *, sources: np.ndarray | None = None, via: np.ndarray | None = None) -> float:
    """Share of the influence of `sources` on the output whose paths pass through at least one node of `via`.

    `1 - I'(sources) / I(sources)`, where I is the summed influence (see `circuits.graph.influence`), and I' the same with every
    edge out of an intermediate node ablated without renormalising the rest: what is left reaches the output directly. A path
    ends at the first source it meets, seen from the output. Edges always lead from earlier layers to later ones (attention
    carries them to later positions too), so intermediate nodes lie between. Near 0 the sources reach the output directly, as
    cross-layer crosscoders are suspected to do where the model takes steps; 1 means always through an intermediate node.

    Args:
        graph: a graph, full or pruned.
        sources: bool[N], nodes whose influence is followed; tokens and learned positions by default.
        via: bool[N], the intermediate nodes; all features but targets and sources by default.

    Returns:
        A share; NaN where the sources have no influence.

    Raises:
        ValueError: a mask of another length, or nodes that are sources and intermediate.
    """
    nodes, edges = graph.nodes, graph.edges
    if sources is None:
        sources = nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)
    if via is None:
        via = nodes.mask(NodeKind.FEATURE) & ~nodes.is_target & ~sources
    for name, mask in (("sources", sources), ("via", via)):
        if mask.shape != (len(nodes),) or mask.dtype != np.bool_:
            raise ValueError(f"{name}: expected a bool mask of {len(nodes)} nodes, given {mask.dtype}{mask.shape}")
    if (sources & via).any():
        raise ValueError(
            f"expected intermediate nodes that are no sources, given {int((sources & via).sum())} that are both"
        )
    scales = row_scales(graph) * ~sources  # a path ends at the first source it meets
    all_paths = sweep(edges, scales, nodes.output_weight)[sources].sum()
    direct = sweep(edges, scales * ~via, nodes.output_weight)[sources].sum()
    return float(1 - direct / all_paths) if all_paths else float("nan")
