"""Predictions, agreement and hop fidelity on graphs whose every number is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.graph.influence import node_influence
from circuits.validation import hop_fidelity
from circuits.validation.agreement import agreement, area, ranks, spearman
from circuits.validation.prediction import influence_among, predicted_changes, scaled_alone


@pytest.fixture
def chain(build_graph: Callable[..., CircuitGraph]) -> CircuitGraph:
    """0 token, 1 feature A (activation 2), 2 feature B (activation 4), 3 logit: A -> B 3, A -> logit 1, B -> logit -2."""
    rows: list[dict[str, Any]] = [
        {"kind": NodeKind.TOKEN, "index": 5, "position": 0},
        {"kind": NodeKind.FEATURE, "layer": 0, "index": 1, "activation": 2.0, "expanded": True},
        {"kind": NodeKind.FEATURE, "layer": 1, "index": 2, "activation": 4.0, "expanded": True},
        {"kind": NodeKind.LOGIT, "layer": 3, "index": 7, "probability": 0.5, "output_weight": 1.0, "expanded": True},
    ]
    return build_graph(rows, [(1, 0, 2.0), (2, 1, 3.0), (2, 0, 1.0), (3, 1, 1.0), (3, 2, -2.0), (3, 0, 1.0)])


def test_a_chain_of_two_features(chain: CircuitGraph) -> None:
    """Without A, B loses 3 of its 4, so the logit loses 1 of A and -2 * 3/4 of B."""
    np.testing.assert_allclose(
        predicted_changes(chain, scaled_alone(np.array([1, 2]), -1.0)), [[0, -2, -3, 0.5], [0, 0, -4, 2]]
    )
    np.testing.assert_allclose(
        predicted_changes(chain, scaled_alone(np.array([1]), -1.0), total=False), [[0, -2, -3, -1]]
    )
    np.testing.assert_allclose(predicted_changes(chain, scaled_alone(np.array([1]), 1.0)), [[0, 2, 3, -0.5]])
    np.testing.assert_allclose(predicted_changes(chain, scaled_alone(np.array([1]), -2.0)), [[0, -4, -6, 1]])
    np.testing.assert_allclose(
        predicted_changes(chain, scaled_alone(np.array([1]), -2.0), clipped=True), [[0, -4, -4, 0]]
    )
    negative = dataclasses.replace(chain.nodes, activation=np.array([0, 2, -4, 0], dtype=np.float32))
    chain = CircuitGraph(negative, chain.edges, chain.metadata)  # no stop at zero for what is below it
    np.testing.assert_allclose(
        predicted_changes(chain, scaled_alone(np.array([1]), -2.0), clipped=True), [[0, -4, -6, -5]]
    )
    with pytest.raises(ValueError, match="expected features, tokens or errors to change, given an output"):
        predicted_changes(chain, scaled_alone(np.array([3]), 1.0))


def test_nodes_changed_together_and_tokens(chain: CircuitGraph) -> None:
    """A halved and B held at 3/4: the logit loses half of A's 1, and a quarter of B's -2; the token feeds all three."""
    together = predicted_changes(chain, [{1: -0.5, 2: -0.25}])
    np.testing.assert_allclose(together, [[0, -1, -1, -0.5 + 0.5]])
    np.testing.assert_allclose(predicted_changes(chain, [{1: -0.5, 2: 0.0}]), [[0, -1, 0, -0.5]])
    # Without the token A loses its 2, B 1 + 3, and the logit 1 + 1 - 2.
    np.testing.assert_allclose(predicted_changes(chain, [{0: -1.0}]), [[0, -2, -4, 0]])
    np.testing.assert_allclose(predicted_changes(chain, [{0: -1.0}], total=False), [[0, -2, -1, -1]])


@given(data=st.data())
def test_total_effects_solve_the_linear_system(data: Any, draw_circuit: Any, to_dense: Any) -> None:
    graph = draw_circuit(data)
    nodes, feature = graph.nodes, graph.nodes.mask(NodeKind.FEATURE)
    changed = np.flatnonzero(feature)
    if not len(changed):
        return
    found = predicted_changes(graph, scaled_alone(changed, -1.0))
    through = to_dense(graph) * np.where(feature, 1.0, 0.0)  # activations are 1: a change is a relative change
    for row, node in zip(found, changed, strict=True):
        system = np.eye(len(nodes)) - through
        system[node] = np.eye(len(nodes))[node]  # the feature is held where it was put
        right = np.zeros(len(nodes))
        right[node] = -1.0
        expected = np.linalg.solve(system, right)
        np.testing.assert_allclose(row, expected, atol=1e-9 * max(1.0, np.abs(expected).max()))


def test_influence_among_features_by_hand(chain: CircuitGraph) -> None:
    """All of B's inflow comes from A; the logit gets a quarter of its 4 from A, half from B."""
    np.testing.assert_allclose(
        influence_among(chain, np.array([1, 2])), [[0, 0, 0.75, 0.25 + 0.5 * 0.75], [0, 0, 0, 0.5]]
    )


@given(data=st.data())
def test_influence_among_nodes_is_the_sum_over_paths(data: Any, draw_circuit: Any, to_shares: Any) -> None:
    graph = draw_circuit(data)
    shares_NN = to_shares(graph)
    expected_NN = np.linalg.inv(np.eye(len(shares_NN)) - shares_NN) - np.eye(len(shares_NN))  # [target, source]
    found_NN = influence_among(graph, np.arange(len(shares_NN)))
    np.testing.assert_allclose(found_NN, expected_NN.T, atol=1e-12)


def test_hop_fidelity_by_hand(chain: CircuitGraph) -> None:
    """Of the logit's 4, the token gets 1/4 at once, 1/4 through A, and through B's 1/2 the rest."""
    assert hop_fidelity(chain) == pytest.approx(0.75)
    a, b = (np.arange(4) == node for node in (1, 2))
    assert hop_fidelity(chain, sources=a, via=b) == pytest.approx((1 / 2 * 3 / 4) / (1 / 4 + 1 / 2 * 3 / 4))
    assert math.isnan(hop_fidelity(chain, sources=np.zeros(4, dtype=bool)))
    with pytest.raises(ValueError, match="via: expected a bool mask of 4 nodes, given bool"):
        hop_fidelity(chain, via=np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="no sources, given 1 that are both"):
        hop_fidelity(chain, sources=a, via=a)


@given(data=st.data())
def test_hop_fidelity_counts_paths(data: Any, draw_circuit: Any, to_shares: Any) -> None:
    graph = draw_circuit(data)
    inputs = graph.nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)
    share = (graph.nodes.output_weight @ to_shares(graph))[inputs].sum()  # one step from the output
    total = node_influence(graph)[inputs].sum()
    targets = graph.nodes.is_target & graph.nodes.mask(NodeKind.FEATURE)
    if total and not targets.any():
        assert hop_fidelity(graph) == pytest.approx(1 - share / total, abs=1e-9)


def test_agreement() -> None:
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 9.0])), [2.5, 1, 2.5, 4])
    assert spearman(np.array([1.0, 2, 3]), np.array([1.0, 10, 1000])) == pytest.approx(1)
    found = agreement(np.array([1.0, 2, 4]), np.array([2.0, 4, 8]))
    assert (found["pairs"], found["nmse"]) == (3, pytest.approx(0.25))
    assert found["pearson"] == pytest.approx(1)
    assert found["cosine"] == pytest.approx(1)
    empty = agreement(np.ones(3), np.zeros(3))
    assert all(math.isnan(one) for one in (empty["pearson"], empty["spearman"], empty["cosine"], empty["nmse"]))
    assert area(np.array([0.0, 1, 3]), np.array([1.0, 3, 3])) == pytest.approx(8)
