"""What notebooks show: pages made for terminals as HTML, so that a value describes itself once for both.

Text is escaped. Styles stand on the elements, because exported pages drop style sheets, and work on light and dark pages.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

Page = Callable[[Mapping[str, Any]], RenderableType]
_FRAME_HEIGHT = 720
_CELL = "padding:.15em .9em .15em 0;vertical-align:top;text-align:{align};"
_NUMBERS = "white-space:nowrap;font-variant-numeric:tabular-nums"
_TEXTS = "white-space:pre-wrap;overflow-wrap:anywhere;max-width:44em"
_SHADES = {"red": "background:rgba(230,120,0,.45)", "yellow": "background:rgba(230,160,0,.22)"}
"""Colours that mark text, as shades behind it."""
_CONSOLE = Console(force_terminal=False, force_jupyter=False)  # resolves styles, prints nothing


def repr_html(value: Any) -> str:
    """The page that a value's `__rich__` makes, as HTML; classes take it as their `_repr_html_`."""
    return to_html(value.__rich__())


def to_html(page: RenderableType) -> str:
    """Groups, paddings, tables and texts of rich as HTML; numbers are aligned as in the table."""
    if isinstance(page, Group):
        return "".join(map(to_html, page.renderables))
    if isinstance(page, Padding):
        return f'<div style="margin:0 0 .8em 1em">{to_html(page.renderable)}</div>'
    if isinstance(page, Table):
        return _table(page)
    text = _inline(page)
    return f'<p style="margin:.2em 0">{text}</p>' if text.strip() else ""


def _table(table: Table) -> str:
    styles = [
        _CELL.format(align=column.justify) + (_NUMBERS if column.justify == "right" else _TEXTS)
        for column in table.columns
    ]

    def row(tag: str, cells: Any) -> str:
        pairs = zip(styles, cells, strict=True)
        return "<tr>" + "".join(f'<{tag} style="{style}">{_inline(cell)}</{tag}>' for style, cell in pairs) + "</tr>"

    head = row("th", (column.header for column in table.columns)) if table.show_header else ""
    body = "".join(row("td", cells) for cells in zip(*(column.cells for column in table.columns), strict=True))
    return f'<table style="border-collapse:collapse"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _inline(cell: RenderableType) -> str:
    """A line of text with its marks."""
    if not isinstance(cell, Text):
        return escape(str(cell))
    cell = cell.copy()
    cell.stylize(cell.style)  # a text without spans is rendered without its own style
    parts = []
    for segment in cell.render(_CONSOLE):
        css = _css(segment.style) if isinstance(segment.style, Style) else ""
        text = escape(segment.text)
        parts.append(f'<span style="{css}">{text}</span>' if css else text)
    return "".join(parts)


def _css(style: Style) -> str:
    colour = style.color.name if style.color is not None else ""
    rules = ["font-weight:600" if style.bold else "", "opacity:.7" if style.dim else "", _SHADES.get(colour, "")]
    return ";".join(filter(None, rules))


def frame(page: str, *, picture: str, title: str, note: str = "") -> str:
    """A page with scripts in a sandboxed frame.

    The frame lies on a picture, which appears where frames are stripped, as in sanitized notebooks, and until the frame is
    scrolled into view and loaded; without scripts the frame shows the picture, too.

    Args:
        page: the HTML of the page.
        picture: SVG that says the same.
        title: what is shown, for screen readers and where there is no picture either.
        note: text below.
    """
    address = "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode("ascii")
    still = f'<img alt="{escape(title)}" src="{address}" style="max-width:100%;max-height:100%">'
    page = escape(page.replace("<noscript>", f"<noscript><style>main{{display:none}}</style>{still}", 1))
    return (
        f'<div style="position:relative;height:{_FRAME_HEIGHT}px">{still}<iframe title="{escape(title)}" srcdoc="{page}" '
        'sandbox="allow-scripts allow-downloads" loading="lazy" '
        'style="position:absolute;top:0;left:0;width:100%;height:100%;border:0"></iframe></div>' + to_html(Text(note))
    )


class Report(dict[str, Any]):
    """Measurements as one JSON object, with short text and a page of their own in terminals and notebooks."""

    def __init__(self, facts: Mapping[str, Any], *, title: str, page: Page) -> None:
        """
        Args:
            facts: the JSON object.
            title: what was measured, for `repr`.
            page: makes the page of the facts.
        """
        super().__init__(facts)
        self.title, self._page = title, page

    def __rich__(self) -> RenderableType:
        return self._page(self)

    def __repr__(self) -> str:
        return f"Report({self.title}: {', '.join(self)})"

    _repr_html_ = repr_html
