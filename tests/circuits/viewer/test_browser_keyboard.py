"""A whole session without the mouse; help; the hint of the first visit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from viewer_page import ViewerPage

from circuits import CircuitGraph


def test_a_whole_session_without_the_mouse(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """Search, walk, select, pin, name, group, link, trace a path, hide, undo, and save."""
    viewer = show(capital)
    keyboard = viewer.page.keyboard
    viewer.press("/")
    keyboard.type("texas")
    viewer.press("ArrowDown", "Enter")
    assert viewer.state["selected"] == "1_5_3"
    focus(viewer, "#graph-pane canvas:last-of-type")
    viewer.press("p", "ArrowDown")
    assert viewer.state["hovered"] in ("0_11_3", "0_-1_3"), "below"
    viewer.press("ArrowUp", "Enter", "Escape")
    assert viewer.state["selected"] is None

    select(viewer, "moves")
    viewer.press("p")
    select(viewer, "say austin")
    viewer.press("p", "e")
    keyboard.type("says Austin")
    viewer.press("Enter")
    assert set(viewer.state["pinned"]) == {"1_5_3", "A2_3_4", "3_21_4"}
    assert viewer.state["labels"] == {"3_21_4": "says Austin"}

    focus(viewer, "#subgraph .box[tabindex='0']")
    walk_to(viewer, "A2_3_4")
    viewer.press(" ")
    walk_to(viewer, "3_21_4")
    viewer.press(" ", "g")
    keyboard.type("the way out")
    viewer.press("Enter")
    (group,) = viewer.state["groups"]
    assert (group["name"], set(group["members"])) == ("the way out", {"A2_3_4", "3_21_4"})

    select(viewer, "texas")
    focus(viewer, "#links button.link")
    before = viewer.page.evaluate("() => document.activeElement.dataset.id")
    viewer.press("ArrowDown")
    assert viewer.page.evaluate("() => document.activeElement.dataset.id") != before
    viewer.press("ArrowUp", "Enter")
    assert viewer.state["selected"] == before
    viewer.press("Alt+ArrowLeft")
    assert viewer.state["selected"] == "1_5_3"

    viewer.press("w")
    select(viewer, "austin")
    viewer.press("w")
    assert viewer.state["path"][0] == "1_5_3"
    focus(viewer, "#min-influence")
    for _ in range(30):
        keyboard.press("ArrowRight")
    assert viewer.state["minInfluence"] > 0
    focus(viewer, "#graph-pane canvas:last-of-type")
    while viewer.state["can"]["undo"]:
        viewer.press("Control+z")
    assert (viewer.state["pinned"], viewer.state["groups"], viewer.state["minInfluence"]) == ([], [], 0)
    while viewer.state["can"]["redo"]:
        viewer.press("Control+Shift+Z")
    assert viewer.state["groups"] == [group]
    focus(viewer, "#controls button:text-is('Save')")
    with viewer.page.expect_download() as download:
        keyboard.press("Enter")
    assert json.loads(download.value.path().read_text(encoding="utf-8"))["groups"] == [group]


def focus(viewer: ViewerPage, selector: str) -> None:
    """Press Tab until an element that matches has the focus."""
    wanted = viewer.page.locator(selector).first
    for _ in range(120):
        if wanted.evaluate("(element) => element === document.activeElement"):
            return
        viewer.page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reached {selector}")


def select(viewer: ViewerPage, query: str) -> None:
    """Select the first node that a search finds."""
    viewer.press("/")
    viewer.page.keyboard.type(query)
    viewer.settle()
    viewer.press("Enter")


def walk_to(viewer: ViewerPage, key: str) -> None:
    """Walk the boxes of the subgraph by arrows, along a way that a person would see."""
    focused = "() => document.activeElement.dataset.key"
    at = """() => {
      const {subgraph, at} = crosstrace.panes.subgraph.view();
      return Object.fromEntries(subgraph.boxes.map(({key}, number) => [key, at(number)]));
    }"""
    for _ in range(20):
        here = viewer.page.evaluate(focused)
        if here == key:
            return
        places = viewer.page.evaluate(at)
        x, y = (places[key][axis] - places[here][axis] for axis in "xy")
        ways = {"ArrowRight": x, "ArrowLeft": -x, "ArrowDown": y, "ArrowUp": -y}
        for way in sorted(ways, key=lambda way: -ways[way]):
            viewer.press(way)
            if viewer.page.evaluate(focused) != here:
                break
    raise AssertionError(f"the arrows never reached {key}")


def test_every_button_has_a_name_and_can_be_reached(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.update(selected="A2_3_4", pinned=["1_5_3"])
    nameless = viewer.page.locator("button, input, [role=button], [role=separator]").evaluate_all(
        "(all) => all.filter((one) => !(one.ariaLabel ?? one.labels?.[0]?.textContent ?? one.textContent)?.trim())"
        ".map((one) => one.outerHTML)"
    )
    assert nameless == []
    unreachable = viewer.page.locator("button:not(.link)").evaluate_all(
        "(all) => all.filter((one) => one.tabIndex < 0).length"
    )
    assert unreachable == 0
    lists = viewer.page.locator("section.links:has(.link)")
    assert lists.count() == 2
    stops = lists.evaluate_all("(all) => all.map((one) => one.querySelectorAll('.link[tabindex=\"0\"]').length)")
    assert stops == [1, 1], "a list is one stop of the Tab key; the arrow keys walk inside it"


def test_arrows_reach_every_node(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """From the first node by arrow keys alone, as a person without a mouse would look around."""
    viewer = show(capital)
    ways = ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown")
    viewer.press("ArrowUp")
    seen, open_nodes = {viewer.state["hovered"]}, [viewer.state["hovered"]]
    while open_nodes:
        node = open_nodes.pop()
        for way in ways:
            number = "(id) => crosstrace.store.update({hovered: crosstrace.data.numberOf.get(id)})"
            viewer.page.evaluate(number, node)
            viewer.page.keyboard.press(way)
            reached = viewer.page.evaluate("() => crosstrace.data.nodes.id[crosstrace.store.state.hovered]")
            if reached not in seen:
                seen.add(reached)
                open_nodes.append(reached)
    assert seen == set(capital.nodes.ids())


def test_help_lists_every_key_and_closes(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.press("?")
    help_box = viewer.page.get_by_role("dialog", name="Help")
    assert help_box.is_visible()
    keys = viewer.page.evaluate("() => crosstrace.services.keys.map(([, text]) => text)")
    text = help_box.inner_text()
    assert len(keys) > 15
    assert all(key in text for key in keys)
    viewer.press("Escape")
    assert not help_box.is_visible()
    viewer.press("?", "?")
    assert not help_box.is_visible()


@pytest.mark.parametrize("remembers", [True, False])
def test_the_first_visits_hint_goes_away_for_good(
    capital: CircuitGraph, show: Callable[..., ViewerPage], remembers: bool
) -> None:
    viewer: Any = show(capital)
    hint = viewer.page.locator("#first-hint")
    if remembers:
        hint.get_by_role("button").click()
        assert hint.count() == 0
    viewer.page.reload()
    viewer.settle()
    assert hint.count() == (0 if remembers else 1)
