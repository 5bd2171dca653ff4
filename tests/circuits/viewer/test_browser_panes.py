"""The four panes: they resize, each can fill the window, and both themes colour them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from viewer_page import VIEW, ViewerPage

from circuits import CircuitGraph

NAMES = ("graph", "links", "subgraph", "detail")


def boxes(viewer: ViewerPage) -> dict[str, dict[str, float]]:
    viewer.settle()
    found = {name: viewer.pane(name).bounding_box() for name in NAMES if viewer.pane(name).is_visible()}
    return {name: dict(box) for name, box in found.items() if box is not None}


def test_four_panes_fill_the_window_without_overlap(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    places = boxes(viewer)
    assert set(places) == set(NAMES)
    area = sum(box["width"] * box["height"] for box in places.values())
    header = viewer.page.locator("#controls").bounding_box()
    assert header is not None
    room = VIEW["width"] * (VIEW["height"] - header["height"])
    assert 0.97 * room < area <= room
    assert viewer.page.evaluate("document.documentElement.scrollWidth") == VIEW["width"], "nothing scrolls sideways"


@pytest.mark.parametrize(
    ("splitter", "axis", "pane"), [("column", "x", "graph"), ("left", "y", "graph"), ("right", "y", "links")]
)
def test_splitters_resize_by_mouse_and_keys(
    capital: CircuitGraph, show: Callable[..., ViewerPage], splitter: str, axis: str, pane: str
) -> None:
    viewer = show(capital)
    size = "width" if axis == "x" else "height"
    before = boxes(viewer)[pane][size]
    bar = viewer.page.locator(f".splitter.{splitter}")
    box = bar.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    viewer.page.mouse.move(x, y)
    viewer.page.mouse.down()
    viewer.page.mouse.move(x - 60 * (axis == "x"), y - 60 * (axis == "y"), steps=3)
    viewer.page.mouse.up()
    dragged = boxes(viewer)[pane][size]
    assert dragged == pytest.approx(before - 60, abs=4)
    bar.focus()
    viewer.press("ArrowRight" if axis == "x" else "ArrowDown")
    assert boxes(viewer)[pane][size] > dragged + 5
    canvas = viewer.pane("graph").locator("canvas").last.bounding_box()
    body = viewer.pane("graph").locator(".body").bounding_box()
    assert canvas == body, "the drawing follows"


@pytest.mark.parametrize("name", NAMES)
def test_each_pane_can_fill_the_window(capital: CircuitGraph, show: Callable[..., ViewerPage], name: str) -> None:
    viewer = show(capital)
    before = boxes(viewer)
    viewer.pane(name).get_by_role("button", name=re.compile("fill the window")).click()
    filled = boxes(viewer)
    assert set(filled) == {name}
    assert filled[name]["width"] == VIEW["width"]
    viewer.press("Escape")
    assert boxes(viewer) == before


def test_themes(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """The page follows the system until a theme is chosen; text stands out from the background in both."""
    viewer = show(capital, color_scheme="dark")
    dark = contrast(viewer)
    viewer.press("t")
    light = contrast(viewer)
    assert viewer.state["theme"] == "light"
    assert dark[0] < 0.1 < 0.8 < light[0], "luminance of the background"
    assert min(dark[1], light[1]) > 7
    assert show(capital, color_scheme="light").page.evaluate(
        "getComputedStyle(document.body).color"
    ) == viewer.page.evaluate("getComputedStyle(document.body).color")


def contrast(viewer: ViewerPage) -> tuple[float, float]:
    """Luminance of a pane's background, and the contrast of its text by the web's guidelines (WCAG 2.2)."""
    style = viewer.pane("detail").evaluate(
        "(pane) => [getComputedStyle(pane).backgroundColor, getComputedStyle(pane).color]"
    )
    paper, ink = (luminance(colour) for colour in style)
    return paper, (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
