"""What stands below a picture: its strongest paths in words, what its signs mean, its scores, and what is not drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from circuits.export.picture import Picture
from circuits.export.style import INCLUSION_NOTE, INK, MARKS, NODE_COLOURS, box_colours
from circuits.export.svg_layout import FONT, MARGIN, SMALL_FONT
from circuits.export.svg_shapes import ARROW, ROUND, SQUARE, arrow_head, badge, curve, diamond, hairline, mark, words
from circuits.export.text_metrics import fit, text_width
from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import HINT
from circuits.graph.nodes import NodeKind
from circuits.graph.scores import scores

_PATHS_TITLE = "Strongest path of each important token, with its share of all influence on the output"
_LINE = 19.0
_ARROW = 34.0
_RULE = "#e5e8ec"

Sign = tuple[float, str, Callable[[float, float], str]]
"""Width of a sign, its meaning, and what draws it at (x, y)."""


def foot(graph: GraphData, picture: Picture, width: float, top: float) -> tuple[list[str], float]:
    """The elements below a picture that ends at `top`, and where they end."""
    parts, y = [hairline(1.0, top, width - 1, top, _RULE)], top + 22.0
    if picture.paths:
        together = f" ({100 * sum(share for share, _ in picture.paths):.2g} % together)"
        parts.append(words(MARGIN, y, _PATHS_TITLE + together, bold=True))
        y += _LINE + 2.0
        for number, (share, items) in enumerate(picture.paths, start=1):
            lines, y = _path(picture, number, share, items, width, y)
            parts += lines
        parts.append(hairline(MARGIN, y - 9.0, width - MARGIN, y - 9.0, _RULE))
        y += 10.0
    signs, y = _flow(list(_signs(picture)), width, y)
    parts += signs
    for phrases in _caption(graph, picture):
        for line in _lines(phrases, width - 2 * MARGIN):
            parts.append(words(MARGIN, y, line, colour=INK))
            y += _LINE
    return parts, y - 3.0


def _path(
    picture: Picture, number: int, share: float, items: Sequence[int], width: float, y: float
) -> tuple[list[str], float]:
    """One path in words, in as many lines as it needs."""
    raises = {(link.source, link.target): link.weight > 0 for link in picture.links}
    parts = [badge(MARGIN + 7.5, y - 4.0, number), words(MARGIN + 22, y, f"{100 * share:.2g} %", colour=INK)]
    x = left = MARGIN + 76.0
    for before, item in zip([None, *items[:-1]], items, strict=True):
        text = picture.items[item].name or picture.items[item].text
        text = fit(text, width - left - MARGIN - 120.0, FONT)
        is_feature = picture.items[item].kind is NodeKind.FEATURE
        id_ = picture.items[item].small.partition(" · ")[0] if is_feature else ""
        size = text_width(text, FONT) + (text_width(id_, SMALL_FONT) + 5.0 if id_ else 0.0) + 12.0
        if x > left and x + _ARROW + size > width - MARGIN:
            x, y = left + 16.0, y + _LINE + 3.0
        if before is not None:
            parts.append(_arrow(x + 4.0, y - 4.0, _ARROW - 8.0, raises=raises[before, item]))
            x += _ARROW
        fill, stroke, _ = NODE_COLOURS[picture.items[item].kind]
        area = (
            f'x="{x:.1f}" y="{y - 13:.1f}" width="{size:.1f}" height="18" rx="{ROUND - 2 if is_feature else SQUARE:g}"'
        )
        parts.append(f'<rect {area} fill="{fill}" stroke="{stroke}"/>')
        parts.append(words(x + 6.0, y, text, colour=INK))
        if id_:
            parts.append(words(x + size - 6.0, y, id_, size=SMALL_FONT, anchor="end"))
        x += size
    return parts, y + _LINE + 3.0


def _signs(picture: Picture) -> Iterator[Sign]:
    """The signs of what is drawn."""
    loud, quiet = ([link for link in picture.links if link.on_path is on_path] for on_path in (True, False))
    for raises, meaning in ((True, "raises its target"), (False, "lowers its target")):
        if any((link.weight > 0) is raises for link in loud):
            yield 34.0, f"strongest path, {meaning}", functools.partial(_bold, raises=raises)
    if quiet:
        dashed = " (dashed: lowers)" if any(link.weight < 0 for link in quiet) else ""
        yield 26.0, f"other influence{dashed}", _thin
    kinds = {item.kind for item in picture.items}
    marks = {item.mark for item in picture.items if item.kind is NodeKind.FEATURE}
    for shape in sorted(marks):
        kind = "feature" if shape == MARKS[NodeKind.FEATURE] else "feature of attention"
        yield 11.0, f"{kind}: fires on → promotes; layer/number · activation", functools.partial(_mark, shape=shape)
    if any(item.text.startswith(HINT) for item in picture.items):
        yield 0.0, f"{HINT.strip()}: a guess from weights", _nothing
    if any(link.heads for link in loud):
        yield 0.0, "L1H2: carried by attention head 2 of layer 1", _nothing
    if any(item.kind is NodeKind.LOGIT and len(item.nodes) > 1 for item in picture.items):
        yield 0.0, "group of outputs: its lines and shares are sums over its members", _nothing
    if NodeKind.ERROR in kinds:
        yield 16.0, "error: what no feature explains", _error
    if any(item.unexpanded for item in picture.items):
        yield 28.0, "causes not traced", functools.partial(_frame, dashed=True)
    if any(item.inclusion is not None for item in picture.items):
        yield 54.0, INCLUSION_NOTE, _fading


def _arrow(x: float, y: float, length: float, *, raises: bool) -> str:
    """A path link from left to right."""
    line = curve(f"M{x:.1f} {y:.1f}h{length - ARROW:.1f}", on_path=True, raises=raises, strength=0.2)
    end = x + length
    return f'{line}<g transform="rotate(90 {end:.1f} {y:.1f})">{arrow_head(end, y, raises=raises)}</g>'


def _bold(x: float, y: float, *, raises: bool) -> str:
    return _arrow(x, y - 4.0, 28.0, raises=raises)


def _error(x: float, y: float) -> str:
    return diamond(x + 5.0, y - 9.0, 5.0)


def _nothing(_x: float, _y: float) -> str:
    return ""


def _thin(x: float, y: float) -> str:
    return curve(f"M{x:.1f} {y - 4:.1f}h22", on_path=False, raises=True, strength=0.5)


def _mark(x: float, y: float, *, shape: str) -> str:
    return mark(x + 4.0, y - 4.0, shape)


def _fading(x: float, y: float) -> str:
    return _frame(x, y, inclusion=1.0) + _frame(x + 26.0, y, inclusion=0.0)


def _frame(x: float, y: float, *, dashed: bool = False, inclusion: float | None = None) -> str:
    fill, stroke, _ = box_colours(NodeKind.FEATURE, inclusion=inclusion)
    dash = ' stroke-dasharray="4 2.5"' if dashed else ""
    return f'<rect x="{x:.1f}" y="{y - 11:.1f}" width="22" height="14" rx="4" fill="{fill}" stroke="{stroke}"{dash}/>'


def _flow(signs: Sequence[Sign], width: float, y: float) -> tuple[list[str], float]:
    """Signs and their meanings one after the other, in as many lines as they need."""
    parts, x = [], MARGIN
    for size, meaning, draw in signs:
        reach = size + text_width(meaning, FONT)
        if x > MARGIN and x + reach > width - MARGIN:
            x, y = MARGIN, y + _LINE
        parts += [draw(x, y), words(x + size, y, meaning)]
        x += reach + 22.0
    return parts, y + _LINE + 3.0


def _lines(phrases: Sequence[str], width: float) -> list[str]:
    """Phrases one after the other, in as many lines as they need; a phrase wider than a line is cut."""
    lines: list[str] = []
    for phrase in phrases:
        longer = f"{lines[-1]}  ·  {phrase}" if lines else phrase
        if lines and text_width(longer, FONT) <= width:
            lines[-1] = longer
        else:
            lines.append(phrase)
    return [fit(line, width, FONT) for line in lines]


def _caption(graph: GraphData, picture: Picture) -> list[list[str]]:
    """Scores, and counts with the identity error."""
    result, error = scores(graph), graph.metadata["identity_error"]
    n_nodes, n_edges = len(graph.nodes), len(graph.edges)
    missing = {"nodes": n_nodes - picture.n_nodes, "edges": n_edges - picture.n_edges}
    left_out = [f"{count:,} weaker {name}" for name, count in missing.items() if count]
    counts = [
        f"{n_nodes:,} nodes",
        f"{n_edges:,} edges",
        f"not drawn: {', '.join(left_out)}" if left_out else "all drawn",
    ]
    exact = "not known" if error is None else f"{float(error):.1e}"
    return [
        [
            f"replacement {result.replacement:.3f} (share of the output traced to the tokens)",
            f"completeness {result.completeness:.3f} (share of inputs that are not errors)",
        ],
        [*counts, f"identity error {exact}"],
    ]
