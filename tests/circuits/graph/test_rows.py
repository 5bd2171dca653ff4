"""Nodes and edges as rows: order, names, what terminals and notebooks show, and the way to an intervention."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from circuits import CircuitGraph, NodeKind
from circuits.graph.edge_heads import EdgeHeads
from replacement import Intervention

T, P, E, F, L = NodeKind


@given(st.data())
def test_rows_are_sorted_by_influence_and_complete(draw_circuit, to_shares, data) -> None:
    graph = draw_circuit(data)
    shares = to_shares(graph)
    weight = graph.nodes.output_weight
    mass = weight @ np.linalg.inv(np.eye(len(weight)) - shares)  # p (1 + M + M^2 + ...)
    rows = graph.top_nodes(None)
    assert sorted(row.number for row in rows) == list(range(len(graph.nodes)))
    assert [row.influence for row in rows] == pytest.approx(np.sort(mass)[::-1], abs=1e-12)
    assert all(row.influence == pytest.approx(mass[row.number], abs=1e-12) for row in rows)
    assert [row.id for row in rows] == [graph.nodes.ids()[row.number] for row in rows]
    assert list(graph.features()) == [row for row in rows if row.kind == "feature"]
    edges = graph.top_edges(None)
    assert sorted(row.number for row in edges) == list(range(len(graph.edges)))
    expected = [mass[row.target.number] * shares[row.target.number, row.source.number] for row in edges]
    assert [row.influence for row in edges] == pytest.approx(expected, abs=1e-12)
    assert expected == sorted(expected, reverse=True) or np.allclose(expected, np.sort(expected)[::-1], atol=1e-12)
    for row in rows:
        assert graph.node(row.name) == graph.node(row.id) == graph.node(row.number) == row


def test_a_node_by_any_of_its_names(small) -> None:
    row = small.node("1/3@1")
    assert row == small.node("feature:1/3@1") == small.node("1/3@-1") == small.node("1_3_1") == small.node(5)
    assert (row.kind, row.part, row.layer, row.index, row.position) == ("feature", "mlp", 1, 3, 1)
    assert (row.label, row.activation, row.name) == ("second", 1.0, "1/3@1")
    assert small.node("E_11_0").kind == "token"


def test_features_of_both_parts(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1},
        {"kind": F, "layer": 0, "index": 2, "expanded": True},
        {"kind": F, "layer": 0, "index": 2, "part": 1, "expanded": True, "activation": 2.0},
        {"kind": L, "layer": 1, "index": 3, "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(2, 0, 1.0), (1, 2, 2.0), (3, 1, 1.0)])
    assert graph.node("0/2@0").number == 1
    attention = graph.node("attention:0/2@0")
    assert (attention.number, attention.id) == (2, "A0_2_0")
    assert attention.intervention(add=1.0) == Intervention(layer=0, index=2, position=0, part="attention", add=1.0)


def test_a_row_becomes_an_intervention(small) -> None:
    off = small.node("1/3@1").intervention(scale=0.0)
    assert off == Intervention(layer=1, index=3, position=1, part="mlp", scale=0.0)
    with pytest.raises(ValueError, match=r"only features can be changed, and node 0_-1_1 is of kind error"):
        small.node("0_-1_1").intervention(scale=0.0)
    with pytest.raises(ValueError, match="exactly one of activation, scale and add"):
        small.node("1/3@1").intervention()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1/3@0", r"the graph has no feature 1/3@0; it has that feature at 1"),
        ("9/3@0", r"the graph has no feature 9/3@0$"),
        ("attention:1/3@1", r"the graph has no feature attention:1/3@1$"),
        ("1/3@-9", r"the graph has no feature 1/3@-9; it has that feature at 1"),
        ("2/99999999999999999999@99999999999999", r"the graph has no feature 2/9+@9+$"),
        ("feature:-1/3@7", "expected the name of a feature such as 2/345@7"),
        ("1_3_2", r"the graph has no node '1_3_2'; similar ones: .*1_3_1"),
        ("", "the graph has no node ''"),
        ("x" * 500, r"the graph has no node 'x+…'"),
        (8, r"expected a number in 0..7, given 8"),
        (-1, r"expected a number in 0..7, given -1"),
        (True, "expected a name, an id or a number, given bool"),
    ],
)
def test_unknown_nodes_are_named(small, name, message) -> None:
    with pytest.raises(ValueError, match=message):
        small.node(name)


@pytest.mark.parametrize("count", [0, -3])
def test_counts_below_one_are_named(small, count) -> None:
    for rows in (small.top_nodes, small.top_edges):
        with pytest.raises(ValueError, match=f"expected a count of at least 1, given {count}"):
            rows(count)


def test_tables_hold_text_as_it_is(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "<b>[red]x[/red]</b>"},
        {"kind": L, "layer": 1, "index": 3, "label": "y\x1b[31m", "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(1, 0, 1.0)])
    shown = graph.top_nodes(1)
    assert len(shown) == 1
    html, text = graph.top_nodes()._repr_html_(), repr(graph.top_nodes())
    assert "&lt;b&gt;[red]x[/red]&lt;/b&gt;" in html
    assert "<b>[red]x[/red]</b>" in text
    assert "\x1b" not in html + text
    console = Console(file=io.StringIO(), width=100)
    console.print(graph.top_edges())
    printed = console.file.getvalue()
    assert printed.split()[:6] == ["source", "target", "weight", "influence", "heads", "E_1_0"]
    assert "+1" in printed


def test_heads_are_named_on_edges(small) -> None:
    heads = EdgeHeads.from_dense(np.zeros(len(small.edges)), small.edges.weight[:, None, None])
    row = dataclasses.replace(small, heads=heads).top_edges(1)[0]
    assert row.heads == "L0H0 100 %" or row.heads == "−L0H0 100 %"
    assert small.top_edges(1)[0].heads == ""


def test_long_tables_say_what_is_left_out(build_graph) -> None:
    rows = [{"kind": T, "index": 1}]
    rows += [{"kind": F, "layer": 0, "index": i, "activation": 1.0} for i in range(50)]
    rows += [{"kind": L, "layer": 1, "index": 3, "expanded": True, "output_weight": 1.0}]
    features = build_graph(rows, [(51, i + 1, 1.0 + i) for i in range(50)]).features()
    assert (len(features), features[0].index, len(features[:7]), features[:7][6].index) == (50, 49, 7, 43)
    assert repr(features).splitlines()[-1] == "... and 30 more"
    assert len(repr(features).splitlines()) == 22
    assert "... and 30 more" in features._repr_html_()
    assert features._repr_html_().count("<tr>") == 21


def test_no_repr_dumps_arrays(small) -> None:
    heads = EdgeHeads.from_dense(np.zeros(len(small.edges)), small.edges.weight[:, None, None])
    assert repr(small.nodes) == "NodeTable(8 nodes)"
    assert repr(small.edges) == "Edges(8 edges among 8 nodes)"
    assert repr(heads) == "EdgeHeads(8 heads of 8 edges)"
    assert "array" not in repr(CircuitGraph(small.nodes, small.edges, small.metadata, heads))
