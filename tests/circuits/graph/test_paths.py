"""The strongest path against networkx's shortest path on logarithms."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.graph.paths import average_path_length, describe_path, strongest_path, strongest_paths


def best_products(graph, shares) -> tuple[np.ndarray, np.ndarray]:
    """The best product over walks of one edge into a target, and of two edges or more, from every node."""
    strength, products = graph.nodes.output_weight, []
    for _ in range(len(graph.nodes)):
        strength = (shares * strength[:, None]).max(axis=0)
        products.append(strength)
    return products[0], np.max(products[1:], axis=0, initial=0.0)


@given(st.data())
def test_equals_products_of_a_dense_matrix(draw_circuit, to_shares, data) -> None:
    graph = draw_circuit(data)
    nodes, shares = graph.nodes, to_shares(graph)
    direct, through = best_products(graph, shares)
    paths = strongest_paths(graph, most=100)
    is_input = nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)
    for path in paths:
        position = nodes.position[path.nodes[0]]
        here = is_input & (nodes.position == position)
        expected = (through if through[here].any() else direct)[here].max()
        steps = list(itertools.pairwise(path.nodes))
        product = nodes.output_weight[path.nodes[-1]] * math.prod(shares[t, s] for s, t in steps)
        assert path.share == pytest.approx(expected, rel=1e-9) == pytest.approx(product, rel=1e-9)
        assert (len(path.nodes) > 2) == bool(through[here].any())
        assert path.token_share == pytest.approx(graph.influence()[here].sum())
        assert path.direct_share == pytest.approx((nodes.output_weight @ shares)[here].sum())
    places = [int(nodes.position[path.nodes[0]]) for path in paths]
    assert len(set(places)) == len(places), "each from a token of its own"
    order = [(len(path.nodes) == 2, -path.share) for path in paths]
    assert order == sorted(order)
    assert strongest_paths(graph, most=2) == paths[:2]
    assert strongest_path(graph) == (paths[0].nodes if paths else ())
    if not paths:
        assert not (nodes.output_weight @ shares)[is_input].any()


@given(st.data())
def test_average_path_length_is_the_expected_number_of_steps(draw_circuit, to_shares, data) -> None:
    """A walk from the output that follows the shares: the mass still walking, summed over its steps."""
    graph = draw_circuit(data)
    shares, walking, steps = to_shares(graph), graph.nodes.output_weight, 0.0
    for _ in range(len(graph.nodes)):
        walking = walking @ shares
        steps += walking.sum()
    assert average_path_length(graph) == pytest.approx(steps, rel=1e-6, abs=1e-12)


def test_small_graph_in_words(small) -> None:
    path = strongest_path(small)
    assert small.nodes.ids()[path[0]] == "E_11_0", "b -> x is stronger, but no feature explains it"
    first, second = strongest_paths(small)
    assert first.share == pytest.approx(0.75 * 0.25 * 0.75)  # a -> second -> x
    assert (first.direct_share, second.nodes) == (0.0, (1, 6))
    assert second.share == pytest.approx(0.75 * 0.25)
    assert second.token_share == pytest.approx(0.75 * 0.25 + 0.25 * 0.25), "with what its position gives to y"
    assert describe_path(small, second.nodes) == 'token "b" at 1 —(−)→ output "␣x" (p=0.600)'
    assert describe_path(small, (0, 5, 6)) == (
        'token "a" at 0 —(+)→ feature 1/3 at 1 (second) —(+)→ output "␣x" (p=0.600)'
    )


def test_path_without_an_edge(small) -> None:
    with pytest.raises(ValueError, match="expected a path along edges, given none from node 0 to node 6"):
        describe_path(small, (0, 6))
