"""Nothing a person does is lost: undo and redo, back and forward, the address of the page, and files of the state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from viewer_page import ViewerPage

from circuits import CircuitGraph

KEPT = ("selected", "pinned", "groups", "labels", "path", "direction", "topLinks", "minInfluence", "theme", "panes")
WORK: dict[str, Any] = {
    "selected": "1_5_3",
    "pinned": ["1_5_3", "3_21_4", "E_13_3"],
    "groups": [{"id": "g1", "name": "the state & its <capital>", "members": ["1_5_3", "A2_3_4"]}],
    "labels": {"0_11_3": "a city, “Dallas”"},
    "path": ["E_13_3", "5_1_4"],
    "direction": "inputs",
    "topLinks": 3,
    "minInfluence": 0.01,
    "theme": "dark",
}
"""A state that differs from the first one in everything."""


def kept(viewer: ViewerPage) -> dict[str, Any]:
    return {name: value for name, value in viewer.state.items() if name in KEPT}


def test_undo_and_redo_of_every_change(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    undo, redo = (viewer.page.locator(f"button[data-can={name}]") for name in ("undo", "redo"))
    assert not undo.is_enabled()
    assert not redo.is_enabled()
    first = kept(viewer)
    viewer.click("1_5_3", control=True)
    viewer.click("3_21_4", control=True)
    viewer.page.wait_for_timeout(650)  # changes of one kind within 0.6 s are one step
    viewer.press("i")
    pinned = sorted(viewer.state["pinned"])
    assert (pinned, viewer.state["direction"]) == (["1_5_3", "3_21_4"], "inputs")
    undo.click()
    assert (sorted(viewer.state["pinned"]), viewer.state["direction"]) == (pinned, "both")
    viewer.press("Control+z")
    while viewer.state["can"]["undo"]:
        viewer.press("u")
    assert kept(viewer) == first
    redo.click()
    viewer.press("Control+Shift+Z")
    while viewer.state["can"]["redo"]:
        viewer.press("Control+y")
    assert (sorted(viewer.state["pinned"]), viewer.state["direction"]) == (pinned, "inputs")
    viewer.press("u", "t")
    assert viewer.state["can"]["redo"], "the theme is no step, so what was undone can still be redone"
    viewer.click("0_11_3", control=True)
    assert not viewer.state["can"]["redo"]


def test_back_and_forward_walk_the_selected_nodes(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    back, forward = (viewer.page.locator(f"button[data-can={name}]") for name in ("back", "forward"))
    for node in ("E_13_3", "0_11_3", "1_5_3"):
        viewer.click(node)
    assert not forward.is_enabled()
    back.click()
    assert viewer.state["selected"] == "0_11_3"
    viewer.press("Alt+ArrowLeft")
    assert viewer.state["selected"] == "E_13_3"
    assert not back.is_enabled()
    forward.click()
    viewer.press("]")
    assert viewer.state["selected"] == "1_5_3"
    viewer.press("[", "[")
    viewer.click("5_1_4")
    assert not forward.is_enabled(), "another way was taken"
    viewer.press("[")
    assert viewer.state["selected"] == "E_13_3"


def test_the_address_holds_the_state(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    """Opened at its own address, the page is as it was left, and another export of the graph is, too."""
    viewer = show(capital)
    viewer.update(**WORK)
    before = kept(viewer)
    assert {name: before[name] for name in WORK} == WORK
    viewer.page.wait_for_function("() => location.hash.length > 100")
    viewer.page.wait_for_timeout(400)
    address = viewer.page.evaluate("location.hash")
    viewer.page.reload()
    viewer.settle()
    assert kept(viewer) == before
    assert kept(show(capital, hash=address)) == before
    part = capital.prune(nodes=0.7)
    assert len(part.nodes) < len(capital.nodes)
    restored = show(part, hash=address)
    assert set(restored.state["pinned"]) == set(WORK["pinned"]) & set(part.nodes.ids())


def test_an_address_that_grows_too_long_says_what_it_leaves_out(
    capital: CircuitGraph, show: Callable[..., ViewerPage]
) -> None:
    viewer = show(capital)
    viewer.update(pinned=["1_5_3"], labels={node: "long text " * 40 for node in capital.nodes.ids()})
    message = viewer.page.locator("#message.shown")
    message.wait_for()
    assert "labels" in message.inner_text()
    viewer.page.reload()
    viewer.settle()
    assert (viewer.state["pinned"], viewer.state["labels"]) == (["1_5_3"], {})


@pytest.mark.parametrize(
    "hash", ["#pinned=%5B1", "#pinned=1", "#nonsense", "#panes=%7B%7D", "#topLinks=-1&selected=%5B%5D"]
)
def test_a_broken_address_is_said_and_changes_nothing(
    capital: CircuitGraph, show: Callable[..., ViewerPage], hash: str
) -> None:
    first = kept(show(capital))
    viewer = show(capital, hash=hash)
    assert kept(viewer) == first
    if hash != "#nonsense":
        assert "cannot be read" in viewer.page.locator("#message").inner_text()


def test_a_saved_file_brings_everything_back(
    capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path
) -> None:
    viewer = show(capital)
    viewer.update(**WORK)
    before = kept(viewer)
    with viewer.page.expect_download() as download:
        viewer.page.get_by_text("Save", exact=True).click()
    path = tmp_path / "state.json"
    download.value.save_as(path)
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert {name: saved[name] for name in WORK} == WORK
    fresh = show(capital)
    load_file(fresh, path)
    assert kept(fresh) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "cannot be read"), ("[]", "version"), ('{"version": 99}', "version"), ('{"version": 1, "pinned": [3]}', "pinned"),
     ('{"version": 1, "pinned": ["9_9_9"]}', "1 nodes of the saved state are not in this graph")],
)  # fmt: skip
def test_broken_and_foreign_files_are_refused_in_words(
    capital: CircuitGraph, show: Callable[..., ViewerPage], tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    viewer = show(capital)
    first = kept(viewer)
    load_file(viewer, path)
    message = viewer.page.locator("#message.shown")
    message.wait_for()
    assert expected in message.inner_text()
    assert kept(viewer) == first


def load_file(viewer: ViewerPage, path: Path) -> None:
    with viewer.page.expect_file_chooser() as chooser:
        viewer.page.get_by_text("Load", exact=True).click()
    chooser.value.set_files(path)
    viewer.page.wait_for_timeout(100)
    viewer.settle()


def test_names_in_the_address_are_encoded(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    query = "&pinned=[]#\"<b>' %41+é"
    viewer = show(capital, hash=f"#query={quote(json.dumps(query), safe='')}")
    assert viewer.state["query"] == query
    viewer.press("i")
    viewer.page.wait_for_timeout(400)
    viewer.page.reload()
    viewer.settle()
    assert viewer.state["query"] == query
