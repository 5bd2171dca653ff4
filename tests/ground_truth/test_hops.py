"""Hop fidelity on graphs whose answer is known, and the parts of the trained comparison against independent formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiled import exact_crosscoder, random_rotation
from hop_fidelity import measure_hops, true_counts, with_penalty
from hops import EdgeScores, Hop, gate_edges, hop, node_variables
from models import GroundTruth, and_or, token_copy, two_hop
from program import run
from recovery import auroc
from trained import Activations, Variables, correlations, identify, measure, train_dictionary

from circuits import CircuitGraph, NodeKind, NodeTable
from circuits.graph.edges import Edges
from replacement import Wiring
from replacement.crosscoder.sites import Site


def two_hop_of_two() -> GroundTruth:
    """Two families of two B's with two A's each, rotated."""
    return two_hop(rotation=0, n_families=2, n_first=2)


def chain(skip: float, error: float) -> CircuitGraph:
    """token -> A -> B -> B' -> logit, with `skip` of the logit's inflow straight from A and `error` from an error term."""
    kinds = [NodeKind.TOKEN, NodeKind.ERROR, *[NodeKind.FEATURE] * 3, NodeKind.LOGIT]
    through = 1 - skip - error
    edges = [(2, 0, 1.0), (3, 2, -2.0), (4, 3, 1.0), (5, 4, through), (5, 2, -skip), (5, 1, error)]
    target, source, weight = (np.array(column) for column in zip(*edges, strict=True))
    nodes = NodeTable.build(
        kind=kinds,
        position=0,
        layer=[-1, 0, 0, 1, 1, 2],
        index=[0, -1, 0, 0, 1, 0],
        output_weight=[0, 0, 0, 0, 0, 1],
        expanded=[False, False, True, True, True, True],
        inflow=[0, 0, 1, 2, 1, 1],
    )
    metadata = {"prompt": "p", "tokens": ["p"], "n_layers": 2, "identity_error": 0.0}
    return CircuitGraph(nodes, Edges.from_coo(target, source, weight, n_nodes=6), metadata)


@pytest.mark.parametrize(("skip", "error"), [(0.0, 0.0), (0.25, 0.0), (0.25, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_hop_splits_the_influence(skip: float, error: float) -> None:
    """Two B's in a row count once; signs do not matter."""
    found = hop(chain(skip, error), np.array([False, False, False, True, True, False]))
    assert (found.through, found.around, found.errors) == pytest.approx((1 - skip - error, skip, error))
    expected = (1 - skip - error) / (1 - error) if error < 1 else float("nan")
    assert found.fidelity == pytest.approx(expected, nan_ok=True)


def test_hop_refuses_other_masks() -> None:
    graph = chain(0.5, 0.0)
    with pytest.raises(ValueError, match=r"a mask of 6 nodes, got shape \(5,\)"):
        hop(graph, np.zeros(5, dtype=bool))
    with pytest.raises(ValueError, match="got a target"):
        hop(graph, np.array([False] * 5 + [True]))


@pytest.mark.parametrize("build", [two_hop_of_two, lambda: and_or(rotation=0, pairs=2)])
def test_the_exact_dictionary_takes_every_hop(build: Callable[[], GroundTruth]) -> None:
    truth = build()
    exact = measure(truth.crosscoder, Activations.of(truth, truth.crosscoder.wiring))
    assert exact.unexplained < 1e-10
    row = measure_hops(truth, Variables.of(truth), exact, n_prompts=15)
    assert row.found == 1.0
    assert row.auroc == 1.0
    for one in (row.strict, row.loose):
        assert (one.through, one.around, one.errors) == pytest.approx((1.0, 0.0, 0.0), abs=1e-5)


def test_a_dictionary_built_to_skip_b_has_no_hop() -> None:
    """Every A writes B and C itself: exact as well, with one active feature per family instead of three."""
    truth = two_hop_of_two()
    basis = random_rotation(len(truth.program.variables), seed=0)
    skipping = exact_crosscoder(truth.program, truth.language_model, basis_ND=basis)
    of = {read: neuron.gate for layer in truth.program.layers for neuron in layer.neurons for read in neuron.reads}
    number = {name: place for place, name in enumerate(truth.program.variables)}
    with torch.no_grad():
        for group in (1, 2):
            skipping.b_enc[group].fill_(-100.0)
        for index, neuron in enumerate(truth.program.layers[0].neurons):
            b = of[neuron.gate]
            skipping.decoder(0, Site(1, "mlp_out"))[index] = basis[number[b]].float()
            skipping.decoder(0, Site(2, "mlp_out"))[index] = basis[number[of[b]]].float()
    made = measure(skipping, Activations.of(truth, skipping.wiring))
    exact = measure(truth.crosscoder, Activations.of(truth, skipping.wiring))
    assert made.unexplained < 1e-10
    assert made.l0 == pytest.approx(exact.l0 / 3)
    row = measure_hops(truth, Variables.of(truth), made, n_prompts=10)
    assert row.found == 0.0
    assert row.strict == Hop(through=0.0, around=pytest.approx(1.0), errors=pytest.approx(0.0, abs=1e-5))
    assert row.auroc < 0.5  # only A -> C edges are left, all of them false


def test_variables_are_the_truth_table() -> None:
    truth = and_or(pairs=2)
    variables = Variables.of(truth)
    names, layers, values_VM = variables.names, variables.layers, variables.values_VM
    or_gates = [("B1", 1)] * 3, [("C0", 2)] * 3  # the gate, and its two neurons
    assert list(zip(names, layers, strict=True)) == [
        *((f"A{i}", 0) for i in range(4)), ("B0", 1), *or_gates[0], *or_gates[1],
    ]  # fmt: skip
    for row, bits in enumerate(itertools.product((False, True), repeat=4)):
        b0, b1 = bits[0] and bits[1], bits[2] or bits[3]
        value = dict(
            reversed(list(zip(names, values_VM[row].tolist(), strict=True)))
        )  # the gate comes before its neurons
        assert [value[f"A{i}"] for i in range(4)] == list(map(float, bits))
        assert (value["B0"], value["B1"], value["C0"]) == (b0, b1, b0 or b1)
    assert float(truth.token_probability_V.sum()) == pytest.approx(1.0)
    assert gate_edges(truth.program)[1] == {
        ("A0", "B0"), ("A1", "B0"), ("A2", "B1"), ("A3", "B1"), ("B0", "C0"), ("B1", "C0"),
    }  # fmt: skip


def test_two_hop_families_are_independent() -> None:
    truth = two_hop(n_families=2, n_middle=2, n_first=2, rate=0.3)
    assert len(truth.program.tokens) == 25
    values = [run(truth.program, [token]).values[0] for token in range(25)]
    p_V = truth.token_probability_V
    on = torch.tensor([[value.get(c, 0.0) for c in ("C0", "C1")] for value in values], dtype=p_V.dtype)
    assert float(p_V.sum()) == pytest.approx(1.0)
    assert (p_V @ on).tolist() == pytest.approx([0.3, 0.3])
    assert float(p_V @ on.prod(1)) == pytest.approx(0.09)


def test_correlations_are_pearson() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, n, generator=generator) for n in (3, 2))
    x[:, 1] = 1.0
    found = correlations(x, y, torch.full((50,), 1 / 50, dtype=torch.float64))
    expected = np.corrcoef(x[:, [0, 2]].T.numpy(), y.T.numpy())[:2, 2:]
    assert found[[0, 2]].numpy() == pytest.approx(expected, abs=1e-6)
    assert found[1].tolist() == [0.0, 0.0]


def test_true_counts_are_expectations_rounded_up() -> None:
    """Every family is on with probability 0.35 and has one active feature in each layer."""
    assert true_counts(two_hop(n_families=2, n_first=2)) == (1, 1, 1)  # 0.7
    assert true_counts(two_hop(n_families=3, n_first=1)) == (2, 2, 2)  # 1.05


def test_auroc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    score, is_true = generator.integers(0, 5, 40).astype(float), generator.random(40) < 0.3
    pairs = [(s > f) + 0.5 * (s == f) for s in score[is_true] for f in score[~is_true]]
    assert auroc(score, is_true) == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="got 3 and 0"):
        auroc(np.ones(3), np.ones(3, dtype=bool))


def test_edge_scores_need_both_ends() -> None:
    truth = two_hop(n_families=2, n_middle=1, n_first=1)
    scores = EdgeScores(truth)
    graph = chain(0.25, 0.0)
    names = node_variables(graph, [["A000"], ["B00", ""]], ["C0"])
    assert names == ["", "", "A000", "B00", "", "C0"]
    scores.add(graph, names)
    # The unnamed feature between B and C takes B's edge with it; A -> C, a false edge, has its quarter.
    assert {pair: score for pair, score in scores.score.items() if score} == pytest.approx(
        {("A000", "B00"): 0.75, ("A000", "C0"): 0.25}
    )


@pytest.mark.parametrize("wiring", ["strictly_causal", "per_layer"])
def test_training_is_repeatable_and_learns(wiring: str) -> None:
    truth = two_hop_of_two()
    wired = getattr(Wiring, wiring)(truth.language_model)
    first, again = (
        train_dictionary(truth, **with_penalty(wired, 0.1)._asdict(), seed=0, n_features=16, n_steps=40)
        for _ in range(2)
    )
    assert torch.equal(first.activations_GVF, again.activations_GVF)
    assert first.unexplained < 0.8
    assert first.l0 > 0
    assert first.crosscoder.wiring == wired
    assert {len(group) for group in identify(first, Variables.of(truth), least=0.8)} == {16}


def test_sequences_have_no_table_of_tokens() -> None:
    truth = token_copy(n_words=10, context=8)
    with pytest.raises(ValueError, match=r"stand alone \(two-hop, and-or\), got token-copy"):
        Activations.of(truth, truth.crosscoder.wiring)
    with pytest.raises(ValueError, match="got token-copy"):
        Variables.of(truth)
