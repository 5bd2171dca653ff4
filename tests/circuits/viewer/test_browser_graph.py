"""The graph pane under the mouse: hover, selection, pins, what is drawn of a node's links, and what is hidden."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from random_circuit import random_circuit
from viewer_page import ViewerPage

from circuits import CircuitGraph, NodeKind

LINKS = """() => {
  const {data, panes} = crosstrace, {links} = panes.graph.view().scene;
  return links && links.edges.map((edge) => [data.nodes.id[data.edges.source[edge]], data.nodes.id[data.edges.target[edge]]]);
}"""
SHARES = """() => Object.fromEntries(
  [...crosstrace.panes.graph.view().scene.links.shares].map(([node, share]) => [crosstrace.data.nodes.id[node], share]))"""


def test_nodes_stand_at_their_token_and_layer(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    places = {node: viewer.place(node) for node in capital.nodes.ids()}
    x, y = (np.array([place[axis] for place in places.values()]) for axis in (0, 1))
    nodes = capital.nodes
    height = np.where(nodes.layer < 0, 0, 2 * nodes.layer + np.where(nodes.of_attention, 1, 2))
    for one, other in zip(*np.triu_indices(len(nodes), 1), strict=True):
        if nodes.position[one] != nodes.position[other]:
            assert (x[one] < x[other]) == (nodes.position[one] < nodes.position[other])
        if height[one] != height[other]:
            assert (y[one] > y[other]) == (height[one] < height[other])
        assert abs(x[one] - x[other]) + abs(y[one] - y[other]) > 8, "no node covers another"


def test_hovering_names_a_node_and_leaves_the_selection(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.hover("1_5_3")
    assert (viewer.state["hovered"], viewer.state["selected"]) == ("1_5_3", None)
    tip = viewer.pane("graph").locator(".tip")
    assert tip.is_visible()
    assert "Texas" in tip.inner_text()
    viewer.page.mouse.move(5, 5)
    assert viewer.state["hovered"] is None
    assert not tip.is_visible()


def test_a_click_selects_and_escape_clears(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("1_5_3")
    assert viewer.state["selected"] == "1_5_3"
    viewer.click("3_21_4")
    assert viewer.state["selected"] == "3_21_4"
    viewer.press("Escape")
    assert viewer.state["selected"] is None
    viewer.click("1_5_3")
    x, y = viewer.place("E_10_0")
    viewer.page.mouse.click(x, y - 60)  # nothing is above the first token
    assert viewer.state["selected"] in (None, "1_5_3"), "a click beside all nodes selects none"


@pytest.mark.parametrize(
    ("direction", "neighbours"),
    [("both", {"1_5_3", "1_6_3", "E_14_4", "3_21_4", "5_2_4"}), ("inputs", {"1_5_3", "1_6_3", "E_14_4"}),
     ("outputs", {"3_21_4", "5_2_4"})],
)  # fmt: skip
def test_the_links_of_the_selected_node(
    capital: CircuitGraph, show: Callable[..., ViewerPage], direction: str, neighbours: set[str]
) -> None:
    viewer = show(capital)
    viewer.click("A2_3_4")
    name = direction.capitalize()
    viewer.page.get_by_role("group", name="Links shown").get_by_text(name).click()
    viewer.settle()
    links = viewer.page.evaluate(LINKS)
    assert {node for link in links for node in link} == neighbours | {"A2_3_4"}


def test_only_the_strongest_links_are_drawn_and_shares_are_signed(
    capital: CircuitGraph, show: Callable[..., ViewerPage]
) -> None:
    """Inputs of node A2_3_4 are 1.5, 0.5 and -0.25 of 2.25; outputs are 2 of 3.6 and 0.5 of 2.3."""
    viewer = show(capital)
    viewer.click("A2_3_4")
    expected = {"1_5_3": 1.5 / 2.25, "1_6_3": 0.5 / 2.25, "E_14_4": -0.25 / 2.25, "3_21_4": 2 / 3.6, "5_2_4": 0.5 / 2.3}
    assert viewer.page.evaluate(SHARES) == pytest.approx(expected, abs=1e-6)
    viewer.page.locator("#top-links").fill("1")
    viewer.page.locator("#top-links").press("Enter")
    viewer.settle()
    assert set(viewer.page.evaluate(SHARES)) == {"1_5_3", "3_21_4"}


def test_control_click_and_key_pin(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("1_5_3", control=True)
    assert (viewer.state["pinned"], viewer.state["selected"]) == (["1_5_3"], None)
    viewer.hover("3_21_4")
    viewer.press("p")
    assert viewer.state["pinned"] == ["1_5_3", "3_21_4"]
    viewer.click("1_5_3", control=True)
    assert viewer.state["pinned"] == ["3_21_4"]


def test_what_the_slider_hides_is_counted_as_python_does(show: Callable[..., ViewerPage]) -> None:
    """Pinned nodes, tokens and logits stay; the number of hidden nodes and their share of the influence are in sight."""
    graph = random_circuit(400, 4000)
    viewer = show(graph)
    said, slider = viewer.page.locator("#hidden"), viewer.page.locator("#min-influence")
    influence, kind = graph.influence(), graph.nodes.kind
    pinned = int(np.flatnonzero(kind == NodeKind.FEATURE)[influence[kind == NodeKind.FEATURE].argmin()])
    viewer.update(pinned=[graph.nodes.ids()[pinned]])
    seen = set()
    for step in (0, 60, 120, 160, 200):
        slider.fill(str(step))
        viewer.settle()
        least = viewer.state["minInfluence"]
        stays = np.isin(kind, (NodeKind.TOKEN, NodeKind.LOGIT)) | (np.arange(len(kind)) == pinned)
        hidden = ~stays & (influence < least)
        shown = viewer.page.evaluate("() => [...crosstrace.panes.graph.view().visible.shown]")
        np.testing.assert_array_equal(np.array(shown, dtype=bool), ~hidden)
        seen.add(int(hidden.sum()))
        if not hidden.any():
            assert said.inner_text() == "all 400 nodes shown"
            continue
        count, share = said.inner_text().split(" of 400 nodes hidden: ")
        assert int(count) == hidden.sum()
        percent = 100 * influence[hidden].sum() / influence.sum()
        assert float(share.split(" %")[0]) == pytest.approx(percent, rel=0.06, abs=6e-4), "two digits and more"
    assert len(seen) > 3


def test_a_large_graph_says_at_once_what_it_hides(show: Callable[..., ViewerPage]) -> None:
    viewer = show(random_circuit(1000, 5000))
    shown = viewer.page.evaluate(
        "() => crosstrace.panes.graph.view().visible.shown.reduce((total, one) => total + one, 0)"
    )
    assert 0 < shown < 400
    assert viewer.page.locator("#hidden").inner_text().startswith(f"{1000 - shown} of 1,000 nodes hidden")


def test_wheel_zooms_about_the_pointer_and_drag_moves(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    x, y = viewer.place("1_5_3")
    other = viewer.place("E_11_1")
    viewer.page.mouse.move(x, y)
    viewer.page.mouse.wheel(0, -300)
    viewer.page.wait_for_timeout(200)
    assert viewer.place("1_5_3") == pytest.approx((x, y), abs=1.0), "the point under the pointer stays"
    assert abs(viewer.place("E_11_1")[0] - x) > abs(other[0] - x) + 20
    before = viewer.place("0_11_3")
    viewer.page.mouse.move(x + 40, y)
    viewer.page.mouse.down()
    viewer.page.mouse.move(x + 100, y + 30, steps=4)
    viewer.page.mouse.up()
    viewer.settle()
    assert viewer.place("0_11_3") == pytest.approx((before[0] + 60, before[1] + 30), abs=1.0)
    viewer.press("f")
    assert viewer.place("E_11_1") == pytest.approx(other, abs=1.0), "F fits the graph again"
    assert viewer.state["selected"] is None, "a drag is no click"
