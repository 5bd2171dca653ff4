"""Scores against dense matrices, and conservation of mass."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.graph.scores import mass_balance

thresholds = st.floats(0.0, 1.0)


@given(st.data(), thresholds, thresholds)
def test_all_mass_ends_somewhere(draw_circuit, data, nodes, edges) -> None:
    graph = draw_circuit(data)
    for part in (graph, graph.prune(nodes=nodes, edges=edges)):
        balance = mass_balance(part)
        total = balance.inputs + balance.errors + balance.unexpanded + balance.lost
        assert total == pytest.approx(1.0, abs=1e-12)
        assert min(balance.inputs, balance.errors, balance.unexpanded, balance.lost) >= -1e-12


@given(st.data(), thresholds, thresholds)
def test_pruning_never_raises_the_replacement_score(draw_circuit, data, nodes, edges) -> None:
    graph = draw_circuit(data)
    full, pruned = graph.scores(), graph.prune(nodes=nodes, edges=edges).scores()
    assert pruned.replacement <= full.replacement + 1e-12
    for score in (full.replacement, full.completeness, pruned.replacement, pruned.completeness):
        assert -1e-12 <= score <= 1 + 1e-12


@given(st.data())
def test_scores_equal_those_of_an_explicit_error_node(draw_circuit, to_shares, data) -> None:
    """Published scores of the graph with one more error node that receives all the lost mass are the same."""
    graph = draw_circuit(data)
    nodes, n = graph.nodes, len(graph.nodes)
    shares = np.zeros((n + 1, n + 1))
    shares[:n, :n] = to_shares(graph)
    shares[:n, n] = np.where(nodes.expanded, 1 - shares[:n, :n].sum(axis=1), 0)
    weight = np.append(nodes.output_weight, 0)
    influence = weight @ (np.linalg.inv(np.eye(n + 1) - shares) - np.eye(n + 1))
    is_error = np.append(nodes.mask(NodeKind.ERROR) | nodes.unexpanded, True)
    is_input = np.append(nodes.mask(NodeKind.TOKEN, NodeKind.POSITION), False)
    through = influence + weight
    assert graph.scores().replacement == pytest.approx(
        through[is_input].sum() / through[is_input | is_error].sum(), abs=1e-12
    )
    if not (nodes.unexpanded & nodes.is_target).any():
        complete = (1 - shares[:, is_error].sum(axis=1)) * through
        assert graph.scores().completeness == pytest.approx(complete.sum() / through.sum(), abs=1e-12)


def test_removing_an_error_node_changes_neither_score(small) -> None:
    mask = small.nodes.kind != NodeKind.ERROR
    edges = small.edges.select(mask, np.ones(len(small.edges), dtype=bool))
    without = type(small)(small.nodes.select(mask), edges, small.metadata)
    assert without.scores().replacement == pytest.approx(small.scores().replacement, abs=1e-12)
    assert without.scores().completeness == pytest.approx(small.scores().completeness, abs=1e-12)


def test_small_graph_by_hand(small) -> None:
    second = 0.75 * 0.75 + 0.25 * 0.5
    inputs, error = second / 4 + 0.75 / 4 + 0.25 / 4, second / 4 + 0.25 / 4
    assert small.scores().replacement == pytest.approx(inputs)  # the rest is error or not expanded
    total = 1 + second + second / 2 + inputs + error
    incomplete = second / 4 + 0.25 / 4 + second / 2  # from the error node, and all of the unexpanded feature
    assert small.scores().completeness == pytest.approx((total - incomplete) / total)
    balance = mass_balance(small)
    assert (balance.errors, balance.unexpanded) == (pytest.approx(error), pytest.approx(second / 2))


def test_without_errors_everything_is_explained(build_graph) -> None:
    rows = [
        {"kind": NodeKind.TOKEN, "index": 3},
        {"kind": NodeKind.LOGIT, "layer": 1, "index": 3, "expanded": True, "output_weight": 1.0},
    ]
    explained = build_graph(rows, [(1, 0, -2.0)]).scores()
    assert (explained.replacement, explained.completeness) == (1.0, 1.0)


def test_an_unexpanded_target_explains_nothing(build_graph) -> None:
    rows = [
        {"kind": NodeKind.TOKEN, "index": 3},
        {"kind": NodeKind.FEATURE, "layer": 1, "index": 3, "output_weight": 1.0},
    ]
    nothing = build_graph(rows, []).scores()
    assert (nothing.replacement, nothing.completeness) == (0.0, 0.0)
