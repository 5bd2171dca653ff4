"""What a story says: which groups of a graph it tells of, what each is said to do to others, and how a group is read.

    claim     "A raises B" or "A lowers B": the sign of the weight of all edges from A's members to B's (`GroupEdge.weight`)
    reading   of B: a weighted sum over its members, r = sum_t w_t a_t,   w_t = (influence + output weight of t) / inflow of t

With these weights a claim is about one number: ablating A changes B's reading, through the edges between them, by minus the
weight of the edge between the groups. Readings of features are divided by their clean value, so that -1 takes all of the
group's activation away; those of outputs are weighted means of logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.groups import Group, GroupEdge, Grouping
from circuits.graph.influence import node_influence, row_scales
from circuits.graph.nodes import NodeKind
from circuits.graph.selection import largest_holding

MOST_GROUPS = 8
"""Groups of a story: more are no story."""
TOLD = 0.8
"""Share of the influence between the groups of a story (and from errors into them) that its claims hold, as pruning has it."""
LEAST_OF_EDGE = 0.2
"""A head is named if it carries this share of what the edge's parts carry together."""


@dataclass(frozen=True)
class Claim:
    """One group is said to raise or to lower another."""

    edge: GroupEdge
    """Numbers of both groups, weight, influence and parts."""

    @property
    def sign(self) -> int:
        """1 for `raises`, -1 for `lowers`."""
        return 1 if self.edge.weight > 0 else -1

    def heads(self) -> list[str]:
        """Names of the heads that carry it: `L1H3`."""
        parts = self.edge.parts
        if parts is None:
            return []
        total = sum(abs(weight) for *_, weight in parts.heads) + abs(parts.direct) + abs(parts.rest)
        return [f"L{layer}H{head}" for layer, head, weight in parts.heads if abs(weight) > LEAST_OF_EDGE * total]


def story_groups(grouping: Grouping, most: int) -> list[int]:
    """Numbers of the groups that a story tells of: outputs (half of them at most), then features and tokens, by influence.

    Errors are no group of a story, as nobody knows what they stand for; what they do is told by claims that cannot be tested.
    """
    graph = grouping.graph
    mass = node_influence(graph) + graph.nodes.output_weight
    size = [float(mass[list(group.members)].sum()) for group in grouping.groups]
    ranked = sorted(range(len(size)), key=lambda number: (-size[number], number))
    outputs = [number for number in ranked if grouping.groups[number].kind == "outputs"][: most // 2]
    causes = [number for number in ranked if grouping.groups[number].kind in ("tokens", "features")]
    return sorted([*outputs, *causes][:most])


def claims_of(grouping: Grouping, shown: Collection[int]) -> list[Claim]:
    """The fewest claims that hold `TOLD` of the influence between the groups shown, and from errors into them; by influence."""
    sources = {*shown, *(number for number, group in enumerate(grouping.groups) if group.kind == "errors")}
    edges = [edge for edge in grouping.edges() if edge.source in sources and edge.target in shown and edge.weight]
    told = largest_holding(lambda: [np.array([edge.influence for edge in edges])], TOLD)
    return [Claim(edge) for edge, is_told in zip(edges, told, strict=True) if is_told]


def told_share(grouping: Grouping, shown: Collection[int], claims: Sequence[Claim]) -> float:
    """Influence of the claims as a share of all that flows into the groups shown from other groups."""
    into_shown = sum(edge.influence for edge in grouping.edges() if edge.target in shown)
    return sum(claim.edge.influence for claim in claims) / into_shown


def readings(graph: CircuitGraph, groups: Sequence[Group]) -> np.ndarray:
    """float64[N, G], how changes of nodes are read as changes of groups: `change_BN @ readings`; 0 for groups without causes.

    Args:
        groups: with numbers of this graph's nodes as members.
    """
    nodes = graph.nodes
    weight_N = (node_influence(graph) + nodes.output_weight) * row_scales(graph)
    reading_NG = np.zeros((len(nodes), len(groups)))
    for number, group in enumerate(groups):
        members = np.array(group.members)
        # A target feature is an output of its graph, but what is read of it is its activation.
        is_feature = nodes.mask(NodeKind.FEATURE)[members]
        size = weight_N[members] * np.where(is_feature, np.abs(nodes.activation[members]), 1.0)
        if size.sum() > 0:
            reading_NG[members, number] = weight_N[members] / size.sum()
    return reading_NG
