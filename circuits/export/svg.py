"""The token x layer picture of a circuit as SVG. Needs no program, font or script."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from html import escape

from circuits.export.picture import Item, Link, Picture, picture_of
from circuits.export.style import EDGE_COLOURS, INK, box_colours
from circuits.export.svg_layout import FONT, LINE, MARGIN, SMALL_FONT, SMALL_LINE, Box, Layout, place
from circuits.export.svg_legend import foot
from circuits.export.svg_routes import Area, Point, routes, tags
from circuits.export.svg_shapes import ROUND, SQUARE, arrow_head, badge, curve, diamond, hairline, mark, tooltip, words
from circuits.export.text_metrics import fit, text_width, wrap
from circuits.graph.edges import GraphData
from circuits.graph.exporters import register
from circuits.graph.nodes import NodeKind
from circuits.graph.text import printable
from replacement.number_checks import integer

_FONTS = "Helvetica, Arial, 'Liberation Sans', 'Nimbus Sans', 'Segoe UI', sans-serif"
_TITLE, _TITLE_LINE, _TITLE_LINES = 17.0, 22.0, 3
_SHADE, _LINE, _ANSWER = "#f8f9fb", "#e5e8ec", "#946c00"
_GUIDE = (
    "read upwards: the tokens at the bottom switch on features, which raise or lower others above them and the output"
)


@register("svg", suffix=".svg", description="picture, tokens x layers; needs no program")
def to_svg(graph: GraphData, *, max_nodes: int = 80) -> str:
    """The circuit drawn on a white card: positions across, layers upwards, the strongest paths bold and coloured by sign.

    Of a larger graph the `max_nodes` most influential nodes are drawn, and the caption says how much was left out.
    Raises `ValueError` when `max_nodes` is below 1.
    """
    if integer("max_nodes", max_nodes) < 1:
        raise ValueError(f"max_nodes: expected at least 1, given {max_nodes}")
    picture = picture_of(graph, max_nodes=max_nodes)
    facts = graph.metadata
    layout = place(picture.items, picture.links, n_layers=facts["n_layers"], n_positions=len(facts["tokens"]))
    curves = routes(picture.links, layout)
    width = layout.width
    title, head = _title(graph, picture, width)
    floor = layout.height + head
    below, height = foot(graph, picture, width, floor)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:100%;height:auto" role="img" '
        f'font-family="{_FONTS}" font-size="{FONT:g}">',
        tooltip("Circuit of: " + facts["prompt"]),
        f'<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="12" fill="#ffffff" stroke="#d7dbe0"/>',
        *title,
        f'<g transform="translate(0 {head:g})">',
        *_bands(layout),
        *itertools.starmap(_link, zip(picture.links, curves, strict=True)),
        *(_node(picture.items[box.item], box) for box in layout.boxes),
        *_numbers(picture, layout),
        *(_tag(picture.links[number], spot) for number, spot in tags(picture.links, curves, layout).items()),
        "</g>",
        *below,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _title(graph: GraphData, picture: Picture, width: float) -> tuple[list[str], float]:
    """The prompt and what the model answers, how to read the picture, and where that ends."""
    room = width - 2 * MARGIN
    answer = fit(picture.answer, room, _TITLE, bold=True)
    prompt = wrap(printable(graph.metadata["prompt"]), room, _TITLE, _TITLE_LINES, bold=True)
    *lines, last = [(line, "") for line in prompt]
    beside = text_width(f"{last[0]} {answer}", _TITLE, bold=True) <= room
    lines += [(last[0], answer)] if beside else [last, ("", answer)]
    parts, y = [], 29.0
    for line, end in lines:
        text = words(MARGIN, y, f"{line} " if line else "", colour=INK, size=_TITLE, bold=True)
        parts.append(text.replace("</text>", f'<tspan fill="{_ANSWER}">{escape(end)}</tspan></text>'))
        y += _TITLE_LINE
    return [*parts, words(MARGIN, y - 3.0, fit(_GUIDE, room, FONT))], y + 7.0


def _bands(layout: Layout) -> list[str]:
    """Alternating rows with their titles, and hairlines between columns."""
    parts = []
    for number, row in enumerate(layout.rows):
        if number % 2 == 0:
            parts.append(
                f'<rect x="1" y="{row.start:.1f}" width="{layout.width - 2:.1f}" height="{row.size:.1f}" fill="{_SHADE}"/>'
            )
        size = SMALL_FONT if row.is_empty else FONT
        parts.append(words(10.0, row.start + row.size / 2 + 4, row.title, size=size))
    top = layout.rows[0].size if layout.rows and layout.rows[0].title == "output" else 0.0
    parts += [hairline(column.start, top, column.start, layout.height, _LINE) for column in layout.columns[1:]]
    floor = layout.height - 12.0
    for column in layout.columns:
        if column.is_empty:
            parts.append(words(column.start + column.size / 2, floor, column.title, size=SMALL_FONT, anchor="middle"))
    return parts


def _link(link: Link, points: Sequence[Point]) -> str:
    pieces = " ".join(f"{x:.1f} {y:.1f}" for x, y in points[1:])
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}C{pieces}"
    raises = link.weight > 0
    line = curve(path, on_path=link.on_path, raises=raises, strength=link.strength, title=tooltip(link.tooltip))
    x, y = points[-1]
    return line + arrow_head(x, y, raises=raises) if link.on_path else line


def _tag(link: Link, spot: Area) -> str:
    left, top, right, bottom = spot
    colour = EDGE_COLOURS[link.weight > 0]
    shape = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="4"'
    text = words((left + right) / 2, bottom - 3.2, link.heads, colour=colour, size=SMALL_FONT, anchor="middle")
    return f'<rect {shape} fill="#ffffff" stroke="{colour}" stroke-width="0.8"/>{text}'


def _numbers(picture: Picture, layout: Layout) -> list[str]:
    """The number of every path, at the left edge of the token it begins at."""
    starts = [layout.boxes[items[0]] for _, items in picture.paths]
    return [badge(box.left, box.bottom, number) for number, box in enumerate(starts, start=1)]


def _node(item: Item, box: Box) -> str:
    title = tooltip(item.tooltip)
    if item.kind is NodeKind.ERROR:
        return diamond(box.x, box.top, box.width / 2, title, inclusion=item.inclusion)
    fill, stroke, ink = box_colours(item.kind, on_path=item.on_path, inclusion=item.inclusion)
    looks = f'fill="{fill}" stroke="{stroke}"'
    looks += ' stroke-dasharray="4 2.5"' if item.unexpanded else ""
    looks += ' stroke-width="1.6"' if item.is_target or item.on_path else ""
    area = f'x="{box.left:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    parts = [f'<rect {area} rx="{ROUND if item.kind is NodeKind.FEATURE else SQUARE:g}" {looks}/>']
    y = box.y + 0.35 * FONT - (len(box.lines) - 1) * LINE / 2 - (SMALL_LINE / 2 if box.small else 0.0)
    for number, line in enumerate(box.lines):
        is_name = number < box.n_name
        colour, bold = (INK, True) if is_name else (ink, item.on_path and not box.n_name)
        parts.append(words(box.x, y, line, colour=colour, size=box.font, bold=bold, anchor="middle"))
        y += LINE
    if box.small:
        left = box.x - text_width(box.small, SMALL_FONT) / 2
        has_mark = item.kind is NodeKind.FEATURE
        parts += [mark(left - 2.0, y - 4.5, item.mark)] if has_mark else []
        parts.append(words(left + (5.5 if has_mark else 0.0), y - 1.0, box.small, size=SMALL_FONT))
    return f"<g>{title}{''.join(parts)}</g>"
