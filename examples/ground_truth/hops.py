"""Hop fidelity: how much of a circuit passes through the step that the model really takes.

    hop_fidelity = through / (through + around)

Follow the output's influence backwards. It is `through` where it meets a node that computes the true intermediate variable,
`around` where it ends without having met one: in tokens, positions, features nothing causes, removed or unexpanded edges.
What ends in error terms before it met one is neither, and reported apart. The three shares sum to 1. The influence is that of
`circuits.graph.influence`: rows of |A|, normalised, from the graph's targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from models import GroundTruth
from program import Program
from recovery import auroc

from circuits import CircuitGraph, NodeKind
from circuits.graph.influence import edge_influence, row_scales, sweep


@dataclass(frozen=True, slots=True)
class Hop:
    """Where the output's influence goes; three shares that sum to 1."""

    through: float
    """Meets the intermediate step."""
    around: float
    """Ends without having met it."""
    errors: float
    """Ends in error terms without having met it."""

    @property
    def fidelity(self) -> float:
        """Share that takes the intermediate step, errors left aside; NaN where all of it ends in errors."""
        explained = self.through + self.around
        return self.through / explained if explained > 1e-9 else math.nan


def hop(graph: CircuitGraph, middle_N: np.ndarray) -> Hop:
    """Split a graph's influence by whether it passes the middle nodes.

    Args:
        middle_N: bool[N], the nodes that compute the intermediate variable; no target may be among them.

    Raises:
        ValueError: a mask of another length, or one that holds a target.
    """
    if middle_N.shape != (len(graph.nodes),):
        raise ValueError(f"expected a mask of {len(graph.nodes)} nodes, got shape {middle_N.shape}")
    if (middle_N & graph.nodes.is_target).any():
        raise ValueError("expected intermediate nodes, got a target of the graph among them")
    # A middle node absorbs what reaches it, so that a chain of several counts once.
    scales_N = row_scales(graph) * ~middle_N
    mass_N = sweep(graph.edges, scales_N, graph.nodes.output_weight) + graph.nodes.output_weight
    through = float(mass_N[middle_N].sum())
    errors = float(mass_N[graph.nodes.mask(NodeKind.ERROR) & ~middle_N].sum())
    return Hop(through=through, around=max(0.0, 1.0 - through - errors), errors=errors)


def mean_hop(hops: Sequence[Hop]) -> Hop:
    """The mean of each share."""
    through, around, errors = np.mean([(one.through, one.around, one.errors) for one in hops], axis=0).tolist()
    return Hop(through, around, errors)


def node_variables(graph: CircuitGraph, identified: Sequence[Sequence[str]], targets: Sequence[str]) -> list[str]:
    """The true variable each node stands for: features as identified, logits by the targets' names; others none."""
    nodes, left = graph.nodes, list(targets)
    names = []
    for kind, layer, index in zip(nodes.kind.tolist(), nodes.layer.tolist(), nodes.index.tolist(), strict=True):
        logit = left.pop(0) if kind == NodeKind.LOGIT else ""
        names.append(identified[layer][index] if kind == NodeKind.FEATURE else logit)
    return names


def middle_nodes(graph: CircuitGraph, names: Sequence[str], layer_of: Mapping[str, int], layer: int) -> np.ndarray:
    """bool[N], features that compute a variable of `layer`, in groups no later than the MLP that computes it.

    Later features that correlate with it read it, or go around it; either way the step itself was taken before them or not.
    """
    computes = np.array([layer_of.get(name, -1) == layer for name in names], dtype=bool)
    return computes & graph.nodes.mask(NodeKind.FEATURE) & (graph.nodes.layer <= layer)


def gate_edges(program: Program) -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Layer of every gate, and the true edges among gates."""
    layer_of = {neuron.gate: number for number, layer in enumerate(program.layers) for neuron in layer.neurons}
    pairs = {(read, neuron.gate) for layer in program.layers for neuron in layer.neurons for read in neuron.reads}
    return layer_of, {(source, target) for source, target in pairs if source in layer_of}


class EdgeScores:
    """Influence that crosses from one true variable to another, summed over graphs, and its AUROC against the truth.

    Candidates are all pairs of variables of which the first is computed in an earlier layer.
    """

    def __init__(self, truth: GroundTruth) -> None:
        self.layer_of, self.true = gate_edges(truth.program)
        self.score = {(s, t): 0.0 for s in self.layer_of for t in self.layer_of if self.layer_of[s] < self.layer_of[t]}

    def add(self, graph: CircuitGraph, names: Sequence[str]) -> None:
        """Add a graph's edges.

        Args:
            names: the variable of each node; a target counts as the variable its logit reads.
        """
        edges = graph.edges
        influence = edge_influence(graph).tolist()
        for source, target, mass in zip(edges.source.tolist(), edges.target.tolist(), influence, strict=True):
            pair = (names[source], names[target])
            if pair in self.score:
                self.score[pair] += mass

    @property
    def auroc(self) -> float:
        """AUROC of the scores."""
        is_true = np.array([pair in self.true for pair in self.score])
        return auroc(np.array(list(self.score.values())), is_true)
