"""Inclusion frequencies against pruning called point by point, and what pictures and files hold of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_circuit import random_circuit

from circuits import CircuitGraph
from circuits.graph.inclusion import EDGES, NODES, classes, inclusion, stored_inclusion
from circuits.graph.pruning import always_kept, prune, pruned_at

thresholds = st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95, 1.0]), min_size=1, max_size=3, unique=True)


def point_by_point(graph: CircuitGraph, nodes: Any, edges: Any) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the masks that `prune` gives at every pair, called for each by itself."""
    kept = [prune(graph, nodes=node, edges=edge) for node in nodes for edge in edges]
    return np.mean([one.nodes for one in kept], axis=0), np.mean([one.edges for one in kept], axis=0)


@given(st.data(), thresholds, thresholds)
def test_frequencies_are_those_of_pruning_at_every_pair(draw_circuit: Any, data: Any, nodes: Any, edges: Any) -> None:
    graph = draw_circuit(data)
    found = inclusion(graph, nodes=nodes, edges=edges)
    expected = point_by_point(graph, nodes, edges)
    np.testing.assert_allclose(found.nodes, expected[0], atol=1e-12)
    np.testing.assert_allclose(found.edges, expected[1], atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(60, 200))
def test_larger_random_circuits_likewise(seed: int, n_nodes: int) -> None:
    graph = random_circuit(n_nodes, 4 * n_nodes, n_tokens=8, n_layers=5, seed=seed)
    found, expected = inclusion(graph), point_by_point(graph, NODES, EDGES)
    np.testing.assert_allclose(found.nodes, expected[0], atol=1e-12)
    np.testing.assert_allclose(found.edges, expected[1], atol=1e-12)
    assert ((found.nodes == 1) >= always_kept(graph.nodes)).all()


@given(st.data(), thresholds, thresholds)
def test_pairs_come_in_falling_order_and_thresholds_in_any(
    draw_circuit: Any, data: Any, nodes: Any, edges: Any
) -> None:
    graph = draw_circuit(data)
    pairs = [(node, edge) for node in sorted(nodes)[::-1] for edge in sorted(edges)[::-1]]
    for (node, edge), kept in zip(pairs, pruned_at(graph, nodes, edges), strict=True):
        alone = prune(graph, nodes=node, edges=edge)
        assert (kept.nodes == alone.nodes).all()
        assert (kept.edges == alone.edges).all()


@given(st.data(), thresholds, st.sampled_from([0.3, 0.8, 1.0]))
def test_generous_thresholds_keep_what_strict_ones_keep(draw_circuit: Any, data: Any, edges: Any, node: float) -> None:
    """Raising thresholds of edges only adds, raising those of nodes likewise where no edge is dropped: so do frequencies."""
    graph = draw_circuit(data)
    strict, generous = (inclusion(graph, nodes=[node], edges=[choose(edges)]) for choose in (min, max))
    between = inclusion(graph, nodes=[node], edges=edges)
    for name in ("nodes", "edges"):
        assert (getattr(strict, name) <= getattr(between, name)).all()
        assert (getattr(between, name) <= getattr(generous, name)).all()
    few, many = (inclusion(graph, nodes=grid, edges=[1.0]) for grid in ([0.1, node], [node, 0.99]))
    if node < 0.99:
        assert (few.nodes <= many.nodes).all()
        assert (few.edges <= many.edges).all()


def test_by_hand(build_graph: Any) -> None:
    """A strong feature that is always kept, a weaker one that half of the thresholds keep, and one that none does."""
    feature, token = {"kind": 3, "layer": 0, "expanded": True}, {"kind": 0, "index": 1}
    logit = {"kind": 4, "layer": 2, "index": 1, "expanded": True, "output_weight": 1.0}
    rows = [token, *({**feature, "index": index} for index in range(3)), logit]
    graph = build_graph(rows, [(1, 0, 1), (2, 0, 1), (3, 0, 1), (4, 1, 80), (4, 2, 15), (4, 3, 5)])
    found = inclusion(graph, nodes=[0.5, 0.9], edges=[1.0])
    assert found.nodes.tolist() == [1, 1, 0.5, 0, 1]
    assert found.edges.tolist() == [1, 0.5, 0, 1, 0.5, 0]
    assert classes(found.nodes).tolist() == [0, 0, 1, 2, 0]
    assert classes(np.array([0.2, 0.21, 0.99])).tolist() == [2, 1, 1]
    noted = graph.with_inclusion(nodes=[0.5, 0.9], edges=[1.0])
    assert noted.metadata["inclusion"] == {"nodes": [0.5, 0.9], "edges": [1.0], "frequency": {"0_0_0": 1, "0_1_0": 0.5}}
    assert stored_inclusion(graph) is None


def test_another_order_of_features_changes_nothing() -> None:
    """Features of a layer change their numbers: each keeps its frequency."""
    graph = random_circuit(150, 900, n_tokens=6, n_layers=4, seed=3)
    nodes, edges = graph.nodes, graph.edges
    other_index = np.where(nodes.kind == 3, 1_000_000 - nodes.index, nodes.index)
    order = np.lexsort((other_index, nodes.position, nodes.layer, nodes.kind))
    logits = np.flatnonzero(nodes.kind == 4)
    order = np.concatenate([order[~np.isin(order, logits)], logits])
    place = np.argsort(order)  # new row of every old one
    columns = {name: getattr(nodes, name)[order] for name in ("kind", "part", "layer", "position", "output_weight")}
    columns |= {name: getattr(nodes, name)[order] for name in ("activation", "expanded", "value", "bias", "inflow")}
    moved = CircuitGraph(
        type(nodes).build(**columns, index=other_index[order]),
        type(edges).from_coo(place[edges.target], place[edges.source], edges.weight, n_nodes=len(nodes)),
        graph.metadata,
    )
    assert (order != np.arange(len(nodes))).sum() > 50
    np.testing.assert_array_equal(inclusion(moved).nodes[place], inclusion(graph).nodes)
    number = {pair: edge for edge, pair in enumerate(zip(moved.edges.target, moved.edges.source, strict=True))}
    same = [number[place[t], place[s]] for t, s in zip(edges.target, edges.source, strict=True)]
    np.testing.assert_array_equal(inclusion(moved).edges[same], inclusion(graph).edges)


def test_files_and_pruned_circuits_keep_the_note(tmp_path: Path) -> None:
    graph = random_circuit(150, 900, n_tokens=6, n_layers=4, seed=3).with_inclusion()
    np.testing.assert_array_equal(stored_inclusion(graph), inclusion(graph).nodes)
    circuit = CircuitGraph.load(graph.prune().save(tmp_path / "circuit.safetensors"))
    frequency = dict(zip(graph.nodes.ids(), inclusion(graph).nodes, strict=True))
    found = stored_inclusion(circuit)
    assert found is not None
    assert found.tolist() == [frequency[name] for name in circuit.nodes.ids()]
    assert 0 < (found < 1).sum() < len(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": []}, "nodes: expected thresholds that differ, at least one, given []"),
        ({"edges": [0.9, 0.9]}, "edges: expected thresholds that differ, at least one, given [0.9, 0.9]"),
        ({"nodes": [0.5, 1.1]}, "nodes: expected a share of influence between 0 and 1, given 1.1"),
        ({"edges": [-0.1]}, "edges: expected a share of influence between 0 and 1, given -0.1"),
    ],
)
def test_thresholds_are_shares(small: CircuitGraph, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small.with_inclusion(**options)


@pytest.mark.parametrize(
    "noted",
    [
        [],
        {"frequency": {"0_7_0": 0.5}},
        {"nodes": [0.5], "edges": [2.0], "frequency": {}},
        {"nodes": [0.5], "edges": [0.9], "frequency": {"0_7_0": 1.5}},
        {"nodes": [0.5], "edges": [0.9], "frequency": {"0_7_0": "often"}},
    ],
)
def test_a_foreign_note_is_refused(small: CircuitGraph, noted: Any) -> None:
    with pytest.raises(ValueError, match="expected inclusion to be an object with lists of shares nodes and edges"):
        CircuitGraph(small.nodes, small.edges, {**small.metadata, "inclusion": noted})
