"""Pruning against hand-built graphs, networkx and its own promises."""

import dataclasses

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.graph.pruning import prune, within_budget
from circuits.graph.scores import mass_balance

T, P, E, F, L = NodeKind
thresholds = st.floats(0.0, 1.0)


def chain_rows() -> list[dict]:
    return [
        {"kind": T, "index": 1, "label": "a"},
        {"kind": F, "layer": 0, "index": 1, "expanded": True},
        {"kind": F, "layer": 0, "index": 2, "expanded": True},
        {"kind": F, "layer": 1, "index": 1, "expanded": True},
        {"kind": L, "layer": 2, "index": 1, "expanded": True, "output_weight": 1.0},
    ]


def kept_ids(graph, kept) -> set[str]:
    return {name for name, keep in zip(graph.nodes.ids(), kept.nodes, strict=True) if keep}


def test_weak_branch_goes_with_everything_behind_it(build_graph) -> None:
    # 0/1 carries 9/10 of the logit; the branch 0/2 -> 1/1 carries the rest.
    graph = build_graph(chain_rows(), [(1, 0, 1.0), (2, 0, 1.0), (3, 2, 1.0), (4, 1, 9.0), (4, 3, 1.0)])
    assert kept_ids(graph, prune(graph, nodes=0.8, edges=1.0)) == {"E_1_0", "0_1_0", "3_1_0"}
    # 0.9 of the ranked 1.1 holds one of the branch's two equal nodes; alone it leads nowhere.
    assert kept_ids(graph, prune(graph, nodes=0.9, edges=1.0)) == {"E_1_0", "0_1_0", "3_1_0"}
    assert kept_ids(graph, prune(graph, nodes=1.0, edges=1.0)) == set(graph.nodes.ids())


def test_features_that_lost_their_causes_go(build_graph) -> None:
    # 1/1 is caused by the weak feature 0/2 alone: once 0/2 is gone it explains nothing.
    graph = build_graph(
        [
            chain_rows()[0],
            {"kind": E, "layer": 0, "position": 0},
            {"kind": F, "layer": 0, "index": 2, "expanded": True},
            {"kind": F, "layer": 1, "index": 1, "expanded": True},
            {"kind": F, "layer": 1, "index": 9, "expanded": False},
            {"kind": L, "layer": 2, "index": 1, "expanded": True, "output_weight": 1.0},
        ],
        [(2, 0, 1.0), (3, 2, 1e-9), (3, 1, 1e-9), (5, 3, 1.0), (5, 0, 1.0), (5, 4, 1.0)],
        extra_inflow={3: 1.0},
    )
    kept = prune(graph, nodes=0.9, edges=1.0)
    assert kept_ids(graph, kept) == {"E_1_0", "1_9_0", "3_1_0"}  # the unexpanded feature may stay without causes


def test_edges_are_kept_by_influence(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i} for i in range(3)]
    rows.append({"kind": L, "layer": 2, "position": 2, "index": 1, "expanded": True, "output_weight": 1.0})
    graph = build_graph(rows, [(3, 0, 90.0), (3, 1, -9.0), (3, 2, 1.0)])
    assert graph.prune(edges=0.98).edges.weight.tolist() == [90.0, -9.0]
    assert graph.prune(edges=0.85).edges.weight.tolist() == [90.0]
    assert graph.prune(edges=0.0).counts()["tokens"] == 3, "tokens stay even without edges"


def test_feature_targets_stay(build_graph) -> None:
    rows = chain_rows()
    rows[3]["output_weight"], rows[4]["output_weight"] = 0.5, 0.5
    graph = build_graph(rows, [(1, 0, 1.0), (2, 0, 1.0), (3, 2, 1.0), (4, 1, 9.0)])
    assert {"1_1_0", "3_1_0"} <= kept_ids(graph, prune(graph, nodes=0.0, edges=0.0))


@given(st.data())
def test_full_thresholds_drop_only_nodes_without_influence(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    pruned = graph.prune(nodes=1.0, edges=1.0)
    dropped = set(graph.nodes.ids()) - set(pruned.nodes.ids())
    influence = dict(zip(graph.nodes.ids(), graph.influence(), strict=True))
    assert all(influence[name] == 0 for name in dropped)
    assert pruned.scores().replacement == pytest.approx(graph.scores().replacement, abs=1e-12)
    assert pruned.prune(nodes=1.0, edges=1.0) == pruned


@given(st.data(), thresholds, thresholds, thresholds)
def test_raising_the_edge_threshold_only_adds(draw_circuit, data, nodes, low, high) -> None:
    graph = draw_circuit(data)
    low, high = sorted((low, high))
    small, large = prune(graph, nodes=nodes, edges=low), prune(graph, nodes=nodes, edges=high)
    assert (small.nodes <= large.nodes).all()
    assert (small.edges <= large.edges).all()


@given(st.data(), thresholds, thresholds)
def test_raising_the_node_threshold_only_adds(draw_circuit, data, low, high) -> None:
    graph = draw_circuit(data)
    low, high = sorted((low, high))
    small, large = prune(graph, nodes=low, edges=1.0), prune(graph, nodes=high, edges=1.0)
    assert (small.nodes <= large.nodes).all()
    assert (small.edges <= large.edges).all()


@given(st.data(), thresholds, thresholds)
def test_every_kept_node_leads_to_a_target(draw_circuit, data, nodes, edges) -> None:
    full = draw_circuit(data)
    pruned = full.prune(nodes=nodes, edges=edges)
    had_causes = {full.nodes.ids()[row] for row in np.flatnonzero(np.diff(full.edges.indptr))}
    graph = nx.DiGraph(zip(pruned.edges.source.tolist(), pruned.edges.target.tolist(), strict=True))
    graph.add_nodes_from(range(len(pruned.nodes)))
    targets = set(np.flatnonzero(pruned.nodes.is_target).tolist())
    for node in range(len(pruned.nodes)):
        if pruned.nodes.kind[node] in (NodeKind.TOKEN, NodeKind.LOGIT):
            continue
        assert node in targets or targets & nx.descendants(graph, node)
        if pruned.nodes.ids()[node] in had_causes and node not in targets:
            assert graph.in_degree(node) > 0


@pytest.mark.parametrize(("name", "value"), [("nodes", 1.5), ("nodes", -0.1), ("edges", 2.0), ("edges", float("nan"))])
def test_thresholds_are_shares(small, name, value) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected a share of influence between 0 and 1, given {value}"):
        small.prune(**{name: value})


@given(st.data(), thresholds)
def test_dropped_edges_count_as_lost(draw_circuit, to_shares, data, below) -> None:
    graph = draw_circuit(data)
    dropped = graph.drop_edges(below=below)
    ids, left = graph.nodes.ids(), dropped.nodes.ids()
    shares = to_shares(graph)
    large = [(ids[t], ids[s]) for t, s in zip(*np.nonzero(shares > below), strict=True)]
    assert [(left[t], left[s]) for t, s in zip(dropped.edges.target, dropped.edges.source, strict=True)] == large
    always = graph.nodes.expanded | graph.nodes.is_target | graph.nodes.mask(T, L)
    sources = {source for _, source in large}
    assert [name for name, stays in zip(ids, always, strict=True) if stays or name in sources] == list(left)
    assert dropped.scores().replacement <= graph.scores().replacement + 1e-12
    balance = mass_balance(dropped)
    assert sum(dataclasses.astuple(balance)) == pytest.approx(1, abs=1e-9)
    assert dropped.metadata["dropped_below"] == below


def test_dropping_needs_a_share(small) -> None:
    with pytest.raises(ValueError, match=r"below: expected a share of .* between 0 and 1, given 2\.0"):
        small.drop_edges(below=2.0)


budgets = st.integers(1, 12)


@given(st.data(), budgets, budgets)
def test_a_budget_is_kept_and_what_stays_leads_to_a_target(draw_circuit, data, most_nodes, most_edges) -> None:
    full = draw_circuit(data)
    circuit = full.prune(nodes=1.0, edges=1.0, most_nodes=most_nodes, most_edges=most_edges)
    stays = circuit.nodes.mask(T, L) | circuit.nodes.is_target
    assert (~stays).sum() <= most_nodes
    assert len(circuit.edges) <= most_edges
    assert circuit.nodes.output_weight.sum() == pytest.approx(1), "no target is lost"
    assert circuit.nodes.mask(T).sum() == full.nodes.mask(T).sum()
    graph = nx.DiGraph(zip(circuit.edges.source.tolist(), circuit.edges.target.tolist(), strict=True))
    targets = set(np.flatnonzero(circuit.nodes.is_target).tolist())
    for node in np.flatnonzero(~stays).tolist():
        assert targets & nx.descendants(graph, node)
    before = full.prune(nodes=1.0, edges=1.0)
    pruning = circuit.metadata["pruning"]
    assert ("before_budget" in pruning) == (circuit.counts() != before.counts())
    if "before_budget" in pruning:
        assert pruning["before_budget"]["replacement"] == before.scores().replacement
        assert circuit.scores().replacement <= before.scores().replacement + 1e-12


@given(st.data(), budgets, budgets, st.sampled_from(["most_nodes", "most_edges"]))
def test_a_lower_budget_keeps_a_part(draw_circuit, data, low, high, name) -> None:
    graph = draw_circuit(data)
    low, high = sorted((low, high))
    small, large = (within_budget(graph, **{name: most}) for most in (low, high))
    assert (small.nodes <= large.nodes).all()
    assert (small.edges <= large.edges).all()


def test_the_least_influential_branch_goes(build_graph) -> None:
    graph = build_graph(chain_rows(), [(1, 0, 1.0), (2, 0, 1.0), (3, 2, 1.0), (4, 1, 9.0), (4, 3, 1.0)])
    assert kept_ids(graph, within_budget(graph, most_nodes=1)) == {"E_1_0", "0_1_0", "3_1_0"}
    assert kept_ids(graph, within_budget(graph, most_edges=2)) == {"E_1_0", "0_1_0", "3_1_0"}
    assert within_budget(graph).nodes.all()
    with pytest.raises(ValueError, match="most_nodes"):
        graph.prune(most_nodes=-1)
