"""Whatever a graph, an index or a person calls things, names stay text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from viewer_page import ViewerPage

from circuits import CircuitGraph

FOREIGN = (
    "script:not([id=graph]):not(:last-of-type), img, iframe, object, embed, a[href], i, u, link, base, form, template"
)
"""Elements that the page has no use for, so that only a name could have made them."""


@pytest.fixture
def viewer(
    hostile: CircuitGraph, show: Callable[..., ViewerPage], index_of: Callable[..., Any], names: tuple[str, ...]
) -> ViewerPage:
    """The hostile graph, with every name also a token of an index and so in examples, promoted tokens and labels."""
    with index_of(hostile, names) as index:
        return show(hostile, index=index)


def check(viewer: ViewerPage) -> None:
    assert viewer.page.locator(FOREIGN).count() == 0
    attributes = "(all) => new Set(all.flatMap((element) => element.getAttributeNames()))"
    names = viewer.page.locator("*").evaluate_all(f"(all) => [...({attributes})(all)]")
    assert not [name for name in names if name.startswith("on")]


def test_names_are_text_in_every_pane(viewer: ViewerPage, hostile: CircuitGraph, names: tuple[str, ...]) -> None:
    """Each node in turn is selected, pinned, searched, and has its examples shown; dialogs and requests fail the page."""
    check(viewer)
    ids = hostile.nodes.ids()
    for place, name in enumerate(names):
        for node in (ids[place], ids[len(names) + place], ids[2 * len(names) + place]):
            viewer.update(selected=node)
            title = viewer.pane("detail").locator("h3").first
            assert plain(title.inner_text()) == plain(name)
            assert viewer.pane("links").locator("[data-id]").count() > 0
        viewer.page.locator("#search-field").fill(name[:8])
        viewer.settle()
        assert viewer.page.get_by_role("option").count() > 0
        viewer.press("Escape")
    viewer.update(pinned=list(ids))
    viewer.press("m")
    check(viewer)
    titles = plain(" ".join(viewer.pane("subgraph").locator("title").all_text_contents()))
    assert all(plain(name) in titles for name in names)


def plain(text: str) -> str:
    """Without what a page may show as a mark or leave out: spaces, controls and marks of direction."""
    text = re.sub(r"<U\+[0-9A-F]{4}>|[⏎␣·\s]", "", text)
    return "".join(character for character in text if character.isprintable())


def test_names_by_people_are_text(viewer: ViewerPage, hostile: CircuitGraph, names: tuple[str, ...]) -> None:
    """As labels, as names of groups, as queries, in the address and back."""
    ids = hostile.nodes.ids()
    features = ids[len(names) : 2 * len(names)]
    viewer.update(
        labels=dict(zip(features, names, strict=True)),
        groups=[{"id": name, "name": name, "members": [node]} for node, name in zip(features, names, strict=True)],
        pinned=list(features),
        query=names[0],
        selected=features[0],
        path=[ids[0], ids[-1]],
    )
    check(viewer)
    before = viewer.state
    viewer.page.wait_for_timeout(400)
    viewer.page.reload()
    viewer.settle()
    check(viewer)
    assert viewer.state["groups"] == before["groups"]
    assert viewer.state["labels"] == before["labels"]


def test_right_to_left_names_turn_nothing_around(viewer: ViewerPage, hostile: CircuitGraph) -> None:
    """Every name is in an element that keeps its writing direction to itself, so that the numbers beside it stay in place."""
    viewer.update(selected=hostile.nodes.ids()[len(hostile.metadata["tokens"]) + 3])
    loose = """() => {
      const rightToLeft = /[\\u0590-\\u08ff]/, found = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      for (let text = walker.nextNode(); text; text = walker.nextNode()) {
        const inside = text.parentElement.closest("bdi, title, script, style, option, [role=status], text");
        if (rightToLeft.test(text.data) && !inside && text.parentElement.checkVisibility()) found.push(text.data.slice(0, 60));
      }
      return found;
    }"""
    assert viewer.page.evaluate(loose) == []
