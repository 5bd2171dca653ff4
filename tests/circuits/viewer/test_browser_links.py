"""Connections of the selected node: sorted by sign and weight, walked by clicks, with heads and attention scores; paths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from random_circuit import random_circuit
from viewer_page import ViewerPage

from circuits import CircuitGraph, NodeKind


def rows(viewer: ViewerPage, side: str) -> list[str]:
    """Ids of the nodes listed on a side, in order."""
    found = viewer.pane("links").locator(f"button.link[data-side={side}]")
    return [str(found.nth(number).get_attribute("data-id")) for number in range(found.count())]


def test_inputs_and_outputs_by_sign_and_weight(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("A2_3_4")
    assert rows(viewer, "inputs") == ["1_5_3", "1_6_3", "E_14_4"], "1.5, 0.5, then the negative -0.25"
    assert rows(viewer, "outputs") == ["3_21_4", "5_2_4"], "2 of 3.6, 0.5 of 2.3"
    first = viewer.pane("links").locator("button.link").first
    assert "+67 %" in first.inner_text()
    assert "+1.5" in first.inner_text()
    viewer.press("i")
    assert rows(viewer, "outputs") == []
    viewer.press("i")
    assert rows(viewer, "inputs") == []


def test_at_first_the_most_influential_features_are_listed(show: Callable[..., ViewerPage]) -> None:
    graph = random_circuit(200, 1500, n_tokens=8)
    viewer = show(graph)
    listed = viewer.page.get_by_role("region", name="Most influential features")
    while listed.locator("[data-action=more]").count():
        listed.locator("[data-action=more]").click()
    features = np.flatnonzero(graph.nodes.kind == NodeKind.FEATURE)
    order = features[np.argsort(-graph.influence()[features], kind="stable")]
    ids = [row.get_attribute("data-id") for row in listed.locator("button.link").all()]
    assert ids == [graph.nodes.ids()[node] for node in order]
    listed.locator("button.link").nth(2).click()
    assert viewer.state["selected"] == ids[2]
    assert listed.count() == 0


def test_every_edge_of_a_crowded_node_is_reached(show: Callable[..., ViewerPage]) -> None:
    graph = random_circuit(1000, 40_000, n_tokens=20)
    into = np.diff(graph.edges.indptr)
    node = int(into.argmax())
    viewer = show(graph)
    viewer.update(selected=graph.nodes.ids()[node])
    weight = graph.edges.weight[graph.edges.into(np.array([node]))]
    source = np.array(graph.nodes.ids(), dtype=object)[graph.edges.source[graph.edges.into(np.array([node]))]]
    order = np.lexsort((-np.abs(weight), weight < 0))
    expected = source[order].tolist()
    assert len(expected) > 60
    inputs = viewer.page.get_by_role("region", name="Inputs")
    while inputs.locator("[data-action=more]").count():
        inputs.locator("[data-action=more]").first.click()
    assert rows(viewer, "inputs") == expected


def test_a_click_walks_and_a_control_click_pins(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("5_1_4")
    links = viewer.pane("links")
    links.locator("[data-id='3_21_4']").first.click()
    links.locator("[data-id='A2_3_4']").first.click()
    links.locator("[data-id='1_5_3']").first.click(modifiers=["Control"])
    assert (viewer.state["selected"], viewer.state["pinned"]) == ("A2_3_4", ["1_5_3"])
    links.locator("[data-action=back]").click()
    assert viewer.state["selected"] == "3_21_4"
    links.locator("[data-action=forward]").click()
    assert viewer.state["selected"] == "A2_3_4"
    links.locator("[data-id='1_6_3']").first.hover()
    assert viewer.state["hovered"] == "1_6_3"


def test_heads_of_an_edge_and_pairs_of_an_attention_score(
    capital: CircuitGraph, show: Callable[..., ViewerPage]
) -> None:
    """Of every edge 0.8 are direct, 0.4 are of head 1.2 and -0.2 of head 0.1."""
    viewer = show(capital)
    viewer.click("A2_3_4")
    heads = viewer.pane("links").locator(".row", has=viewer.page.locator("[data-id='1_5_3']")).locator(".heads").first
    text = heads.locator("summary").inner_text()
    parts = {"direct": 0.8, "L1H2": 0.4, "L0H1": -0.2}
    total = sum(map(abs, parts.values()))
    for name, part in parts.items():
        assert f"{'−' if part < 0 else ''}{name} {100 * abs(part) / total:.0f} %" in text
    scores = viewer.page.get_by_role("region", name="Attention score")
    assert scores.locator("tr").count() == 4
    assert "0.6" in scores.locator("tr").first.inner_text()
    scores.locator("[data-id='0_7_1']").first.click()
    assert viewer.state["selected"] == "0_7_1"


def test_the_strongest_path_between_two_nodes(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("E_13_3")
    viewer.press("w")
    viewer.click("5_1_4")
    viewer.press("w")
    banner = viewer.page.locator("#path")
    steps = [button.get_attribute("data-id") for button in banner.locator("button[data-node]").all()]
    assert steps == ["E_13_3", "0_11_3", "1_5_3", "A2_3_4", "3_21_4", "5_1_4"]
    assert viewer.state["path"] == ["E_13_3", "5_1_4"]
    inflow = [3.5, 2.9, 2.25, 3.6, 3.9]
    share = 0.75 * np.prod(np.array([3.0, 2.0, 1.5, 2.0, 3.0]) / inflow)
    assert f"{100 * share:.0f} %" in banner.inner_text()
    assert "shown" not in viewer.page.locator("#message").get_attribute("class"), "nothing is asked for any more"
    viewer.update(path=["E_13_3", "5_1_4"], labels={"1_5_3": "a long label " * 20})
    assert viewer.pane("links").locator(".body").evaluate("(body) => body.scrollWidth <= body.clientWidth")
    viewer.press("Escape", "Escape")
    assert viewer.state["path"] is None
    viewer.update(path=["E_10_0", "5_1_4"])
    assert "No path" in banner.inner_text(), "nothing reads the first token"


def test_a_path_is_the_best_of_all(show: Callable[..., ViewerPage]) -> None:
    """Against the longest path in logarithms, found by a plain sweep over the rows."""
    graph = random_circuit(200, 1500, n_tokens=8)
    viewer, ids = show(graph), list(graph.nodes.ids())
    share = np.abs(graph.edges.weight) / graph.nodes.inflow[graph.edges.target]
    tokens = np.flatnonzero(graph.nodes.kind == NodeKind.TOKEN)
    target = int(graph.nodes.output_weight.argmax())
    best = np.zeros(len(graph.nodes))
    best[target] = 1.0
    for node in sorted(range(len(graph.nodes)), key=lambda node: -int(graph.nodes.layer[node])):
        row = slice(*graph.edges.indptr[node : node + 2])
        np.maximum.at(best, graph.edges.source[row], best[node] * share[row])
    for token in tokens.tolist():
        viewer.update(path=[ids[token], ids[target]])
        banner = viewer.page.locator("#path")
        if not best[token]:
            assert "No path" in banner.inner_text()
            continue
        nodes = [ids.index(str(step.get_attribute("data-id"))) for step in banner.locator("button[data-node]").all()]
        assert (nodes[0], nodes[-1]) == (token, target)
        ends = list(zip(graph.edges.source.tolist(), graph.edges.target.tolist(), strict=True))
        product = np.prod([share[ends.index(step)] for step in itertools.pairwise(nodes)])
        assert product == pytest.approx(best[token], rel=1e-5)


def test_what_flows_in_adds_up(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """Feature 3/21: 2 + 1 - 0.3 from here and a bias of 0.25; 0.3 of 3.6 of its input was removed."""
    viewer = show(capital)
    viewer.click("3_21_4")
    notes: Any = viewer.page.get_by_role("region", name="Inputs").locator(".notes").inner_text()
    assert "2.95 = 2.7 from here" in notes
    assert "+0.25 bias" in notes
    assert "8.3 %" in notes
