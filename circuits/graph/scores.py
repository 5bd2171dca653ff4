"""Two numbers that say how much of a graph is explained by features, as opposed to errors.

All the output's mass ends somewhere: in inputs (tokens and learned positions), in error nodes, in features whose
causes were not computed, or in edges that are no longer in the graph. Only the first is an explanation, so the other
three all count as error, before and after pruning: removing an error node changes neither score, and removing
anything else never raises the replacement score.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from circuits.graph.edges import GraphData
from circuits.graph.influence import node_influence, row_scales
from circuits.graph.nodes import NodeKind
from replacement.console import table
from replacement.notebook import repr_html


@dataclass(frozen=True)
class Scores:
    """Shares in 0..1, larger is better explained."""

    replacement: float
    """I_input / (I_input + I_error): share of the output that is traced back to the inputs."""
    completeness: float
    """sum_t (1 - error share of t's inputs)(I_t + p_t) / sum_t (I_t + p_t), over every node t."""

    def __rich__(self) -> Table:
        rows = [
            ("replacement", f"{self.replacement:.4f}", "of the output is traced back to the prompt, through features"),
            (
                "completeness",
                f"{self.completeness:.4f}",
                "of what reaches the nodes does not come from errors",
            ),
        ]
        return table("score", "share", "", rows=rows, texts=("",))

    _repr_html_ = repr_html


@dataclass(frozen=True)
class MassBalance:
    """Where the output's mass ends; the four parts sum to the targets' total weight, 1."""

    inputs: float
    """Share that ends in token and position nodes."""
    errors: float
    """Share that ends in error nodes."""
    unexpanded: float
    """Share that ends in features or targets whose incoming edges were never computed."""
    lost: float
    """Share that ends in edges removed by a threshold or by pruning, or in nodes that no node causes (only biases)."""


def mass_balance(graph: GraphData) -> MassBalance:
    """Split the output's mass by where it ends."""
    return _balance(graph, node_influence(graph) + graph.nodes.output_weight)


def _balance(graph: GraphData, through: np.ndarray) -> MassBalance:
    nodes = graph.nodes
    return MassBalance(
        inputs=float(through[nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)].sum()),
        errors=float(through[nodes.mask(NodeKind.ERROR)].sum()),
        unexpanded=float(through[nodes.unexpanded].sum()),
        lost=float((through * lost_share(graph)).sum()),
    )


def lost_share(graph: GraphData) -> np.ndarray:
    """float64[N], `1 - sum of kept |A| / inflow` of an expanded node's row; 0 for every other node."""
    kept = graph.edges.magnitudes * row_scales(graph)
    return np.where(graph.nodes.expanded, 1.0 - kept, 0.0)


def scores(graph: GraphData) -> Scores:
    """Replacement and completeness of a graph, full or pruned."""
    nodes, edges = graph.nodes, graph.edges
    through = node_influence(graph) + nodes.output_weight
    balance = _balance(graph, through)
    is_error = nodes.mask(NodeKind.ERROR)
    of_errors = edges.row_sums(lambda block: np.abs(block.weight) * is_error.take(block.source))
    error_share = of_errors * row_scales(graph) + lost_share(graph)
    error_share[nodes.unexpanded] = 1.0
    # The sums run over every node, as in published scores, so an error node is a t of its own: one without inputs,
    # hence with error share 0. Lost mass is treated as one more error node, which is what makes the scores blind to
    # removing one.
    complete = ((1.0 - error_share) * through).sum() + balance.lost
    total = balance.inputs + balance.errors + balance.unexpanded + balance.lost
    return Scores(
        replacement=balance.inputs / total,
        completeness=float(complete / (through.sum() + balance.lost)),
    )
