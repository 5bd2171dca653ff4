"""Credit through the ReLU along a graph's edges: one feature's activation divided among the nodes that feed it.

With a prompt's other features held fixed, every activation function is `f(h) = h 1[h > theta]` (before the scale and offset
that some published crosscoders have at last), and theta is

    ReLU         0
    JumpReLU     the feature's own threshold
    BatchTopK    the recorded threshold, at least 0
    TopK         the largest pre-activation of the group at that position that was not selected (with a ReLU at least 0); where
                 features are chosen by scores, the largest such score, divided by the feature's own factor
    JointTopK    the same over all groups
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from circuits.attribution.grounding import Grounding
from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.nodes import NodeKind
from circuits.graph.rows import node_number
from circuits.heads.relu_credit import DEFAULT_RULE, Credit, credit
from replacement import (
    BatchTopK,
    Decomposition,
    JointTopK,
    JumpReLU,
    LocalReplacement,
    Lorsa,
    ReLU,
    ReplacementModel,
    TopK,
)


@dataclass(frozen=True, slots=True, eq=False)
class SourceCredit:
    """Credit of the nodes that feed one feature. The J players are these nodes, and what was removed from the feature's row."""

    node: int
    """The feature's number in the graph."""
    sources: np.ndarray
    """int64[J - 1], nodes that feed it."""
    contributions: np.ndarray
    """float64[J], exact parts of the pre-activation: the edges, and last the sum of what was removed from the row."""
    threshold: float
    """With all other features held fixed, the activation is `h 1[h > threshold]`."""
    credit: Credit
    """Parts of the activation, in the order of `contributions`."""


def source_credit(
    model: ReplacementModel, graph: CircuitGraph, node: int | str, *, rule: str = DEFAULT_RULE, seed: int = 0
) -> SourceCredit:
    """Divide a feature's activation among the nodes that feed it; see `circuits.heads.relu_credit` for the rules.

    Args:
        model: the model the graph was traced in.
        graph: a traced graph.
        node: an expanded feature of the graph, by number, id or name: `2/345@7`, `attention:2/345@7`.
        rule: `gate`, `path`, `shapley` (sampled above 16 players) or `ablation`.
        seed: draws Shapley's samples.

    Raises:
        ValueError: an unknown rule or node, a node that is no feature or was not expanded, or a graph of another model.
    """
    number = node_number(graph, node)
    nodes = graph.nodes
    if nodes.kind[number] != NodeKind.FEATURE or not nodes.expanded[number]:
        raise ValueError(f"expected an expanded feature, given {nodes.ids()[number]}")
    grounding = Grounding.of(model, graph)
    numbers_by_part = [numbers for _, numbers in grounding.feature_numbers(np.array([number]))]
    parts = zip(grounding.local.decompositions, numbers_by_part, strict=True)
    part, feature = next((part, int(numbers[0])) for part, numbers in parts if len(numbers))
    threshold = feature_threshold(grounding.local, part, feature)
    edges = graph.edges.into(np.array([number]))
    weights, bias = graph.edges.weight[edges].astype(np.float64), float(nodes.bias[number])
    contributions = np.append(weights, float(nodes.value[number]) - bias - weights.sum())
    return SourceCredit(
        node=number,
        sources=graph.edges.source[edges].astype(np.int64),
        contributions=contributions,
        threshold=threshold,
        credit=credit(contributions, bias=bias, threshold=threshold, rule=rule, seed=seed),
    )


@torch.no_grad()
def feature_threshold(local: LocalReplacement, part: Decomposition, number: int) -> float:
    """The threshold of one active feature, in units of its pre-activation.

    Args:
        local: the prompt.
        part: whose feature it is, one of `local.decompositions`.
        number: number into `part.features`.

    Raises:
        ValueError: an activation function of another kind.
    """
    crosscoder, features = part.crosscoder, part.features
    group, row, index = (int(column[number]) for column in (features.group, features.row, features.index))
    activation = crosscoder.activation
    if isinstance(activation, ReLU):
        return 0.0
    if isinstance(activation, JumpReLU | BatchTopK):
        assert crosscoder.threshold is not None
        theta = float(crosscoder.threshold[group].expand(crosscoder.n_features)[index])
        return theta if isinstance(activation, JumpReLU) else max(theta, 0.0)
    if isinstance(activation, TopK | JointTopK):
        first = 0 if isinstance(crosscoder, Lorsa) else row  # which reads all positions up to its own
        inputs = {site: local.frozen.activations[site][first : row + 1] for site in crosscoder.wiring.read_sites}
        best = 0.0 if activation.relu else -math.inf
        for rival in range(crosscoder.n_groups) if isinstance(activation, JointTopK) else (group,):
            score_F = crosscoder.scores(crosscoder.pre_activations(inputs, rival)[-1], rival)
            of_group = features.of(rival)
            score_F[of_group.index[of_group.row == row]] = -torch.inf
            best = max(best, float(score_F.max()))
        factor = 1.0 if crosscoder.score_factor is None else float(crosscoder.score_factor[group, index])
        return best / factor if factor else -math.inf  # with a factor of 0 it can only be active whatever it reads
    raise ValueError(f"features of {type(activation).__name__} have no threshold that is known here")
