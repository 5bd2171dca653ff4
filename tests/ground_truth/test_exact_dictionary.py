"""With the exact dictionary, tracing finds every true edge of a hand-built model, at its weight, and no false one.

The truth comes from the program of each model, run in plain Python: no weights, no tensors, no code of either package.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from compiled import exact_crosscoder, random_rotation
from models import BUILDERS, GroundTruth
from program import Node, Run, run
from recovery import candidate_edges, compare, traced_edges

from circuits import CircuitGraph, FeatureTarget, NodeKind, attribute_score, split_heads, trace
from replacement import ReplacementModel
from replacement.crosscoder.sites import Site

CASES = [(name, rotation) for name in BUILDERS for rotation in (None, 0)]
PROMPTS = {"two-hop": 6, "and-or": 6, "token-copy": 3, "induction": 3}
SIZES = {"two-hop": {"n_families": 3}, "and-or": {"pairs": 4}}
"""Smaller vocabularies than the examples use."""


@cache
def built(name: str, rotation: int | None, dtype: torch.dtype = torch.float32) -> tuple[GroundTruth, ReplacementModel]:
    truth = BUILDERS[name](rotation=rotation, dtype=dtype, **SIZES.get(name, {}))
    return truth, ReplacementModel(truth.language_model, truth.crosscoder)


def traced(truth: GroundTruth, model: ReplacementModel, number: int) -> tuple[Run, list[CircuitGraph]]:
    """What is true of a prompt, and two graphs of it: from the logits, and from every feature that is truly active."""
    prompt = torch.tensor(truth.prompts[number])
    true = run(truth.program, truth.prompts[number], truth.targets[number])
    roots = [FeatureTarget(node.layer, node.index, node.position) for node in true.activations]
    graphs = [
        trace(model, prompt, targets=truth.logit_targets(number), coverage=1.0),
        trace(model, prompt, targets=roots, coverage=1.0),
    ]
    return true, graphs


@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_every_true_edge_is_found_and_no_false_one(name: str, rotation: int | None) -> None:
    truth, model = built(name, rotation)
    for number in range(PROMPTS[name]):
        true, graphs = traced(truth, model, number)
        found = compare(graphs, true, truth.prompts[number], len(truth.program.layers))
        assert found.is_true_E.sum() >= 3
        assert (~found.is_true_E).sum() > found.is_true_E.sum()
        assert found.auroc == 1.0
        assert found.largest_gap < 1e-4
        assert max(graph.identity_error for graph in graphs) < 1e-4


@pytest.mark.parametrize(("name", "rotation"), CASES)
def test_the_dictionary_is_exact(name: str, rotation: int | None) -> None:
    """Active features are the true ones, at the true values; error terms vanish; logits are the program's."""
    truth, model = built(name, rotation)
    for number in range(PROMPTS[name]):
        prompt = truth.prompts[number]
        true, local = run(truth.program, prompt), model.localize(torch.tensor(prompt))
        features = local.features
        columns = (features.group.tolist(), features.row.tolist(), features.index.tolist())
        nodes = [Node(NodeKind.FEATURE, *place) for place in zip(*columns, strict=True)]
        assert dict(zip(nodes, features.activation.tolist(), strict=True)) == pytest.approx(true.activations, abs=1e-5)
        assert local.mlp.errors_LTD.abs().max() < 1e-5
        logits = truth.language_model(torch.tensor(prompt))
        expected = torch.zeros_like(logits)
        for position, values in enumerate(true.values):
            for token, reads in truth.program.outputs.items():
                expected[position, token] = sum(w * values.get(name, 0.0) for name, w in reads.items())
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(torch.tensor(prompt)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_weights_agree_to_float64_precision(name: str) -> None:
    truth, model = built(name, 0, torch.float64)
    true, graphs = traced(truth, model, 1)
    assert compare(graphs, true, truth.prompts[1], len(truth.program.layers)).largest_gap < 1e-10


@pytest.mark.parametrize("name", BUILDERS)
def test_a_per_layer_dictionary_gives_the_same_graph(name: str) -> None:
    truth, _ = built(name, 0)
    basis = random_rotation(len(truth.program.variables), seed=0)
    plt = exact_crosscoder(truth.program, truth.language_model, basis_ND=basis, wiring="per_layer")
    assert plt.wiring.name == "per_layer"
    true, graphs = traced(truth, ReplacementModel(truth.language_model, plt), 0)
    found = compare(graphs, true, truth.prompts[0], len(truth.program.layers))
    assert found.auroc == 1.0
    assert found.largest_gap < 1e-4


@pytest.mark.parametrize("rotation", [None, 0])
def test_a_dictionary_with_one_wrong_vector_fails_the_same_measure(rotation: int | None) -> None:
    truth, _ = built("two-hop", rotation)
    basis = None if rotation is None else random_rotation(len(truth.program.variables), seed=rotation)
    wrong = exact_crosscoder(truth.program, truth.language_model, basis_ND=basis)
    true = run(truth.program, truth.prompts[0], truth.targets[0])
    active = next(node for node in true.activations if node.layer == 0)
    with torch.no_grad():  # this A writes what the first C that is on writes, too
        site = Site(2, "mlp_out")
        c_D = wrong.decoder(2, site)[truth.targets[0][0][0]]
        wrong.decoder(0, site)[active.index].add_(0.9 * c_D)
    true, graphs = traced(truth, ReplacementModel(truth.language_model, wrong), 0)
    found = compare(graphs, true, truth.prompts[0], len(truth.program.layers))
    assert found.auroc < 1.0
    assert found.largest_gap == pytest.approx(2.7, abs=1e-4)  # the logit's weight is 3, those of others from 2
    assert max(graph.identity_error for graph in graphs) < 1e-4  # an error term makes up for it


@pytest.mark.parametrize("rotation", [None, 0])
def test_rotated_models_have_no_variable_on_an_axis(rotation: int | None) -> None:
    """The rotation is a real one: the embedding of a token has many entries, and the circuit is still the same."""
    truth, _ = built("induction", rotation)
    embedding_VD = truth.language_model.parts.bridge.W_E
    largest_share = float(embedding_VD.abs().amax(1).max())
    assert largest_share == 1.0 if rotation is None else largest_share < 0.6


@pytest.mark.parametrize("rotation", [None, 0])
def test_one_head_copies_the_token(rotation: int | None) -> None:
    """Edges that cross positions run through the previous-token head, all others through none."""
    truth, model = built("token-copy", rotation)
    _, (graph, _) = traced(truth, model, 0)
    split = split_heads(model, graph)
    nodes, edges = graph.nodes, graph.edges
    crosses_E = (nodes.position[edges.source] != nodes.position[edges.target]) & (abs(edges.weight) > 1e-4)
    assert crosses_E.sum() == 1
    assert (nodes.position[edges.target] - nodes.position[edges.source])[crosses_E] == 1
    assert split.heads_ELH[crosses_E, 0, 0] == pytest.approx(edges.weight[crosses_E], abs=1e-5)
    assert split.direct_E[~crosses_E] == pytest.approx(edges.weight[~crosses_E], abs=1e-5)


@pytest.mark.parametrize("rotation", [None, 0])
def test_the_induction_head_looks_for_the_noted_token(rotation: int | None) -> None:
    """The induction head reads the answer from the place that followed; it is there because of the previous-token neuron."""
    truth, model = built("induction", rotation)
    for number, prompt in enumerate(truth.prompts):
        query = len(prompt) - 1
        key = prompt.index(prompt[-1]) + 1
        answer = truth.targets[number][0][0]
        assert prompt[key] == answer
        true, (graph, _) = traced(truth, model, number)
        assert true.attended[1, 0, query] == key
        # Rounding in a rotated model makes the graph reach features of layer 0 that the logit does not read.
        strong = [edge for edge, weight in traced_edges(graph).items() if abs(weight) > 1e-4 and edge[1].layer > 0]
        crossing = {(source, target) for source, target in strong if source.position != target.position}
        feature = Node(NodeKind.FEATURE, 1, query, answer)
        assert crossing == {(Node(NodeKind.TOKEN, -1, key, answer), feature)}
        score = attribute_score(model, torch.tensor(prompt), layer=1, head=0)
        asks, noted, share = score.top(1)[0]
        assert score.key == key
        assert score.pattern == pytest.approx(1.0, abs=1e-6)
        assert (asks.kind, asks.position, asks.index) == (NodeKind.TOKEN, query, prompt[-1])
        assert (noted.kind, noted.layer, noted.position, noted.index) == (NodeKind.FEATURE, 0, key, prompt[-1])
        assert share == pytest.approx(score.value, rel=1e-4)


def test_candidates_hold_every_pair_in_causal_order() -> None:
    """A count by hand: one word after another, the copy circuit's candidates at two positions."""
    truth, _ = built("token-copy", None)
    word, other = 3, 5
    true = run(truth.program, (word, other), ((word, len(truth.program.tokens) - 1),))
    # Active: "here" of layer 0 at both positions; "copied" of layer 1 at both (the first position attends to itself).
    assert {(node.layer, node.position, node.index) for node in true.activations} == {
        (0, 0, word), (0, 1, other), (1, 0, word), (1, 1, word),
    }  # fmt: skip
    # Tokens and positions: 2 per position. A feature of layer 1 also sees layer 0's error and feature; the logit sees both.
    at_0, at_1 = (2) + (2 + 2), (4) + (4 + 4)
    assert len(candidate_edges(true, (word, other), 2)) == at_0 + at_1 + (4 + 4 + 4)
    assert len(true.edges) == 2 + 2 + 1


def test_edges_that_cannot_exist_are_refused() -> None:
    """A graph of another prompt has nodes that this prompt does not."""
    truth, model = built("token-copy", None)
    _, graphs = traced(truth, model, 0)
    true = run(truth.program, truth.prompts[1], truth.targets[1])
    with pytest.raises(ValueError, match="edges among the candidates only"):
        compare(graphs, true, truth.prompts[1], 2)
