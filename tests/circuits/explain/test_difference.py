"""The difference of two graphs against dense matrices and Python dictionaries."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph
from circuits.explain.difference import STATUS, difference
from circuits.graph.alignment import aligned_positions
from circuits.graph.nodes import NodeKind

Figures = dict[tuple[Any, ...], tuple[float, float]]


def nodes_by_place(graph: CircuitGraph, place: list[int], to_shares) -> tuple[list[tuple[int, ...]], Figures]:
    """The place of each node, positions as numbers in the other prompt; activation and influence of each place."""
    nodes, shares = graph.nodes, to_shares(graph)
    reach = np.linalg.inv(np.eye(len(nodes)) - shares)
    influence = nodes.output_weight @ reach
    places = []
    for row in range(len(nodes)):
        position, index = int(nodes.position[row]), int(nodes.index[row])
        # A position without a counterpart keeps a place of its own, below 0.
        position = place[position] if place[position] >= 0 else -1 - position
        index = 0 if nodes.kind[row] == NodeKind.TOKEN else index
        places.append((int(nodes.kind[row]), int(nodes.part[row]), int(nodes.layer[row]), position, index))
    return places, {at: (float(nodes.activation[row]), float(influence[row])) for row, at in enumerate(places)}


@given(st.data())
def test_nodes_and_edges_equal_those_of_dictionaries(draw_circuit, to_dense, to_shares, data) -> None:
    first, second = draw_circuit(data), draw_circuit(data)
    place = aligned_positions(first.metadata["tokens"], second.metadata["tokens"]).tolist()
    found = difference(first, second)
    sides = (
        nodes_by_place(first, place, to_shares),
        nodes_by_place(second, list(range(len(second.metadata["tokens"]))), to_shares),
    )
    at = [next(sides[side][0][row] for side, row in enumerate(rows) if row >= 0) for rows in found.nodes.rows.tolist()]
    assert sorted(at) == sorted({*sides[0][1], *sides[1][1]})
    for number, where in enumerate(at):
        for side in (0, 1):
            activation, influence = sides[side][1].get(where, (0.0, 0.0))
            np.testing.assert_allclose(found.nodes.size[number, side], activation)
            np.testing.assert_allclose(found.nodes.influence[number, side], influence, atol=1e-12)

    weights: list[dict[tuple[Any, ...], float]] = []
    for graph, (places, _) in zip((first, second), sides, strict=True):
        matrix, kept = to_dense(graph), zip(graph.edges.target.tolist(), graph.edges.source.tolist(), strict=True)
        weights.append({(places[t], places[s]): matrix[t, s] for t, s in kept})
    unexpanded = {
        places[row] for graph, (places, _) in zip((first, second), sides, strict=True)
        for row in np.flatnonzero(graph.nodes.unexpanded).tolist()
    }  # fmt: skip
    expected = {edge for side in weights for edge in side if edge[0] not in unexpanded}
    edges = [(at[target], at[source]) for source, target in found.ends.tolist()]
    assert sorted(edges) == sorted(expected)
    assert found.not_compared == len({edge for side in weights for edge in side}) - len(expected)
    for number, edge in enumerate(edges):
        np.testing.assert_allclose(found.edges.size[number], [side.get(edge, 0.0) for side in weights], rtol=1e-6)
        in_first, in_second = (edge in side for side in weights)
        status = "shared" if in_first and in_second else "vanishes" if in_first else "appears"
        assert STATUS[found.edges.status[number]] == status


@given(st.data())
def test_nothing_differs_from_itself(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    facts = difference(graph, graph).facts(10)
    assert facts["nodes"] == facts["edges"] == facts["tokens"] == []
    assert facts["differing"] == {"nodes": 0, "edges": 0}
    assert facts["edges_not_compared"] == 0
    for overlap in facts["overlap"].values():
        assert overlap["only_first"] == overlap["only_second"] == 0
        assert overlap["influence_overlap"] == 1.0
        assert overlap["jaccard"] == (1.0 if overlap["shared"] else 0.0)


@given(st.data())
def test_the_difference_the_other_way_round_is_minus_it(draw_circuit, data) -> None:
    first, second = draw_circuit(data), draw_circuit(data)
    there, back = difference(first, second), difference(second, first)
    for one, other in ((there.nodes, back.nodes), (there.edges, back.edges)):
        np.testing.assert_array_equal(one.rows, other.rows[:, ::-1])
        np.testing.assert_array_equal(np.diff(one.size), -np.diff(other.size))
        np.testing.assert_array_equal(np.diff(one.influence), -np.diff(other.influence))
        np.testing.assert_array_equal(one.status, 2 - other.status)
    facts, reversed_facts = there.facts(1000), back.facts(1000)
    for kind, change in (("nodes", "influence_change"), ("edges", "weight_change")):
        forward = [row[change] for row in facts[kind]]
        assert forward == [-row[change] for row in reversed_facts[kind]]
    for kind in ("features", "edges"):
        overlap, other = (found["overlap"][kind] for found in (facts, reversed_facts))
        swapped = {**other, "only_first": other["only_second"], "only_second": other["only_first"]}
        assert overlap == pytest.approx(swapped)


def test_a_counterfactual_by_hand(build_graph) -> None:
    """One feature vanishes, another appears, a third doubles; names are of two lengths, so positions differ."""

    def graph(names: list[str], feature: int, activation: float, output: int) -> CircuitGraph:
        tokens = ["of", *names, "is"]
        end = len(tokens) - 1
        rows = [{"kind": 0, "index": i, "position": i, "label": text} for i, text in enumerate(tokens)]
        rows += [
            {"kind": 3, "layer": 0, "position": end - 1, "index": feature, "activation": 1.0, "expanded": True},
            {"kind": 3, "layer": 1, "position": end, "index": 5, "activation": activation, "expanded": True},
            {"kind": 4, "layer": 3, "position": end, "index": output, "output_weight": 1.0, "expanded": True},
        ]  # fmt: skip
        n_tokens = len(tokens)
        edges = [(n_tokens, n_tokens - 2, 2.0), (n_tokens + 1, n_tokens, activation), (n_tokens + 2, n_tokens + 1, 3.0)]
        return build_graph(rows, edges)

    facts = difference(graph(["New", "York"], 7, 1.0, 1), graph(["Texas"], 8, 2.0, 2)).facts(10)
    # The prompts share `of` and `is`; `York` and `Texas` meet, and `New` has no counterpart.
    assert facts["tokens"] == [{"position": 1, "texts": ["New", None]}, {"position": 2, "texts": ["York", "Texas"]}]
    rows = {tuple(row["names"]): row for row in facts["nodes"]}
    assert {names: row["status"] for names, row in rows.items()} == {
        ("0/7@2", None): "vanishes",
        (None, "0/8@1"): "appears",
        ("1/5@3", "1/5@2"): "shared",
        ("4_1_3", None): "vanishes",
        (None, "4_2_2"): "appears",
    }
    assert rows["1/5@3", "1/5@2"]["activation"] == [1.0, 2.0]
    assert rows["0/7@2", None]["influence"] == [1.0, 0.0]
    assert facts["overlap"]["features"] == {
        "shared": 1, "only_first": 1, "only_second": 1, "jaccard": pytest.approx(1 / 3),
        "influence_overlap": pytest.approx(1 / 3),
    }  # fmt: skip
    token_edge = next(row for row in facts["edges"] if row["target"]["names"] == ["0/7@2", None])
    assert token_edge["source"]["label"] == "York → Texas"
    assert token_edge["weight"] == [2.0, 0.0]
    assert token_edge["weight_change"] == -2.0


def test_edges_into_a_feature_that_was_not_expanded_are_not_compared(build_graph) -> None:
    def graph(expanded: bool) -> CircuitGraph:
        rows = [
            {"kind": 0, "index": 1, "position": 0, "label": "a"},
            {"kind": 3, "layer": 0, "position": 0, "index": 2, "activation": 1.0, "expanded": expanded},
            {"kind": 4, "layer": 3, "position": 0, "index": 3, "output_weight": 1.0, "expanded": True},
        ]
        return build_graph(rows, [(2, 1, 1.0), *([(1, 0, 1.0)] if expanded else [])])

    found = difference(graph(True), graph(False))
    assert found.not_compared == 1
    assert found.edges.status.tolist() == [1]
