"""One backward sweep against the dense inverse and the power series."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.graph.edges import Edges
from circuits.graph.influence import crossing_mass, edge_influence, inverse, node_influence, sweep


@given(st.data())
def test_sweep_equals_dense_inverse(draw_circuit, to_shares, data) -> None:
    graph = draw_circuit(data)
    shares = to_shares(graph)
    inverse = np.linalg.inv(np.eye(len(graph.nodes)) - shares)
    expected = graph.nodes.output_weight @ (inverse - np.eye(len(graph.nodes)))
    np.testing.assert_allclose(graph.influence(), expected, atol=1e-12)


@given(st.data())
def test_edge_influence_equals_dense_formula(draw_circuit, to_shares, data) -> None:
    graph = draw_circuit(data)
    shares = to_shares(graph)
    total, term = graph.nodes.output_weight.copy(), graph.nodes.output_weight.copy()
    for _ in range(len(graph.nodes)):
        term = term @ shares
        total += term
    matrix = total[:, None] * shares
    expected = matrix[graph.edges.target, graph.edges.source]
    np.testing.assert_allclose(edge_influence(graph), expected, atol=1e-12)


@given(st.data())
def test_influence_of_a_node_is_what_crosses_its_outgoing_edges(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    crossing = np.bincount(graph.edges.source, weights=edge_influence(graph), minlength=len(graph.nodes))
    np.testing.assert_allclose(node_influence(graph), crossing, atol=1e-12)


def test_small_graph_by_hand(small) -> None:
    # Logit " x": 3/4 from the second feature, 1/4 from token b. Logit " y": 1/2 second, 1/4 position, 1/4 error.
    second = 0.75 * 0.75 + 0.25 * 0.5
    expected = [second / 4, 0.75 / 4, 0.25 / 4, second / 4 + 0.25 / 4, second / 2, second, 0, 0]
    np.testing.assert_allclose(small.influence(), expected, rtol=1e-12)


def test_renormalised_edges_share_the_lost_mass(small) -> None:
    edges = small.edges.where(small.edges.source != 3)  # without the error, rows 5 and 7 are smaller
    crossing = np.concatenate(list(crossing_mass(edges, inverse(edges.magnitudes), small.nodes.output_weight)()))
    np.testing.assert_allclose(sorted(crossing[edges.target == 7]), [0.25 / 3, 0.5 / 3])


def test_levels_put_targets_before_sources(small) -> None:
    order = np.concatenate(small.edges.levels)
    place = np.argsort(order)
    assert sorted(order.tolist()) == list(range(8))
    assert (place[small.edges.target] < place[small.edges.source]).all()


def test_a_cycle_is_an_error() -> None:
    edges = Edges.from_coo(np.array([0, 1, 2]), np.array([1, 0, 0]), np.ones(3), n_nodes=3)
    with pytest.raises(ValueError, match="expected a graph without cycles, given one through 2 or fewer nodes"):
        sweep(edges, np.ones(3), np.ones(3))


def test_no_nodes_no_influence() -> None:
    edges = Edges.from_coo(np.array([], dtype=int), np.array([], dtype=int), np.array([]), n_nodes=0)
    assert sweep(edges, np.array([]), np.array([])).shape == (0,)
