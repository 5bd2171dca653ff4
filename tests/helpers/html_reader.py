"""Reads the HTML that values display in a notebook: its cells and text, and nothing but a few harmless elements."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "<img src=x onerror=\"alert('1')\">&amp;</script></table> \u202eabc שלום [red]x[/red] 👩‍🚀"
"""A name that would break out of careless HTML."""
ELEMENTS = {"table", "thead", "tbody", "tr", "th", "td", "p", "div", "span"}


class Reader(HTMLParser):
    """The elements, and the text of every cell; elements must nest and close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.cells: list[str] = []
        self.styles: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.add(tag)
        assert {name for name, _ in attrs} <= {"style"}
        if tag in ("td", "th"):
            self.cells.append("")
            self.styles.append(dict(attrs)["style"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert reader.seen <= ELEMENTS
    return reader
