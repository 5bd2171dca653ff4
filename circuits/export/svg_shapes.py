"""The few shapes that pictures are made of, as SVG elements."""

from __future__ import annotations

from html import escape

from circuits.export.style import EDGE_COLOURS, GREY, QUIET_COLOURS, box_colours, link_width
from circuits.export.svg_layout import FONT
from circuits.graph.nodes import NodeKind
from circuits.graph.text import printable

ROUND, SQUARE = 11.0, 1.5
"""Radius of the corners of features' boxes, and of tokens' and outputs'."""
ARROW = 7.0
"""Height of the arrow heads of path links; their lines end where the head begins."""


def words(
    x: float, y: float, text: str, *, colour: str = GREY, size: float = FONT, bold: bool = False, anchor: str = "start"
) -> str:
    """A line of text; `y` is its base line."""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"'
    weight = ' font-weight="600"' if bold else ""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}"{weight}{side} xml:space="preserve">{escape(printable(text))}</text>'


def tooltip(text: str) -> str:
    """The text that appears while the mouse is over the element around it."""
    return f"<title>{escape(chr(10).join(printable(line) for line in text.split(chr(10))))}</title>"


def hairline(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def curve(path: str, *, on_path: bool, raises: bool, strength: float, title: str = "") -> str:
    """The line of a link. Those that lower their target are dashed, so that print without colours tells them apart."""
    colour = (EDGE_COLOURS if on_path else QUIET_COLOURS)[raises]
    width = link_width(strength, on_path=on_path)
    dash = "" if raises else f' stroke-dasharray="{"8 4" if on_path else "3 3"}"'
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:.2f}"{dash}>{title}</path>'


def arrow_head(x: float, y: float, *, raises: bool) -> str:
    """The head of a path link, pointing up to (x, y)."""
    return f'<path d="M{x:.1f} {y:.1f}l4.5 {ARROW:g}h-9z" fill="{EDGE_COLOURS[raises]}"/>'


def diamond(x: float, top: float, half: float, title: str = "", *, inclusion: float | None = None) -> str:
    """The sign of an error, faded as its inclusion frequency says."""
    fill, stroke, _ = box_colours(NodeKind.ERROR, inclusion=inclusion)
    corners = f"M{x:.1f} {top:.1f}l{half:g} {half:g}l-{half:g} {half:g}l-{half:g} -{half:g}z"
    return f'<path d="{corners}" fill="{fill}" stroke="{stroke}">{title}</path>'


def mark(x: float, y: float, shape: str) -> str:
    """The small sign around (x, y) that tells what a box is."""
    outlines = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" ',
        "triangle": f'<path d="M{x:.1f} {y - 3.4:.1f}l3.7 6.4h-7.4z" ',
        "square": f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" ',
        "diamond": f'<path d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z" ',
    }
    return f'{outlines[shape]}fill="{GREY}"/>'


def badge(x: float, y: float, number: int) -> str:
    """The number of a path in a disc around (x, y)."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7.5" fill="#1f2933"/>' + words(
        x, y + 3.6, str(number), colour="#ffffff", size=10.0, bold=True, anchor="middle"
    )
