"""Pins become boxes, boxes become named groups with their edges added up, and all of it can be dragged and taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from viewer_page import ViewerPage

from circuits import CircuitGraph, NodeKind

PINNED = ("0_11_3", "1_5_3", "1_6_3", "A2_3_4", "2_9_4", "3_21_4")
VIEW = """() => {
  const {subgraph, at} = crosstrace.panes.subgraph.view();
  return {
    boxes: Object.fromEntries(subgraph.boxes.map(({key}, number) => [key, at(number)])),
    leftOut: subgraph.leftOut.links,
    links: subgraph.links.map((link) => ({...link, from: subgraph.boxes[link.from].key, to: subgraph.boxes[link.to].key})),
  };
}"""


def box(viewer: ViewerPage, key: str) -> Any:
    return viewer.pane("subgraph").locator(f".box[data-key='{key}']")


def choose(viewer: ViewerPage, *keys: str) -> None:
    for key in keys:
        box(viewer, key).click(modifiers=["Shift"])


def act(viewer: ViewerPage, action: str) -> None:
    viewer.pane("subgraph").locator(f"[data-action={action}]").click()
    viewer.settle()


def drawn(viewer: ViewerPage) -> dict[str, Any]:
    return dict(viewer.page.evaluate(VIEW))


def weights(graph: CircuitGraph) -> dict[tuple[str, str], float]:
    """Edge weights by the ids of source and target."""
    ids = np.array(graph.nodes.ids(), dtype=object)
    ends = zip(ids[graph.edges.source], ids[graph.edges.target], strict=True)
    return dict(zip(ends, graph.edges.weight.tolist(), strict=True))


def test_pins_by_click_and_by_button(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("1_5_3", control=True)
    viewer.click("A2_3_4")
    viewer.pane("detail").locator("[data-action=pin]").click()
    assert viewer.state["pinned"] == ["1_5_3", "A2_3_4"]
    assert box(viewer, "A2_3_4").is_visible()
    assert "moves the state" in box(viewer, "A2_3_4").text_content()
    link = next(link for link in drawn(viewer)["links"] if (link["from"], link["to"]) == ("1_5_3", "A2_3_4"))
    assert link["weight"] == pytest.approx(1.5)
    assert link["share"] == pytest.approx(1.5 / 2.25, abs=1e-6)
    viewer.pane("detail").locator("[data-action=pin]").click()
    assert viewer.state["pinned"] == ["1_5_3"]
    assert box(viewer, "A2_3_4").count() == 0


def test_groups_are_made_named_and_dissolved(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.update(pinned=PINNED)
    choose(viewer, "1_5_3", "1_6_3")
    act(viewer, "group")
    viewer.page.keyboard.type("the <b>state</b>")
    viewer.press("Enter")
    (group,) = viewer.state["groups"]
    assert (group["name"], sorted(group["members"])) == ("the <b>state</b>", ["1_5_3", "1_6_3"])
    made = box(viewer, f"group:{group['id']}")
    assert "the <b>state</b>" in made.text_content()
    assert box(viewer, "1_5_3").count() == 0
    choose(viewer, f"group:{group['id']}")
    act(viewer, "rename")
    viewer.page.locator("#rename-field").fill("Texas")
    viewer.press("Enter")
    assert viewer.state["groups"][0]["name"] == "Texas"
    act(viewer, "ungroup")
    assert viewer.state["groups"] == []
    assert set(viewer.state["pinned"]) == set(PINNED), "members stay pinned"
    viewer.press("u")
    assert viewer.state["groups"][0]["name"] == "Texas"


def test_a_new_group_leaves_the_last_one_alone(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """A group that was just named is no part of the next choice; chosen again, it takes in what is chosen with it."""
    viewer = show(capital)
    viewer.update(pinned=PINNED)
    for name, members in {"Texas": ["1_5_3", "1_6_3"], "say Austin": ["2_9_4", "3_21_4"]}.items():
        choose(viewer, *members)
        act(viewer, "group")
        viewer.page.keyboard.type(name)
        viewer.press("Enter")
    groups = {group["name"]: group for group in viewer.state["groups"]}
    assert {name: sorted(group["members"]) for name, group in groups.items()} == {
        "Texas": ["1_5_3", "1_6_3"],
        "say Austin": ["2_9_4", "3_21_4"],
    }
    choose(viewer, f"group:{groups['Texas']['id']}", "0_11_3")
    act(viewer, "group")
    viewer.press("Enter")
    extended = next(group for group in viewer.state["groups"] if group["name"] == "Texas")
    assert sorted(extended["members"]) == ["0_11_3", "1_5_3", "1_6_3"]


def test_edges_between_groups_are_sums(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """Weight: the sum of A[t, s]; share: that over the inflows of the target's members. Weak links are counted, not drawn."""
    viewer = show(capital)
    groups = {"low": ["0_11_3", "1_5_3", "1_6_3"], "high": ["A2_3_4", "3_21_4"]}
    viewer.update(
        pinned=PINNED, groups=[{"id": name, "name": name, "members": members} for name, members in groups.items()]
    )
    found = drawn(viewer)
    links = {(link["from"], link["to"]): link for link in found["links"]}
    edges, ids = weights(capital), list(capital.nodes.ids())
    boxes = {f"group:{name}": members for name, members in groups.items()}
    boxes |= {
        node: [node]
        for node in ids
        if (node in PINNED or node[0] in "E5") and all(node not in g for g in groups.values())
    }
    expected = {}
    for source, members in boxes.items():
        for target, others in boxes.items():
            between = [edges[s, t] for s in members for t in others if (s, t) in edges]
            if between and source != target:
                inflow = sum(capital.nodes.inflow[ids.index(t)] for t in others)
                expected[source, target] = (sum(between), sum(between) / inflow)
    assert len(links) + found["leftOut"] == len(expected)
    assert len(links) > 6
    for ends, link in links.items():
        assert (link["weight"], link["share"]) == pytest.approx(expected[ends], abs=1e-6)


def test_boxes_are_dragged_and_their_places_kept(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.update(pinned=PINNED)
    before = drawn(viewer)["boxes"]
    assert before["3_21_4"]["y"] < before["A2_3_4"]["y"] < before["1_5_3"]["y"] < before["0_11_3"]["y"], "by layer"
    frame = box(viewer, "2_9_4").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    viewer.page.mouse.move(x, y)
    viewer.page.mouse.down()
    viewer.page.mouse.move(x + 60, y - 20, steps=3)
    viewer.page.mouse.up()
    viewer.settle()
    after = drawn(viewer)["boxes"]
    assert after["2_9_4"]["x"] > before["2_9_4"]["x"] + 20
    assert {key: place for key, place in after.items() if key != "2_9_4"} == {
        key: place for key, place in before.items() if key != "2_9_4"
    }
    viewer.page.wait_for_timeout(400)
    viewer.page.reload()
    viewer.settle()
    assert drawn(viewer)["boxes"] == after
    viewer.press("u") if viewer.state["can"]["undo"] else act(viewer, "tidy")
    assert drawn(viewer)["boxes"]["2_9_4"] == before["2_9_4"]


def test_hovering_a_box_shows_its_node_everywhere(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.update(pinned=PINNED, selected="A2_3_4")
    box(viewer, "1_5_3").hover()
    assert viewer.state["hovered"] == "1_5_3"
    assert viewer.pane("graph").locator(".tip").is_visible()
    marked = "(rows) => [...new Set(rows.map((row) => row.dataset.id))]"
    assert viewer.pane("links").locator(".hovered").evaluate_all(marked) == ["1_5_3"]
    viewer.hover("3_21_4")
    assert viewer.pane("links").locator(".hovered").evaluate_all(marked) == ["3_21_4"]


def test_a_first_subgraph_is_offered(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.pane("subgraph").locator("[data-action=pin-top]").click()
    assert len(viewer.state["pinned"]) == 7, "all features of this graph"


def test_groups_of_the_graph_are_there_at_first(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    ids = capital.nodes.ids()
    parts = [("Dallas, then Texas", ["0_11_3", "1_5_3"]), ("say Austin", ["3_21_4"]), ("cities", ["5_1_4", "5_2_4"])]
    groups = [{"name": name, "members": members, "f1": None} for name, members in parts]
    grouped = dataclasses.replace(capital, metadata={**capital.metadata, "groups": groups})
    viewer = show(grouped)
    state = viewer.state
    assert [(group["name"], set(group["members"])) for group in state["groups"]] == [
        (name, set(members)) for name, members in (parts[0], parts[2])
    ]
    features = {name for name, kind in zip(ids, capital.nodes.kind.tolist(), strict=True) if kind == NodeKind.FEATURE}
    assert set(state["pinned"]) == features, "single features are groups of their own"
    assert viewer.page.evaluate("location.hash") == "", "the address holds what differs from the page's beginning"
    link = next(
        link for link in drawn(viewer)["links"] if (link["from"], link["to"]) == ("group:graph-0", "group:graph-1")
    )
    weight = weights(capital)
    between = [weight.get((source, target), 0.0) for source in parts[0][1] for target in parts[2][1]]
    assert sum(between)
    assert link["weight"] == pytest.approx(sum(between))
