"""The token x layer picture of a circuit as SVG. Needs no program, font or script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from circuits.export.style import EDGE_COLOURS, NODE_COLOURS, emphasis, head_tags
from circuits.export.svg_layout import FONT, LINE, Box, Layout, fit, place, text_width
from circuits.graph.edges import Edges, GraphData
from circuits.graph.exporters import register
from circuits.graph.influence import edge_influence, node_influence
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.scores import scores
from circuits.graph.text import full_name, printable
from replacement.number_checks import integer

_FONTS = "-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_HEAD, _FOOT = 50.0, 56.0
_GREY, _INK, _LINE = "#6b7280", "#1f2933", "#e5e8ec"
_MAX_EDGES = 400
_FEW_TOKENS = 24
_MAX_TAGS, _TAG = 24, 9.0

Curve = tuple[float, float, float, float]
"""x and y of the start of an edge, on top of its source, and of its end, below its target."""


@register("svg", suffix=".svg", description="picture, tokens x layers; needs no program")
def to_svg(graph: GraphData, *, max_nodes: int = 80) -> str:
    """The circuit drawn on a white card: positions across, layers upwards, edges coloured by sign.

    Of a larger graph the `max_nodes` most influential nodes are drawn, and the caption says how many were left out.
    Raises `ValueError` when `max_nodes` is below 1.
    """
    if integer("max_nodes", max_nodes) < 1:
        raise ValueError(f"max_nodes: expected at least 1, given {max_nodes}")
    influence = node_influence(graph)
    shown = _shown(graph.nodes, influence, max_nodes)
    rank = (influence + graph.nodes.output_weight)[shown]
    edge_mask, crossing = _shown_edges(graph, shown)
    drawn = graph.select(shown, edge_mask)
    layout = place(drawn.nodes, rank)
    curves = _curve_ends(drawn.edges, layout)
    tags = head_tags(drawn, crossing, most=_MAX_TAGS)
    width, height = layout.width, layout.height + _HEAD + _FOOT
    caption = _caption(graph, drawn_nodes=len(drawn.nodes), drawn_edges=len(drawn.edges))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{_FONTS}" font-size="{FONT:g}">',
        f"<title>{_text('Circuit of: ' + graph.metadata['prompt'])}</title>",
        _card(width, height),
        _title(graph, width),
        f'<g transform="translate(0 {_HEAD:g})">',
        *_bands(layout),
        *_edges(drawn, crossing, curves),
        *(_node(drawn.nodes, box, influence[shown]) for box in layout.boxes),
        *_tags(tags, curves, layout),
        "</g>",
        *_footer(drawn.nodes, caption, layout, heads=bool(tags)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _card(width: float, height: float) -> str:
    size = f'width="{width - 1:.0f}" height="{height - 1:.0f}"'
    return f'<rect x="0.5" y="0.5" {size} rx="12" fill="#ffffff" stroke="#d7dbe0"/>'


def _text(text: str) -> str:
    return escape(printable(text))


def _shown(nodes: NodeTable, influence: np.ndarray, max_nodes: int) -> np.ndarray:
    """bool[N]: targets, tokens of a short prompt, and the most influential others up to `max_nodes` in all.

    Of a long prompt, the tokens of columns that show something else are added: a column needs its word.
    """
    always = nodes.mask(NodeKind.LOGIT) | nodes.is_target
    if nodes.mask(NodeKind.TOKEN).sum() <= _FEW_TOKENS:
        always |= nodes.mask(NodeKind.TOKEN)
    others = np.flatnonzero(~always)
    room = max(max_nodes - int(always.sum()), 0)
    shown = always.copy()
    shown[others[np.argsort(-influence[others], kind="stable")[:room]]] = True
    return shown | (nodes.mask(NodeKind.TOKEN) & np.isin(nodes.position, nodes.position[shown]))


def _shown_edges(graph: GraphData, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool[E] of the edges to draw, and the influence of those."""
    edges, influence = graph.edges, edge_influence(graph)
    mask = shown[edges.target] & shown[edges.source] & (influence > 0)
    order = np.argsort(-np.where(mask, influence, -1.0), kind="stable")
    mask[order[_MAX_EDGES:]] = False
    return mask, influence[mask]


def _title(graph: GraphData, width: float) -> str:
    nodes = graph.nodes
    top = int(np.argmax(nodes.output_weight))
    prompt = printable(graph.metadata["prompt"])
    answer = printable(nodes.label[top]).strip() if nodes.kind[top] == NodeKind.LOGIT else ""
    tail = f" → {fit(answer, 160.0, 15.0) if answer else fit(full_name(nodes, top), 260.0, 15.0)}"
    head = fit(prompt, width - 36.0 - text_width(tail, 15.0) * 1.1, 15.0)
    return (
        f'<text x="18" y="31" font-size="15" font-weight="600" fill="{_INK}" xml:space="preserve">{escape(head)}'
        f'<tspan fill="#b98900">{escape(tail)}</tspan></text>'
    )


def _bands(layout: Layout) -> list[str]:
    """Alternating rows with their titles, and hairlines between columns."""
    parts = []
    for number, row in enumerate(layout.rows):
        if number % 2 == 0:
            area = f'y="{row.start:.1f}" width="{layout.width - 2:.1f}" height="{row.size:.1f}"'
            parts.append(f'<rect x="1" {area} fill="#f8f9fb"/>')
        parts.append(_words(10.0, row.start + row.size / 2 + 4, row.title))
    top = layout.rows[0].size if layout.rows and layout.rows[0].title == "output" else 0.0
    hairlines = (_line(column.start, column.start, top, layout.height, stroke=_LINE) for column in layout.columns[1:])
    return [*parts, *hairlines]


def _words(x: float, y: float, text: str, *, colour: str = _GREY) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" xml:space="preserve">{escape(text)}</text>'


def _line(x1: float, x2: float, y1: float, y2: float, *, stroke: str, width: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width:g}"/>'


def _edges(graph: GraphData, influence: np.ndarray, curves: Sequence[Curve]) -> list[str]:
    """Curves from the top of a source to the bottom of its target, weakest first."""
    nodes, edges = graph.nodes, graph.edges
    source, target = edges.source.tolist(), edges.target.tolist()
    strength = emphasis(influence)
    parts = []
    for number in np.argsort(strength, kind="stable").tolist():
        x1, y1, x2, y2 = curves[number]
        bend = max(0.5 * (y1 - y2), 14.0)
        weight, share = float(edges.weight[number]), float(strength[number])
        names = f"{full_name(nodes, source[number])} → {full_name(nodes, target[number])}: {weight:+.4g}"
        names += f" ({graph.heads.text(number)})" if graph.heads is not None else ""
        curve = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 - bend:.1f} {x2:.1f} {y2 + bend:.1f} {x2:.1f} {y2:.1f}"
        parts.append(
            f'<path d="{curve}" fill="none" stroke="{EDGE_COLOURS[weight > 0]}" '
            f'stroke-width="{0.5 + 3.5 * share:.2f}" stroke-opacity="{0.06 + 0.74 * share:.2f}">'
            f"<title>{_text(names)}</title></path>"
        )
    return parts


def _curve_ends(edges: Edges, layout: Layout) -> list[Curve]:
    box = {placed.node: placed for placed in layout.boxes}
    source, target = edges.source.tolist(), edges.target.tolist()
    starts, stops = _ports(source, target, box), _ports(target, source, box)
    return [
        (x1, box[below].top, x2, box[above].bottom)
        for x1, x2, below, above in zip(starts, stops, source, target, strict=True)
    ]


def _tags(tags: dict[int, str], curves: Sequence[Curve], layout: Layout) -> list[str]:
    """Heads named on the curves they carry, where there is room: between rows, away from boxes and other names."""
    parts: list[str] = []
    taken = [(b.x - b.width / 2, b.top, b.x + b.width / 2, b.bottom) for b in layout.boxes]
    for edge, tag in tags.items():
        x1, y1, x2, y2 = curves[edge]
        half = text_width(tag, _TAG) / 2 + 2
        for t in (0.5, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8):
            # A cubic curve whose control points share their ends' x and meet half-way in y.
            along, mid = t * t * (3 - 2 * t), (y1 + y2) / 2
            x = x1 + (x2 - x1) * along
            y = (1 - t) ** 3 * y1 + 3 * t * (1 - t) * mid + t**3 * y2
            area = (x - half, y - 6.0, x + half, y + 6.0)
            if not any(a[0] < area[2] and area[0] < a[2] and a[1] < area[3] and area[1] < a[3] for a in taken):
                taken.append(area)
                parts.append(
                    f'<rect x="{area[0]:.1f}" y="{area[1]:.1f}" width="{2 * half:.1f}" height="12" rx="3" fill="#ffffff" '
                    f'fill-opacity="0.85"/><text x="{x:.1f}" y="{y + 3:.1f}" font-size="{_TAG:g}" text-anchor="middle" '
                    f'fill="#374151">{escape(tag)}</text>'
                )
                break
    return parts


def _ports(ends: list[int], others: list[int], box: dict[int, Box]) -> list[float]:
    """x of each edge at its end `ends[i]`: spread over the box in the order of the other ends, so that few cross."""
    ports = [0.0] * len(ends)
    by_end: dict[int, list[int]] = {}
    for number, end in enumerate(ends):
        by_end.setdefault(end, []).append(number)
    for end, numbers in by_end.items():
        numbers.sort(key=lambda number: box[others[number]].x)
        spread = 0.6 * box[end].width if box[end].lines else 0.0
        for rank, number in enumerate(numbers):
            ports[number] = box[end].x + spread * ((rank + 0.5) / len(numbers) - 0.5)
    return ports


def _node(nodes: NodeTable, box: Box, influence: np.ndarray) -> str:
    kind = NodeKind(int(nodes.kind[box.node]))
    fill, stroke, ink = NODE_COLOURS[kind]
    facts = [full_name(nodes, box.node)]
    if kind is NodeKind.FEATURE and nodes.activation[box.node]:  # 0 where a graph of another tool does not say it
        facts.append(f"activation {nodes.activation[box.node]:.3g}")
    if kind is not NodeKind.LOGIT:
        facts.append(f"influence {100 * influence[box.node]:.3g}%")
    title = f"<title>{_text('; '.join(facts))}</title>"
    if kind is NodeKind.ERROR:
        half = box.width / 2
        corners = f"M{box.x:.1f} {box.top:.1f}l{half:g} {half:g}l-{half:g} {half:g}l-{half:g} -{half:g}z"
        return f'<path d="{corners}" fill="{fill}" stroke="{stroke}">{title}</path>'
    dashed = ' stroke-dasharray="4 2.5"' if nodes.unexpanded[box.node] else ""
    heavy = ' stroke-width="2"' if nodes.is_target[box.node] else ""
    shape = (
        f'<rect x="{box.x - box.width / 2:.1f}" y="{box.top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="{min(box.height / 2, 8.0):g}" fill="{fill}" stroke="{stroke}"{dashed}{heavy}/>'
    )
    first = box.y - (len(box.lines) - 1) * LINE / 2 + FONT * 0.35
    text = "".join(
        f'<text x="{box.x:.1f}" y="{first + number * LINE:.1f}" text-anchor="middle" fill="{ink}">{escape(line)}</text>'
        for number, line in enumerate(box.lines)
    )
    return f"<g>{title}{shape}{text}</g>"


def _caption(graph: GraphData, *, drawn_nodes: int, drawn_edges: int) -> str:
    result = scores(graph)
    n_nodes, n_edges = len(graph.nodes), len(graph.edges)
    error = graph.metadata["identity_error"]
    facts = (
        f"replacement {result.replacement:.3f}",
        f"completeness {result.completeness:.3f}",
        f"{n_nodes} nodes" if drawn_nodes == n_nodes else f"{drawn_nodes} of {n_nodes} nodes drawn",
        f"{n_edges} edges" if drawn_edges == n_edges else f"{drawn_edges} of {n_edges} edges drawn",
        f"identity error {'not known' if error is None else format(float(error), '.1e')}",
    )
    return "  ·  ".join(facts)


def _footer(nodes: NodeTable, caption: str, layout: Layout, *, heads: bool) -> list[str]:
    """Legend (only of what is drawn), and the caption below it."""
    x, y = 18.0, layout.height + _HEAD + 20
    parts = [_line(1.0, layout.width - 1, y - 19, y - 19, stroke=_LINE)]
    for positive, text in ((True, "raises its target"), (False, "lowers its target")):
        parts.append(_line(x, x + 22, y - 4, y - 4, stroke=EDGE_COLOURS[positive], width=3.0))
        parts.append(_words(x + 28, y, text))
        x += 40 + text_width(text)
    if nodes.mask(NodeKind.ERROR).any():
        fill, stroke, _ = NODE_COLOURS[NodeKind.ERROR]
        parts.append(f'<path d="M{x + 5:.1f} {y - 9:.1f}l5 5l-5 5l-5 -5z" fill="{fill}" stroke="{stroke}"/>')
        parts.append(_words(x + 16, y, "error (not reconstructed)"))
        x += 28 + text_width("error (not reconstructed)")
    if nodes.unexpanded.any():
        fill, stroke, _ = NODE_COLOURS[NodeKind.FEATURE]
        area = f'x="{x:.1f}" y="{y - 11:.1f}" width="22" height="14"'
        parts.append(f'<rect {area} rx="6" fill="{fill}" stroke="{stroke}" stroke-dasharray="4 2.5"/>')
        parts.append(_words(x + 28, y, "causes not traced"))
        x += 40 + text_width("causes not traced")
    if heads:
        parts.append(_words(x, y, "L1H2: carried by head 2 of layer 1"))
    parts.append(_words(18.0, y + 21, caption, colour=_INK))
    return parts
