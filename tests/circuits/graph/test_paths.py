"""The strongest path against networkx's shortest path on logarithms."""

import dataclasses
import itertools
import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.graph.influence import row_scales
from circuits.graph.outputs import group_name, output_groups
from circuits.graph.paths import (
    average_path_length,
    describe_path,
    edge_weight,
    path_facts,
    strongest_path,
    strongest_paths,
)

T, P, E, F, L = NodeKind


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


@pytest.fixture
def numbers(build_graph) -> CircuitGraph:
    """A token, a feature, and five outputs: four numbers of similar weight and a word; one number is lowered."""
    rows = [{"kind": T, "index": 1, "label": "to"}, {"kind": F, "layer": 0, "index": 2, "label": "a", "expanded": True}]
    outputs = {"42": 0.2, "7": 0.15, "87": 0.15, "33": 0.1, "the": 0.4}
    for index, (label, weight) in enumerate(outputs.items()):
        logit = {"kind": L, "layer": 1, "index": index, "label": label, "output_weight": weight, "expanded": True}
        rows.append(logit | {"probability": weight / 2})
    edges = [(1, 0, 2.0), (2, 1, 1.0), (2, 0, 1.0), (3, 1, 3.0), (4, 1, -0.5), (4, 0, 1.5), (6, 1, 0.2), (6, 0, 0.8)]
    return build_graph(rows, edges)


def test_paths_to_a_group_of_outputs_are_told_together(numbers) -> None:
    (group,) = output_groups(numbers.nodes)
    assert group == (2, 3, 4, 5), "the word is an answer of its own"
    assert group_name(numbers.nodes, group) == "4 numbers: 7 … 87"
    (path,) = strongest_paths(numbers)
    assert path.targets == group
    assert path.nodes == (0, 1, 3), "it reaches 7 most"
    assert path.share == pytest.approx(0.2 * 0.5 + 0.15 * 1.0 + 0.15 * 0.25)
    (facts,) = path_facts(numbers, [path])
    assert facts["nodes"][-1]["label"] == "4 numbers: 7 … 87"
    assert facts["weights"] == pytest.approx([2.0, 1.0 + 3.0 - 0.5])
    assert facts["outputs"] == [numbers.nodes.ids()[node] for node in group]


def test_a_likely_output_stands_alone(build_graph) -> None:
    rows = [
        {"kind": L, "layer": 1, "index": index, "label": label, "output_weight": weight}
        for index, (label, weight) in enumerate(
            {"A": 0.6, "B": 0.1, "C": 0.1, "␣D": 0.1, "##": 0.05, "E": 0.05}.items()
        )
    ]
    nodes = build_graph(rows, []).nodes
    assert output_groups(nodes) == [(1, 2, 3, 5)]
    assert group_name(nodes, (1, 2, 3, 5)) == "4 capitalised words: B, C …"


def test_numbers_of_any_tokenizer_are_told_from_the_smallest_to_the_largest(build_graph) -> None:
    labels = ("##12", "␣100", "²", "7")
    rows = [
        {"kind": L, "layer": 1, "index": index, "label": label, "output_weight": 0.25}
        for index, label in enumerate(labels)
    ]
    nodes = build_graph(rows, []).nodes
    (group,) = output_groups(nodes)
    assert group_name(nodes, group) == "4 numbers: 7 … 100"


@given(st.data())
def test_a_group_counts_each_output_once(draw_circuit, data) -> None:
    """A path's share is the sum over the outputs of its group of what it gives to each."""
    graph = draw_circuit(data)
    words = data.draw(st.lists(st.sampled_from("12a"), min_size=len(graph.nodes), max_size=len(graph.nodes)))
    graph = dataclasses.replace(graph, nodes=dataclasses.replace(graph.nodes, label=tuple(words)))
    with mock.patch("circuits.graph.outputs.LEAST", 2):
        groups, paths = output_groups(graph.nodes), strongest_paths(graph, most=100)
    members = list(itertools.chain.from_iterable(groups))
    assert len(set(members)) == len(members)
    scales, edges = row_scales(graph), graph.edges
    for path in paths:
        product = math.prod(
            abs(edge_weight(graph, source, target)) * scales[target]
            for source, target in itertools.pairwise(path.nodes[:-1])
        )
        last = (edges.source == path.nodes[-2]) & np.isin(edges.target, path.targets)
        gives = graph.nodes.output_weight * scales
        total = (np.abs(edges.weight[last]) * gives[edges.target[last]]).sum()
        assert path.share == pytest.approx(product * total, rel=1e-9)
