"""What is known of a node: its label and who says so, its examples, tokens and histogram; labels of the reader's; search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from viewer_page import VIEW, ViewerPage

from circuits import CircuitGraph


@pytest.fixture
def indexed(capital: CircuitGraph, show: Callable[..., ViewerPage], index_of: Callable[..., Any]) -> ViewerPage:
    """The capital with evidence for its features."""
    with index_of(capital) as index:
        return show(capital, index=index)


def test_the_evidence_of_a_feature(indexed: ViewerPage, capital: CircuitGraph, index_of: Callable[..., Any]) -> None:
    indexed.click("1_5_3")
    detail = indexed.pane("detail")
    text = detail.inner_text()
    with index_of(capital) as index:
        record = index.feature(1, 5)
    assert "Texas" in text
    assert record.label is not None
    assert record.label.text in text
    assert "0.85" in text, "the label's F1"
    assert "2.5" in text, "its activation here"
    examples = detail.locator(".example")
    assert examples.count() == len(record.top_examples) + len(record.quantile_examples)
    for number, example in enumerate((*record.top_examples, *record.quantile_examples)):
        shown = examples.nth(number)
        assert shown.locator(".token").count() == len(example.tokens)
        assert shown.locator(".peak").text_content().strip("·␣⏎ ") == example.tokens[example.peak].strip()
    assert detail.locator("svg.histogram rect").count() == len(record.histogram_counts)
    for token, _ in record.effects.promoted:
        assert token.strip() in text
    parts = (examples.first, detail.locator(".chips").first, detail.locator("svg.histogram"))
    heights = [part.bounding_box()["y"] for part in parts]
    assert heights == sorted(heights), "what it fires on comes first"


def test_a_feature_without_a_label_has_that_of_the_index(
    indexed: ViewerPage, capital: CircuitGraph, index_of: Callable[..., Any]
) -> None:
    with index_of(capital) as index:
        label = index.label(1, 6)
    assert label is not None
    indexed.click("1_6_3")
    assert indexed.pane("detail").locator("h3").first.inner_text() == label.text
    assert indexed.pane("detail").get_by_text("Label found by rule").is_visible()


def test_stronger_tokens_are_shaded_more(indexed: ViewerPage) -> None:
    """Of every example three tokens are active: the peak most, another half, one a quarter as much."""
    indexed.click("1_5_3")
    shades = (
        indexed.pane("detail")
        .locator(".example")
        .first.locator(".token")
        .evaluate_all("(tokens) => tokens.map((token) => getComputedStyle(token).backgroundColor)")
    )
    levels = (
        indexed.pane("detail")
        .locator(".example")
        .first.locator(".token")
        .evaluate_all("(tokens) => tokens.map((token) => parseFloat(token.style.getPropertyValue('--shade')) || 0)")
    )
    assert sorted(filter(None, levels)) == sorted({level for level in levels if level})
    assert len(set(shades)) == 4, "three shades, and none"
    assert levels.index(max(levels)) == 24


def test_other_nodes_say_what_they_are(indexed: ViewerPage) -> None:
    expected = {"5_1_4": "70 %", "0_-1_3": "does not reconstruct", "E_13_3": "13", "2_9_4": "say a capital"}
    for node, text in expected.items():
        indexed.click(node)
        assert text in indexed.pane("detail").inner_text()
    indexed.press("Escape")
    assert "replacement" in indexed.pane("detail").inner_text(), "the graph itself"


def test_a_feature_outside_of_the_index_says_so(capital: CircuitGraph, show: Callable[..., ViewerPage]) -> None:
    viewer = show(capital)
    viewer.click("1_5_3")
    assert "without a feature index" in viewer.pane("detail").inner_text()


def test_labels_are_edited_restored_and_undone(indexed: ViewerPage) -> None:
    indexed.click("1_5_3")
    detail = indexed.pane("detail")
    detail.locator("[data-action=edit-label]").click()
    indexed.page.locator("#label-field").fill("  the state of <i>Dallas</i> ")
    indexed.press("Enter")
    assert indexed.state["labels"] == {"1_5_3": "the state of <i>Dallas</i>"}
    assert detail.locator("h3").first.inner_text() == "the state of <i>Dallas</i>"
    indexed.click("A2_3_4")
    assert "the state of <i>Dallas</i>" in indexed.pane("links").inner_text(), "everywhere"
    indexed.press("u")
    assert indexed.state["labels"] == {}
    indexed.press("U")
    indexed.click("1_5_3")
    indexed.press("e")
    indexed.page.locator("#label-field").fill("something else")
    indexed.press("Escape")
    assert indexed.state["labels"] == {"1_5_3": "the state of <i>Dallas</i>"}, "Esc leaves it as it was"
    indexed.press("e")
    indexed.page.locator("#label-field").fill("")
    indexed.press("Enter")
    assert indexed.state["labels"] == {}
    assert detail.locator("h3").first.inner_text() == "Texas"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("texas", ["1_5_3"]),
        ("SAY", ["2_9_4", "3_21_4"]),
        ("say austin", ["3_21_4"]),
        ("1/6", ["1_6_3"]),
        ("nowhere", []),
    ],
)
def test_search_finds_labels_and_names(
    capital: CircuitGraph, show: Callable[..., ViewerPage], query: str, found: list[str]
) -> None:
    viewer = show(capital)
    viewer.press("/")
    viewer.page.keyboard.type(query)
    viewer.settle()
    results = viewer.page.get_by_role("option")
    ids = [capital.nodes.ids()[int(str(option.get_attribute("data-node")))] for option in results.all()]
    assert sorted(ids) == found
    if not found:
        assert "Nothing matches" in viewer.page.locator("#search").inner_text()
        return
    viewer.press("ArrowDown")
    assert viewer.state["hovered"] == ids[0]
    viewer.press("Enter")
    assert viewer.state["selected"] == ids[0]


def test_search_finds_tokens_and_own_labels(indexed: ViewerPage, capital: CircuitGraph) -> None:
    ids = capital.nodes.ids()
    indexed.update(labels={"0_11_3": "my own name"})

    def search(text: str) -> set[str]:
        indexed.page.locator("#search-field").fill(text)
        indexed.settle()
        return {ids[int(str(option.get_attribute("data-node")))] for option in indexed.page.get_by_role("option").all()}

    assert search("own name") == {"0_11_3"}
    box = indexed.page.get_by_role("listbox", name="Search results").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= VIEW["width"], "in sight"
    assert search("dallas") >= {"E_13_3", "0_11_3", "1_5_3", "1_6_3", "0_-1_3"}, "all at the token"
    assert "1_5_3" in search("the"), "promoted by its feature"
    indexed.page.get_by_role("option").first.click()
    assert indexed.state["selected"] is not None
