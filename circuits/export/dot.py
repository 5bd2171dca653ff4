"""DOT text for Graphviz, and pictures where its `dot` program is installed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import graphviz

from circuits.export.picture import Item, Link, Picture, picture_of
from circuits.export.style import (
    EDGE_COLOURS,
    GREY,
    INCLUSION_NOTE,
    QUIET_COLOURS,
    SYMBOLS,
    box_colours,
    link_width,
)
from circuits.export.svg_layout import FONT, GUTTER, SMALL_FONT, Box, Layout, place
from circuits.export.svg_routes import Area, Point, routes, tags
from circuits.export.svg_shapes import ARROW
from circuits.export.text_metrics import wrap
from circuits.graph.edges import GraphData
from circuits.graph.exporters import MissingProgramError, register
from circuits.graph.nodes import NodeKind
from circuits.graph.text import printable

_POINTS, _TEXT, _TITLE = 0.75, 0.62, 14.0
"""Points of a pixel of the layout, and of its text: a little less, because Helvetica may be replaced by a wider font."""
_FONT = "Helvetica"
_PAGE = (10.9, 7.5)
"""Inches of a page within its margins; Graphviz shrinks what is larger."""
_SHADE, _FRAME, _MARGIN = "#fbfbfc", "#e5e8ec", 5.0


@register("dot", suffix=".dot", description="Graphviz text: the picture of `svg`, with its places")
def to_dot(graph: GraphData, *, max_nodes: int = 80) -> Iterator[str]:
    """The boxes and lines of `to_svg` as lines of DOT, with their places, so that Graphviz draws the same picture on one page.

    Every position is a cluster. The edges of the strongest paths are bold and named after their heads; all are coloured by
    sign. Of a larger graph the `max_nodes` most influential nodes are written, and the title says how much was left out.
    Without the attribute `layout` a program of Graphviz finds places of its own.
    """
    picture, facts = picture_of(graph, max_nodes=max_nodes), graph.metadata
    layout = place(picture.items, picture.links, n_layers=facts["n_layers"], n_positions=len(facts["tokens"]))
    curves = routes(picture.links, layout)
    spots = tags(picture.links, curves, layout)
    ids = graph.nodes.ids()
    names = [ids[item.nodes[0]] for item in picture.items]
    dot = graphviz.Digraph("circuit")
    width, height = _PAGE if layout.width > layout.height else _PAGE[::-1]
    dot.attr(layout="nop2", outputorder="edgesfirst", bgcolor="white", size=f"{width},{height}", fontname=_FONT)
    dot.attr("node", fontname=_FONT, shape="box", fixedsize="shape", margin="0")
    dot.attr("edge", arrowsize="0.6", fontname=_FONT, fontsize=f"{SMALL_FONT * _TEXT:g}")
    prompt = wrap(f"{printable(facts['prompt'])} {picture.answer}", 0.9 * layout.width, _TITLE, 4)
    _add_titles(dot, [*prompt, _legend(picture), *_left_out(graph, picture)], layout)
    _add_columns(dot, picture, layout, names)
    for number, (link, curve) in enumerate(zip(picture.links, curves, strict=True)):
        _add_link(dot, link, curve, spots.get(number), names)
    yield from dot


def render(dot: Iterable[str], picture_format: str) -> bytes:
    """DOT text as `svg`, `png` or `pdf`.

    Raises `MissingProgramError` without the `dot` program, and `ValueError` with its words when it fails.
    """
    try:
        return bytes(graphviz.pipe("dot", picture_format, "".join(dot).encode()))
    except graphviz.ExecutableNotFound as error:
        raise MissingProgramError(
            "expected Graphviz's `dot` program on the PATH, given none; install Graphviz or use the `svg` format"
        ) from error
    except graphviz.CalledProcessError as error:
        words = (error.stderr or b"").decode("utf-8", errors="replace").strip()
        raise ValueError(
            f"expected Graphviz to draw the graph as {picture_format}, but `dot` failed ({words})"
        ) from error


for _format in ("svg", "png", "pdf"):
    register(
        f"dot-{_format}", suffix=f".{_format}", description=f"{_format.upper()} drawn by Graphviz", fallback="dot"
    )(lambda graph, picture_format=_format: render(to_dot(graph), picture_format))


def _legend(picture: Picture) -> str:
    """What the signs of the picture mean."""
    meanings = {"circle": "feature", "triangle": "feature of attention", "diamond": "error"}
    marks = {item.mark for item in picture.items}
    signs = [f"{SYMBOLS[mark]} {meaning}" for mark, meaning in meanings.items() if mark in marks]
    signs += [INCLUSION_NOTE] if any(item.inclusion is not None for item in picture.items) else []
    return "   ".join(["bold: strongest paths", "blue raises, orange and dashed lowers", *signs])


def _left_out(graph: GraphData, picture: Picture) -> list[str]:
    missing = {"nodes": len(graph.nodes) - picture.n_nodes, "edges": len(graph.edges) - picture.n_edges}
    counts = [f"{count:,} weaker {name}" for name, count in missing.items() if count]
    return [f"not drawn: {', '.join(counts)}"] if counts else []


def _add_titles(dot: graphviz.Digraph, lines: Sequence[str], layout: Layout) -> None:
    """What the picture is of, above it, and what its rows are."""
    dot.attr(label=_literal(lines, "\\l"), labelloc="t", labeljust="l", fontsize=f"{_TITLE * _POINTS:g}")
    for row in layout.rows:
        look = {
            "shape": "plaintext",
            "fontcolor": GREY,
            "fontsize": f"{(SMALL_FONT if row.is_empty else FONT) * _TEXT:g}",
        }
        dot.node(f"row {row.title}", label=row.title, **look, **_place(GUTTER / 2, row.middle, GUTTER + 20.0, 2 * FONT))


def _add_columns(dot: graphviz.Digraph, picture: Picture, layout: Layout, names: Sequence[str]) -> None:
    """A cluster for every position, around the boxes of its tokens, features and errors; outputs stand above them."""
    columns: dict[int, list[Box]] = defaultdict(list)
    for box in layout.boxes:
        item = picture.items[box.item]
        if item.kind is NodeKind.LOGIT:
            _add_node(dot, item, box, names[box.item])
        else:
            columns[item.position].append(box)
    for position, boxes in sorted(columns.items()):
        with dot.subgraph(name=f"cluster {position}") as column:
            low = min(box.left for box in boxes) - _MARGIN, max(box.bottom for box in boxes) + _MARGIN
            high = max(box.right for box in boxes) + _MARGIN, min(box.top for box in boxes) - _MARGIN
            column.attr(bb=f"{_point(low)},{_point(high)}", color=_FRAME, bgcolor=_SHADE, label="")
            for box in boxes:
                _add_node(column, picture.items[box.item], box, names[box.item])


def _add_node(dot: graphviz.Digraph, item: Item, box: Box, name: str) -> None:
    is_feature = item.kind is NodeKind.FEATURE
    fill, stroke, text = box_colours(item.kind, on_path=item.on_path, inclusion=item.inclusion)
    look = {"fillcolor": fill, "color": stroke, "fontcolor": text, "tooltip": graphviz.escape(item.tooltip)}
    look |= {"penwidth": "1.6"} if item.on_path else {}
    look |= _place(box.x, box.y, box.width, box.height)
    if item.kind is NodeKind.ERROR:
        dot.node(name, label="", style="filled", **look | {"shape": "diamond"})
        return
    style = ["filled", *(["rounded"] if is_feature else []), *(["dashed"] if item.unexpanded else [])]
    small = [f"{SYMBOLS[item.mark]} {box.small}" if is_feature else box.small] if box.small else []
    size = f"{box.font * _TEXT:g}"
    dot.node(name, label=_literal([*box.lines, *small]), style=",".join(style), fontsize=size, **look)


def _add_link(
    dot: graphviz.Digraph, link: Link, curve: Sequence[Point], spot: Area | None, names: Sequence[str]
) -> None:
    raises = link.weight > 0
    colour = (EDGE_COLOURS if link.on_path else QUIET_COLOURS)[raises]
    x, y = curve[-1]
    tip = f"e,{_point((x, y - ARROW))} " if link.on_path else ""
    look = {
        "pos": tip + " ".join(map(_point, curve)),
        "color": colour,
        "penwidth": f"{_POINTS * link_width(link.strength, on_path=link.on_path):.2f}",
        "tooltip": graphviz.escape(link.tooltip),
    }
    look |= {} if raises else {"style": "dashed"}
    look |= {} if link.on_path else {"arrowhead": "none"}
    if spot is not None:
        left, top, right, bottom = spot
        label = f'<<table border="0" cellpadding="1" bgcolor="white"><tr><td>{link.heads}</td></tr></table>>'
        look |= {"label": label, "fontcolor": colour, "lp": _point(((left + right) / 2, (top + bottom) / 2))}
    dot.edge(names[link.source], names[link.target], **look)


def _place(x: float, y: float, width: float, height: float) -> dict[str, str]:
    """A centre in points, and a size in inches."""
    inches = _POINTS / 72
    return {"pos": _point((x, y)), "width": f"{width * inches:.3f}", "height": f"{height * inches:.3f}"}


def _point(point: Point) -> str:
    """A point of the layout in points, y upwards."""
    return f"{point[0] * _POINTS:.1f},{-point[1] * _POINTS:.1f}"


def _literal(lines: Iterable[str], end: str = "\\n") -> str:
    """A few lines, every character of the text taken literally by DOT.

    Args:
        lines: the text.
        end: of each line: `\\n` centres it, `\\l` sets it to the left.
    """
    # Doubled backslashes are literal; nohtml keeps "<b>" from being read as markup.
    text = end.join(line.replace("\\", "\\\\") for line in lines)
    return graphviz.nohtml(text + end if end == "\\l" else text)
