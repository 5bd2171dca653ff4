"""Groups of features are the variables of the program, with one feature for each variable and with several.

Features beyond the reach of rounding are compared: in a rotated model an edge that should be 0 is 1e-8. In `and-or` two inputs
of one gate that are both on do the same on that prompt, so there only where features fire, on all tokens, tells them apart;
its ORs are two neurons, of which one takes back a part of what the other writes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from compiled import exact_crosscoder, language_model, random_rotation
from models import BUILDERS, GroundTruth
from planted_groups import adjusted_rand
from program import Layer, Neuron, Program, run

from circuits import CircuitGraph, NodeKind, NodeTable, trace
from replacement import ReplacementModel

SIZES = {"two-hop": {"n_families": 3}, "and-or": {"pairs": 4}}
LEAST = 1e-5
"""Influence of features that count."""
CASES = [(name, rotation) for name in BUILDERS for rotation in (None, 0)]


def split(program: Program, *, noise: float, seed: int) -> Program:
    """Every neuron as two to four that together write the same.

    Args:
        noise: each also reads and writes variables of other neurons of the layer, with weights up to that which cancel.
    """
    random, layers = np.random.default_rng(seed), []
    for layer in program.layers:
        reads = sorted({name for neuron in layer.neurons for name in neuron.reads})
        writes = sorted({name for neuron in layer.neurons for name in neuron.writes})
        pieces = []
        for neuron in layer.neurons:
            n = int(random.integers(2, 5))
            share, scale = random.dirichlet(np.full(n, 4.0)), np.exp(random.normal(scale=0.5, size=n))
            more_reads, more_writes = (random.uniform(-noise, noise, (n, len(names))) for names in (reads, writes))
            more_reads -= share @ more_reads  # all pieces are on or off together, so the weighted sum is as before
            more_writes -= more_writes.mean(0)
            for i in range(n):
                read = {v: scale[i] * (neuron.reads.get(v, 0.0) + more_reads[i, k]) for k, v in enumerate(reads)}
                part = {v: share[i] * neuron.writes.get(v, 0.0) for v in writes}
                write = {v: (part[v] + share.min() / 2 * more_writes[i, k]) / scale[i] for k, v in enumerate(writes)}
                pieces.append(Neuron(read, scale[i] * neuron.bias, write, neuron.gate))
        layers.append(Layer(layer.heads, pieces))
    return replace(program, layers=tuple(layers))


@cache
def built(name: str, rotation: int | None, noise: float | None) -> tuple[GroundTruth, ReplacementModel]:
    """A network with its exact dictionary; with several features for each variable unless `noise` is None."""
    truth = BUILDERS[name](rotation=rotation, **SIZES.get(name, {}))
    if noise is not None:
        program = split(truth.program, noise=noise, seed=1)
        basis = None if rotation is None else random_rotation(len(program.variables), seed=rotation)
        lm = language_model(program, name=f"split-{name}", basis_ND=basis)
        crosscoder = exact_crosscoder(program, lm, basis_ND=basis)
        truth = replace(truth, program=program, language_model=lm, crosscoder=crosscoder)
    return truth, ReplacementModel(truth.language_model, truth.crosscoder)


def signatures(program: Program, graph: CircuitGraph) -> np.ndarray:
    """Activation of every feature on every token of a network whose prompts are single tokens, from the program."""
    nodes, rows = graph.nodes, np.zeros((len(graph.nodes), len(program.tokens)))
    row = {place: node for node, place in enumerate(zip(*_places(nodes), strict=True))}
    for token in range(len(program.tokens)):
        for node, activation in run(program, [token]).activations.items():
            if (node.kind, node.layer, node.index) in row:
                rows[row[node.kind, node.layer, node.index], token] = activation
    return rows


def _places(nodes: NodeTable) -> tuple[list[int], ...]:
    return nodes.kind.tolist(), nodes.layer.tolist(), nodes.index.tolist()


def rand_index(truth: GroundTruth, model: ReplacementModel, number: int, *, with_signatures: bool) -> tuple[float, int]:
    """Adjusted Rand index of the groups of a prompt against the variables at every position, and how many features count."""
    graph = trace(model, torch.tensor(truth.prompts[number]), targets=truth.logit_targets(number), coverage=1.0)
    nodes, program = graph.nodes, truth.program
    features = np.flatnonzero(nodes.mask(NodeKind.FEATURE) & (graph.influence() > LEAST))
    gates = [program.layers[nodes.layer[node]].neurons[nodes.index[node]].gate for node in features]
    variables = [f"{gate}@{position}" for gate, position in zip(gates, nodes.position[features], strict=True)]
    grouping = graph.group(signatures=signatures(program, graph) if with_signatures else None)
    _, numbers = np.unique(variables, return_inverse=True)
    return adjusted_rand(numbers.tolist(), grouping.group_of[features].tolist()), len(features)


@pytest.mark.parametrize("noise", [None, 0.0])
@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_groups_are_the_variables(name: str, rotation: int | None, noise: float | None) -> None:
    truth, model = built(name, rotation, noise)
    counts = []
    for number in range(min(len(truth.prompts), 6)):
        index, n_features = rand_index(truth, model, number, with_signatures=name == "and-or")
        assert index == 1.0
        counts.append(n_features)
    assert max(counts) >= (1 if noise is None else 3)


@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_features_that_also_do_something_else_are_grouped_by_their_variable(name: str, rotation: int | None) -> None:
    truth, model = built(name, rotation, 0.2)
    for number in range(min(len(truth.prompts), 6)):
        assert rand_index(truth, model, number, with_signatures=name == "and-or")[0] >= 0.9


def test_one_prompt_cannot_tell_two_inputs_of_a_gate_apart() -> None:
    """The limit that signatures lift: both inputs of the AND are on, read the same token and act on the same gate."""
    truth, model = built("and-or", None, None)
    assert min(rand_index(truth, model, number, with_signatures=False)[0] for number in range(6)) < 0.5
