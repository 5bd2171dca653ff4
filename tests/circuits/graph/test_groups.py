"""The graph among groups: sums that add up, heads, storage in the metadata, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.group_names import distinct_names
from circuits.graph.groups import Group, Grouping

T, P, E, F, L = NodeKind
KIND = {T: "tokens", P: "tokens", E: "errors", F: "features", L: "outputs"}


def random_grouping(graph: CircuitGraph, seed: int) -> Grouping:
    """Every node in one of three groups of its kind."""
    parts: dict[tuple[str, int], list[int]] = {}
    for node, number in enumerate(np.random.default_rng(seed).integers(3, size=len(graph.nodes)).tolist()):
        parts.setdefault((KIND[NodeKind(int(graph.nodes.kind[node]))], number), []).append(node)
    return Grouping(graph, tuple(Group(f"{k}{n}", tuple(members), k) for (k, n), members in parts.items()))


@given(st.data(), st.integers(0, 2**32 - 1))
def test_what_flows_between_groups_is_summed_over_their_members(draw_circuit, to_dense, to_shares, data, seed) -> None:
    graph = draw_circuit(data)
    shares, p = to_shares(graph), graph.nodes.output_weight
    mass = p @ np.linalg.inv(np.eye(len(p)) - shares)  # p (1 + M + M^2 + ...)
    flow, sign = mass[:, None] * shares, np.sign(to_dense(graph))
    grouping = random_grouping(graph, seed)
    member = np.array([[node in group.members for node in range(len(p))] for group in grouping.groups], dtype=float)
    total, signed = member @ flow @ member.T, member @ (flow * sign) @ member.T
    edges = grouping.edges()
    for edge in edges:
        assert edge.influence == pytest.approx(total[edge.target, edge.source], abs=1e-9)
        assert edge.weight == pytest.approx(signed[edge.target, edge.source], abs=1e-9)
        assert edge.source != edge.target
        assert edge.heads == ""
    assert grouping.internal() == pytest.approx(np.diag(total), abs=1e-9)
    assert sum(edge.influence for edge in edges) + grouping.internal().sum() == pytest.approx(flow.sum(), abs=1e-9)
    assert len({(edge.source, edge.target) for edge in edges}) == len(edges)
    assert [edge.influence for edge in edges] == sorted((edge.influence for edge in edges), reverse=True)


@given(st.data(), st.integers(0, 2**32 - 1))
def test_parts_of_a_weight_are_those_of_its_edges(draw_circuit, data, seed) -> None:
    graph, random = draw_circuit(data), np.random.default_rng(seed)
    heads = random.normal(size=(len(graph.edges), 2, 3)).astype(np.float32)
    direct = graph.edges.weight - heads.sum((1, 2))
    graph = replace(graph, heads=EdgeHeads.from_dense(direct, heads, listed=1.0))
    grouping = random_grouping(graph, seed)
    influence = {edge.number: edge.influence for edge in graph.top_edges(None)} if len(graph.edges) else {}
    for edge in grouping.edges():
        expected, group_of = np.zeros((2, 3)), grouping.group_of
        for number in range(len(graph.edges)):
            ends = group_of[graph.edges.source[number]], group_of[graph.edges.target[number]]
            if ends == (edge.source, edge.target):
                expected += heads[number] * influence[number] / abs(graph.edges.weight[number])
        assert edge.parts is not None
        named = {(layer, head): weight for layer, head, weight in edge.parts.heads}
        assert named == pytest.approx({place: expected[place] for place in named}, rel=1e-4, abs=1e-5)
        together = edge.parts.direct + edge.parts.rest + sum(named.values())
        assert together == pytest.approx(edge.weight, rel=1e-4, abs=1e-4)


def test_groups_are_stored_and_read(small, tmp_path) -> None:
    grouping = small.group()
    graph = small.with_groups(grouping)
    graph.save(tmp_path / "graph.safetensors")
    loaded = CircuitGraph.load(tmp_path / "graph.safetensors")
    assert Grouping.of(loaded).groups == grouping.groups
    assert loaded.metadata["groups"][0] == {"name": "a", "members": ["E_11_0"], "f1": None}
    assert Grouping.of(small.with_groups(Grouping.of(loaded))).groups == grouping.groups


def test_a_part_of_a_graph_keeps_the_groups_that_are_left(small) -> None:
    graph = small.with_groups(small.group())
    part = graph.select(~graph.nodes.mask(E), np.ones(len(graph.edges), dtype=bool))
    assert [group.name for group in Grouping.of(part).groups] == ["a", "b", "first", "second", "x", "y"]


def test_nodes_that_no_stored_group_lists_stand_alone(small) -> None:
    facts = {**small.metadata, "groups": [{"name": "both", "members": ["1_3_1", "0_7_0"]}]}
    groups = Grouping.of(replace(small, metadata=facts)).groups
    assert groups[0] == Group("both", (4, 5), "features")
    assert Group("P_1", (2,), "tokens") in groups
    assert len(groups) == 7


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["1_3_1", "9_9_9"], "group 'x': expected ids of nodes of the graph, given '9_9_9'"),
        (["1_3_1", "1_3_1"], "group 'x': expected ascending numbers of nodes in 0..7, given"),
        (["1_3_1", "E_11_0"], "group 'x': expected nodes for a group of tokens, given 1_3_1 of features"),
    ],
)
def test_stored_groups_that_do_not_fit(small, members, message) -> None:
    graph = replace(small, metadata={**small.metadata, "groups": [{"name": "x", "members": members}]})
    with pytest.raises(ValueError, match=message):
        Grouping.of(graph)


@pytest.mark.parametrize(
    "groups", [{}, [{}], [{"name": "x", "members": []}], [{"name": "x", "members": ["a"], "f1": 2.0}], [{"name": 1}]]
)
def test_stored_groups_of_another_form(small, groups) -> None:
    with pytest.raises(ValueError, match="expected groups to be a list of objects with a name, ids of members"):
        replace(small, metadata={**small.metadata, "groups": groups})


def test_a_node_in_two_groups_or_in_none(small) -> None:
    first = tuple(Group(str(node), (node,), KIND[NodeKind(int(small.nodes.kind[node]))]) for node in range(7))
    with pytest.raises(ValueError, match="expected every node in exactly one group, given 4_6_1 in 0"):
        Grouping(small, first)
    with pytest.raises(ValueError, match="expected every node in exactly one group, given 4_5_1 in 2"):
        Grouping(small, (*first, Group("outputs", (6, 7), "outputs")))
    with pytest.raises(ValueError, match="expected a graph with groups, given one without"):
        Grouping.of(small)


def test_groups_of_another_graph(small, build_graph) -> None:
    rows = [
        {"kind": T, "index": 1},
        {"kind": L, "layer": 1, "index": 3, "expanded": True, "output_weight": 1.0},
    ]
    with pytest.raises(ValueError, match="expected a grouping of this graph's nodes"):
        small.with_groups(build_graph(rows, [(1, 0, 1.0)]).group())


def test_distinct_names() -> None:
    assert distinct_names(["a", "b", "a"], [["@1", "(x)"]] * 3) == ["a @1 (x)", "b", "a @1 (x)"]
    assert distinct_names(["a", "b", "a"], [["@1", "(x)"], ["@1"], ["@2"]]) == ["a @1", "b", "a @2"]
