"""The mean graph against means of dense matrices; what copies, order of files and merged outputs do."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph
from circuits.explain.consensus import Consensus, consensus
from circuits.explain.mean_graph import GraphSums
from circuits.graph.alignment import Alignment, prompt_tokens
from circuits.graph.graph_files import GraphFiles
from circuits.graph.metadata import check_traced_here
from circuits.graph.nodes import NodeKind

Save = Callable[..., GraphFiles]


def mean_of(graphs: list[CircuitGraph], *, merges_outputs: bool = False) -> Consensus:
    """The consensus of graphs in memory."""
    alignment = Alignment.of([prompt_tokens(graph.metadata) for graph in graphs])
    sums = GraphSums(alignment, merges_outputs=merges_outputs)
    for graph in graphs:
        sums.add(graph)
    return Consensus(len(graphs), alignment, merges_outputs, *sums.mean())


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes graphs into a folder, and gives their files in some order."""

    def write(*graphs: CircuitGraph, order: list[int] | None = None) -> GraphFiles:
        paths = [graph.save(tmp_path / f"{number}.safetensors") for number, graph in enumerate(graphs)]
        return GraphFiles.of(paths if order is None else [paths[number] for number in order])

    return write


@given(st.data(), st.integers(1, 5))
def test_the_consensus_of_copies_is_the_graph(draw_circuit, data, n_copies) -> None:
    graph = draw_circuit(data)
    found = mean_of([graph] * n_copies)
    assert found.graph.nodes == graph.nodes
    assert found.graph.edges == graph.edges
    assert found.graph.metadata["tokens"] == graph.metadata["tokens"]
    assert found.circuit(1.0).nodes == graph.nodes
    np.testing.assert_array_equal(found.nodes.squares, 0.0)
    np.testing.assert_array_equal(found.edges.squares, 0.0)
    assert set(found.node_frequency) == {1.0}


@given(st.data(), st.booleans())
def test_the_mean_graph_is_the_mean_of_dense_matrices(draw_circuit, to_dense, data, merges_outputs) -> None:
    graphs = [draw_circuit(data) for _ in range(3)]
    found = mean_of(graphs, merges_outputs=merges_outputs)
    alignment, nodes = found.alignment, found.graph.nodes

    def places(graph: CircuitGraph) -> list[tuple[int, ...]]:
        table, positions = graph.nodes, alignment.positions(len(graph.metadata["tokens"])).tolist()
        rows = zip(
            table.kind.tolist(), table.layer.tolist(), table.position.tolist(), table.index.tolist(), strict=True
        )
        return [
            (kind,) if kind == NodeKind.LOGIT and merges_outputs
            else (kind, layer, positions[position], -1 if kind == NodeKind.TOKEN else index)
            for kind, layer, position, index in rows
        ]  # fmt: skip

    union = sorted({place for graph in graphs for place in places(graph)})
    number = {place: row for row, place in enumerate(union)}
    matrix, counts = np.zeros((len(union), len(union))), np.zeros((len(union), len(union)))
    sums = {name: np.zeros(len(union)) for name in ("value", "bias", "output_weight")}
    for graph in graphs:
        rows = np.array([number[place] for place in places(graph)])
        onto = np.zeros((len(union), len(rows)))  # which rows of the graph make a row of the mean, with which weight
        output_weight, outputs = graph.nodes.output_weight, graph.nodes.mask(NodeKind.LOGIT)
        weight = np.where(outputs & merges_outputs, output_weight / max(output_weight[outputs].sum(), 1e-300), 1.0)
        onto[rows, np.arange(len(rows))] = weight
        here = onto @ to_dense(graph) @ (onto > 0).T
        matrix += here / 3
        counts += here != 0
        for name, power in (("value", weight), ("bias", weight), ("output_weight", 1.0)):
            np.add.at(sums[name], rows, getattr(graph.nodes, name) * power / 3)

    own = [
        (kind,) if kind == NodeKind.LOGIT and merges_outputs
        else (kind, layer, position, -1 if kind == NodeKind.TOKEN else index)
        for kind, layer, position, index in zip(
            nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist(), strict=True
        )
    ]  # fmt: skip
    assert sorted(own) == union
    order = [number[place] for place in own]
    np.testing.assert_allclose(to_dense(found.graph), matrix[np.ix_(order, order)], atol=1e-6)
    for name, expected in sums.items():
        np.testing.assert_allclose(getattr(nodes, name), expected[order], atol=1e-12)
    frequency = np.zeros_like(matrix)
    frequency[found.graph.edges.target, found.graph.edges.source] = found.edge_frequency
    np.testing.assert_allclose(frequency, counts[np.ix_(order, order)] / 3)


@given(st.data())
def test_the_identity_holds_in_the_mean_and_shares_stay_shares(draw_circuit, data) -> None:
    """Value = sum of edges + bias holds in every drawn graph; opposite signs and unexpanded rows only add lost mass."""
    graphs = [draw_circuit(data) for _ in range(3)]
    found = mean_of(graphs).graph
    total = found.edges.row_sums(lambda block: block.weight)
    np.testing.assert_allclose(found.nodes.value, total + found.nodes.bias, atol=1e-5)
    assert found.scores().replacement <= 1 + 1e-9
    assert found.nodes.output_weight.sum() == pytest.approx(1.0)


def test_spread_and_frequency_by_hand(build_graph) -> None:
    def graph(activation: float, weight: float, *, has_feature: bool = True) -> CircuitGraph:
        rows = [
            {"kind": 0, "index": 1, "position": 0, "label": "a"},
            {"kind": 3, "layer": 0, "position": 0, "index": 2, "activation": activation, "expanded": True},
            {"kind": 4, "layer": 3, "position": 0, "index": 3, "output_weight": 1.0, "expanded": True},
        ]
        if not has_feature:
            return build_graph([rows[0], rows[2]], [(1, 0, 1.0)])
        return build_graph(rows, [(1, 0, 1.0), (2, 1, weight)])

    found = mean_of([graph(1.0, 2.0), graph(3.0, -4.0), graph(0.0, 0.0, has_feature=False)])
    [feature], facts = found.facts(most=5)["features"], found.facts(most=5)
    assert feature["frequency"] == pytest.approx(2 / 3)
    assert (feature["activation"], feature["activation_spread"]) == (2.0, 1.0)
    assert (feature["influence"], feature["influence_spread"]) == (1.0, 0.0)
    assert feature["influence_of_all"] == pytest.approx(2 / 3)
    into_output = next(edge for edge in facts["edges"] if edge["source"]["name"] == "0/2@0")
    assert (into_output["weight"], into_output["weight_spread"]) == (-1.0, 3.0)
    assert facts["counts"]["features"] == {"any": 1, "circuit": 1, "all": 0, "one": 0}
    # Of the mean edge -2/3 the inflow (2 + 4 + 1) / 3 remembers what cancelled.
    assert found.graph.nodes.inflow[2] == pytest.approx(7 / 3)
    assert found.graph.edges.weight[found.graph.edges.target == 2].tolist() == pytest.approx([1 / 3, -2 / 3])


def test_causes_that_were_not_computed_count_as_lost(build_graph) -> None:
    def graph(expanded: bool) -> CircuitGraph:
        rows = [
            {"kind": 0, "index": 1, "position": 0, "label": "a"},
            {"kind": 3, "layer": 0, "position": 0, "index": 2, "activation": 1.0, "expanded": expanded},
            {"kind": 4, "layer": 3, "position": 0, "index": 3, "output_weight": 1.0, "expanded": True},
        ]
        return build_graph(rows, [(2, 1, 1.0), *([(1, 0, 4.0)] if expanded else [])])

    found = mean_of([graph(True), graph(False)]).graph
    assert found.nodes.inflow[1] == 4.0  # of the prompt in which it is known
    assert found.edges.weight[found.edges.target == 1].tolist() == [2.0]
    assert found.scores().replacement == pytest.approx(0.5)


def test_the_order_of_files_means_nothing(small, build_graph, save) -> None:
    rows = [
        {"kind": 0, "index": 11, "position": 0, "label": "a"},
        {"kind": 0, "index": 13, "position": 1, "label": "c"},
        {
            "kind": 3,
            "layer": 1,
            "position": 1,
            "index": 3,
            "activation": 4.0,
            "label": "named otherwise",
            "expanded": True,
        },
        {"kind": 4, "layer": 3, "position": 1, "index": 9, "label": " z", "output_weight": 1.0, "expanded": True},
    ]
    other = build_graph(
        rows, [(2, 1, 1.0), (3, 2, 2.0)], token_ids=[11, 13], model="toy", targets=[{"token": " z", "position": 1}]
    )
    there, back = consensus(save(small, other, small)), consensus(save(small, other, small, order=[1, 2, 0]))
    assert there.merges_outputs
    assert there.graph.nodes.label == back.graph.nodes.label
    assert there.graph.nodes.label[-1] == "␣x, ␣y … (3)"
    assert there.graph.nodes.label[-2] == "second"  # as two of the three call the feature
    assert there.graph.metadata["tokens"] == ["a", "b, c (2)"]
    assert there.graph.nodes.ids() == back.graph.nodes.ids()
    np.testing.assert_allclose(there.graph.edges.weight, back.graph.edges.weight, rtol=1e-6)
    assert json.dumps(there.facts()["counts"]) == json.dumps(back.facts()["counts"])


def test_a_circuit_keeps_what_is_frequent_and_is_saved_shown_and_refused_by_what_asks_the_model(
    small, save, tmp_path
) -> None:
    keep = np.ones(len(small.nodes), dtype=bool)
    keep[4] = False  # the first feature
    without = small.select(keep, np.ones(len(small.edges), dtype=bool))
    found = consensus(save(small, small, without))
    assert found.circuit(2 / 3).counts()["features"] == 2
    circuit = found.circuit(0.9)
    assert circuit.counts()["features"] == 1
    assert circuit.nodes.inflow.sum() == pytest.approx(small.nodes.inflow.sum())
    assert circuit.metadata["consensus"]["prompts"] == 3
    assert circuit.metadata["consensus"]["nodes"]["1_3_1"]["frequency"] == 1.0
    assert CircuitGraph.load(circuit.save(tmp_path / "circuit.safetensors")) == circuit
    assert circuit.to_svg().startswith("<svg")
    with pytest.raises(ValueError, match="expected the graph of one prompt, given the consensus of 3"):
        check_traced_here(circuit.metadata)
    with pytest.raises(ValueError, match="frequency"):
        found.circuit(1.5)
