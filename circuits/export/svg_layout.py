"""Where everything goes in the token x layer picture: geometry only, in pixels, y downwards.

Columns are prompt positions, rows are layers with inputs at the bottom and outputs on top. The features of one cell are
stacked, and beyond `_STACK` laid side by side; a column is as wide as its labels need, up to a width that makes the
picture fit a page. Errors line up as small diamonds under their cell's features.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from circuits.export.style import picture_rows, row_title
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.text import short_name

FONT = 12.0
LINE = 14.0
_PAD_X, _PAD_Y = 7.0, 4.5
_GAP = 5.0
_STACK = 4
_DIAMOND = 10.0
_ROW_PAD = 17.0  # half of the band between two rows, where edges can be followed
_GUTTER, _MARGIN = 56.0, 14.0
_PAGE = 980.0
_CAPS = (160.0, 146.0, 132.0, 120.0, 110.0, 100.0, 92.0)
_MIN_COLUMN = 34.0
_MIN_WIDTH = 480.0
_WIDTHS = {
    **dict.fromkeys("ijlI.,:;'|!` ", 0.33),
    **dict.fromkeys('ftr()[]{}/-–"\\', 0.43),
    **dict.fromkeys("mwMW@%…→←—", 0.92),
}


@dataclass(frozen=True)
class Box:
    """A placed node: its number in the table, centre, size, and lines of text that fit."""

    node: int
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]

    @property
    def top(self) -> float:
        """y of the upper side, where edges leave."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """y of the lower side, where edges arrive."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Band:
    """A row or column: its title, where it starts, and how far it reaches (y and height, or x and width)."""

    title: str
    start: float
    size: float


@dataclass(frozen=True)
class Layout:
    """The whole drawing area, without title and caption: its top left corner is (0, 0)."""

    boxes: tuple[Box, ...]
    rows: tuple[Band, ...]
    columns: tuple[Band, ...]
    width: float
    height: float


def text_width(text: str, size: float = FONT) -> float:
    """Upper estimate of the width of sans-serif text in pixels; fonts differ, so it leans on a wide one."""
    units = 0.0
    for character in text:
        if unicodedata.east_asian_width(character) in "WF":
            units += 1.02
        else:
            units += _WIDTHS.get(character) or (0.69 if character.isupper() else 0.6)
    return units * size


def fit(text: str, width: float, size: float = FONT) -> str:
    """The text, or its beginning with an ellipsis, no wider than `width`."""
    width += 1e-6  # a box made for this very text must hold it
    if text_width(text, size) <= width:
        return text
    text = text[: int(width)]  # no character is narrower than a pixel
    while text and text_width(text.rstrip(" ,") + "…", size) > width:
        text = text[:-1]
    return text.rstrip(" ,") + "…"


def wrap(text: str, width: float) -> tuple[str, ...]:
    """One or two lines no wider than `width`, broken at an arrow or else between words; what is cut ends in `…`."""
    if fit(text, width) == text:
        return (text,)
    before, arrow, after = text.partition(" → ")
    if arrow:
        return (fit(before, width), fit(f"→ {after}", width))
    words = text.split(" ")
    count = 1
    while count < len(words) and text_width(" ".join(words[: count + 1])) <= width:
        count += 1
    first, rest = " ".join(words[:count]), " ".join(words[count:])
    if text_width(first) <= width and rest:
        return (first, fit(rest, width))
    return (fit(text, width),)


def place(nodes: NodeTable, rank: np.ndarray) -> Layout:
    """Place every node of a table; `rank` (float64[N]) puts the larger first inside a cell."""
    cells = _cells(nodes, rank)
    positions = sorted(set(nodes.position.tolist()))
    outputs = _outputs(nodes, rank)
    for cap in _CAPS:
        columns, widths = _columns(nodes, cells, positions, cap)
        needed = columns[-1].start + columns[-1].size + _MARGIN
        if needed <= _PAGE:
            break
    width = max(needed, _MIN_WIDTH, min(_GUTTER + sum(size + _GAP for _, _, size in outputs) + _MARGIN, _PAGE))
    spare = (width - needed) / len(columns)
    columns = [Band(c.title, c.start + number * spare, c.size + spare) for number, c in enumerate(columns)]
    column_of = dict(zip(positions, columns, strict=True))
    boxes: list[Box] = []
    rows: list[Band] = []
    y = _place_outputs(outputs, width, boxes, rows)
    for row in sorted({row for row, _ in cells}, reverse=True):
        here = {position: rows_ for (at, position), rows_ in cells.items() if at == row}
        y = _place_row(nodes, row, here, column_of, widths, y, boxes, rows)
    return Layout(tuple(boxes), tuple(rows), tuple(columns), width, y)


def _cells(nodes: NodeTable, rank: np.ndarray) -> dict[tuple[int, int], list[int]]:
    """(row, position) -> its nodes except logits, by rank; see `style.picture_rows`."""
    picture_row = picture_rows(nodes)
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    order = np.lexsort((-rank, nodes.kind == NodeKind.TOKEN))  # tokens last: they stand on the floor
    for row in order.tolist():
        if nodes.kind[row] != NodeKind.LOGIT:
            cells[int(picture_row[row]), int(nodes.position[row])].append(row)
    return cells


def _columns(
    nodes: NodeTable, cells: dict[tuple[int, int], list[int]], positions: list[int], cap: float
) -> tuple[list[Band], dict[int, float]]:
    """The columns from left to right, and the width of the boxes in each, none wider than `cap`."""
    bands, widths = [], {}
    x = _GUTTER
    for position in positions:
        here = [rows for (_, at), rows in cells.items() if at == position]
        boxed = [[row for row in rows if nodes.kind[row] != NodeKind.ERROR] for rows in here]
        widest = max((_box_width(short_name(nodes, row), cap) for rows in boxed for row in rows), default=_MIN_COLUMN)
        beside = max((_beside(len(rows)) for rows in boxed), default=1)
        widths[position] = max(widest, _MIN_COLUMN)
        size = beside * widths[position] + (beside - 1) * _GAP + 2 * _GAP
        bands.append(Band(str(position), x, size))
        x += size
    return bands, widths


def _beside(count: int) -> int:
    return max(-(-count // _STACK), 1)


def _box_width(text: str, cap: float) -> float:
    return max(text_width(line) for line in wrap(text, cap - 2 * _PAD_X)) + 2 * _PAD_X


def _outputs(nodes: NodeTable, rank: np.ndarray) -> list[tuple[int, str, float]]:
    """Logits by position and rank: node, text and width."""
    logits = np.flatnonzero(nodes.kind == NodeKind.LOGIT).tolist()
    result = []
    for node in sorted(logits, key=lambda row: (nodes.position[row], -rank[row])):
        text = fit(short_name(nodes, node), 150.0)
        if nodes.probability[node] > 0:
            text = f"{text} {100 * nodes.probability[node]:.3g}%"
        result.append((node, text, max(text_width(text) + 2 * _PAD_X, _MIN_COLUMN)))
    return result


def _place_outputs(outputs: list[tuple[int, str, float]], width: float, boxes: list[Box], rows: list[Band]) -> float:
    """Logits share one band across the whole width, set to the right, where the last position is."""
    if not outputs:
        return 0.0
    height, room = LINE + 2 * _PAD_Y, width - _GUTTER - _MARGIN
    lines: list[list[tuple[int, str, float]]] = [[]]
    for output in outputs:
        if lines[-1] and sum(size + _GAP for _, _, size in lines[-1]) + output[2] > room:
            lines.append([])
        lines[-1].append(output)
    for number, line in enumerate(lines):
        x = width - _MARGIN - sum(size for _, _, size in line) - (len(line) - 1) * _GAP
        for node, text, size in line:
            y = _ROW_PAD + number * (height + _GAP) + height / 2
            boxes.append(Box(node, x + size / 2, y, size, height, (text,)))
            x += size + _GAP
    bottom = 2 * _ROW_PAD + len(lines) * (height + _GAP) - _GAP
    rows.append(Band("output", 0.0, bottom))
    return bottom


def _place_row(
    nodes: NodeTable,
    row: int,
    cells: dict[int, list[int]],
    columns: dict[int, Band],
    widths: dict[int, float],
    start: float,
    boxes: list[Box],
    rows: list[Band],
) -> float:
    """Stack the cells of one row; returns where the next one starts."""
    stacks = {position: _stack(nodes, cell, columns[position], widths[position]) for position, cell in cells.items()}
    tallest = max(height for _, height in stacks.values())
    for stack, height in stacks.values():
        # Inputs stand on the floor of the picture, features hang in the middle of their row.
        shift = start + _ROW_PAD + (tallest - height) * (1.0 if row < 0 else 0.5)
        boxes.extend(replace(box, y=box.y + shift) for box in stack)
    size = tallest + 2 * _ROW_PAD
    rows.append(Band(row_title(row), start, size))
    return start + size


def _stack(nodes: NodeTable, cell: list[int], column: Band, width: float) -> tuple[list[Box], float]:
    """The boxes of one cell around y = 0 downwards, and their height."""
    boxed = [row for row in cell if nodes.kind[row] != NodeKind.ERROR]
    errors = [row for row in cell if nodes.kind[row] == NodeKind.ERROR]
    beside = _beside(len(boxed))
    centre = column.start + column.size / 2
    left = centre - (beside * width + (beside - 1) * _GAP) / 2 + width / 2
    stack, bottom = [], 0.0
    for number in range(beside):
        top = 0.0
        for row in boxed[number::beside]:
            lines = wrap(short_name(nodes, row), width - 2 * _PAD_X)
            height = len(lines) * LINE + 2 * _PAD_Y
            stack.append(Box(row, left + number * (width + _GAP), top + height / 2, width, height, lines))
            top += height + _GAP
        bottom = max(bottom, top)
    for number, row in enumerate(errors):
        x = centre + (number - (len(errors) - 1) / 2) * (_DIAMOND + _GAP)
        stack.append(Box(row, x, bottom + _DIAMOND / 2, _DIAMOND, _DIAMOND, ()))
    return stack, bottom + _DIAMOND if errors else bottom - _GAP
