"""Where the boxes of a picture go: geometry only, in pixels, y downwards.

Columns are prompt positions in reading order, rows are layers with inputs at the bottom and outputs on top. Inside a cell
the boxes of the strongest paths stand side by side, so that nothing lies above or below them, and the others are stacked
beside them. Layers that hold nothing share a thin band, and so do tokens that are not drawn.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from circuits.export.picture import Item, Link
from circuits.export.style import row_title
from circuits.export.text_metrics import fit, text_width, wrap
from circuits.graph.nodes import NodeKind

FONT, QUIET_FONT, SMALL_FONT = 12.0, 11.0, 10.0
LINE, SMALL_LINE = 14.0, 12.0
GUTTER, MARGIN = 58.0, 18.0
_PAD_X, _PAD_Y = 7.0, 5.0
_GAP, _BESIDE, _COLUMN_GAP = 8.0, 12.0, 14.0
_DIAMOND = 10.0
_BAND = 24.0  # half of the clear band between two rows, where links can be followed
_EMPTY, _SKIPPED = 18.0, 26.0  # height of a row and width of a column that stand for what is not drawn
_LINES = (3, 4, 6)
"""Lines of a label, the fewest that hold it whole, or the most."""
_MOST_PERMUTED = 5
_WIDTHS = (100.0, 116.0, 134.0, 150.0, 164.0)
"""Widths of boxes that are tried for a label."""
_PAGE = 1300.0
_SHAPES = ((164.0, 3), (150.0, 4), (134.0, 4), (116.0, 5))
"""Greatest width of a box and most boxes in a stack: the first with which the picture fits the page, or the last."""
_LEAST_TEXT, _LONGEST_TOKEN, _MARK = 22.0, 150.0, 11.0
MIN_WIDTH = 640.0


@dataclass(frozen=True)
class Box:
    """A placed item: its number, centre, size, and lines of text that fit."""

    item: int
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...] = ()
    n_name: int = 0
    """How many of the lines, from the first, are the item's name."""
    small: str = ""
    font: float = FONT

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        """y of the upper side, where links leave."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """y of the lower side, where links arrive."""
        return self.y + self.height / 2


@dataclass(frozen=True)
class Band:
    """A row or column: its title, where it starts and how far it reaches (y and height, or x and width)."""

    title: str
    start: float
    size: float
    is_empty: bool = False
    """Whether it stands for layers or tokens of which nothing is drawn."""

    @property
    def middle(self) -> float:
        return self.start + self.size / 2

    @property
    def stop(self) -> float:
        return self.start + self.size


@dataclass(frozen=True)
class Layout:
    """The whole drawing area, without title and caption: its top left corner is (0, 0)."""

    boxes: tuple[Box, ...]
    """In the order of the items."""
    rows: tuple[Band, ...]
    """From the top."""
    columns: tuple[Band, ...]
    width: float
    height: float


def place(items: Sequence[Item], links: Sequence[Link], *, n_layers: int, n_positions: int) -> Layout:
    """Place every item; of a cell, items that come first in the sequence are higher, and the links of paths are short."""
    cells = _cells(items)
    positions = sorted({item.position for item in items})
    for most, height in _SHAPES:
        stacks = {key: _stacks(items, cell, most, height) for key, cell in cells.items()}
        columns = _columns(stacks, positions, n_positions)
        if columns[-1].stop + MARGIN <= _PAGE:
            break
    outputs = _outputs(items)
    width = max(
        columns[-1].stop + MARGIN, MIN_WIDTH, GUTTER + min(sum(box.width + _GAP for box in outputs), _PAGE) + MARGIN
    )
    columns = _spread(columns, width - MARGIN - columns[-1].stop)
    column_of = {int(column.title): column for column in columns if not column.is_empty}
    _uncross(stacks, column_of, links)
    boxes: list[Box] = []
    rows = [_place_outputs(outputs, column_of, width, boxes)] if outputs else []
    for row in _rows(items, n_layers):
        start = rows[-1].stop if rows else 0.0
        if isinstance(row, str):
            rows.append(Band(row, start, _EMPTY, is_empty=True))
        else:
            here = {position: stack for (at, position), stack in stacks.items() if at == row}
            rows.append(_place_row(row, here, column_of, start, boxes))
    boxes.sort(key=lambda box: box.item)
    return Layout(tuple(boxes), tuple(rows), tuple(columns), width, rows[-1].stop)


def _cells(items: Sequence[Item]) -> dict[tuple[int, int], list[int]]:
    """(row, position) -> numbers of its items, outputs left out."""
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        if item.kind is not NodeKind.LOGIT:
            cells[item.row, item.position].append(number)
    return cells


def _font(item: Item) -> float:
    return FONT if item.on_path or item.kind is not NodeKind.FEATURE else QUIET_FONT


def _lines(item: Item, most: float) -> tuple[str, ...]:
    """The label in the narrowest box that holds it whole in few lines, or the beginning of it in one of the width `most`."""
    for n_lines in _LINES:
        for width in [*(width for width in _WIDTHS if width < most), most]:
            lines = wrap(item.text, width - 2 * _PAD_X, _font(item), n_lines, bold=item.on_path)
            if "".join("".join(lines).split()) == "".join(item.text.split()):
                return lines
    return lines


def _box(items: Sequence[Item], number: int, most: float) -> Box:
    """A box as wide as its text, around (0, 0)."""
    item = items[number]
    if item.kind is NodeKind.ERROR:
        return Box(number, 0.0, 0.0, _DIAMOND, _DIAMOND)
    font, bold = _font(item), item.on_path
    lines = _lines(item, most if item.kind is NodeKind.FEATURE else _LONGEST_TOKEN)
    name = wrap(item.name, most - 2 * _PAD_X, font, _LINES[0], bold=True) if item.name else ()
    small = fit(item.small, most - 2 * _PAD_X - _MARK, SMALL_FONT)
    widths = [text_width(line, font, bold=bold) for line in lines] + [
        text_width(line, font, bold=True) for line in name
    ]
    widths += [text_width(small, SMALL_FONT) + (_MARK if item.kind is NodeKind.FEATURE else 0.0), _LEAST_TEXT]
    height = (len(name) + len(lines)) * LINE + (SMALL_LINE if small else 0.0) + 2 * _PAD_Y
    return Box(number, 0.0, 0.0, max(widths) + 2 * _PAD_X, height, name + lines, len(name), small, font)


def _stacks(items: Sequence[Item], cell: Sequence[int], most: float, height: int) -> list[list[Box]]:
    """The boxes of a cell: one stack for each box of a path, then the others in even stacks of at most `height`."""
    boxes = [_box(items, number, most) for number in cell]
    if items[cell[0]].row < 0:
        return [boxes]
    stacks = [[box] for box in boxes if items[box.item].on_path]
    quiet = [box for box in boxes if not items[box.item].on_path and box.lines]
    n_stacks = -(-len(quiet) // height)
    stacks += [quiet[len(quiet) * n // n_stacks : len(quiet) * (n + 1) // n_stacks] for n in range(n_stacks)]
    errors = [box for box in boxes if not items[box.item].on_path and not box.lines]
    if errors and quiet:
        stacks[-1] = stacks[-1] + errors
    elif errors:
        stacks.append(errors)
    return [[replace(box, width=_size(stack)) if box.lines else box for box in stack] for stack in stacks]


def _size(stack: Sequence[Box]) -> float:
    return max(box.width for box in stack)


def _width(stacks: Sequence[Sequence[Box]]) -> float:
    return sum(map(_size, stacks)) + (len(stacks) - 1) * _BESIDE


def _height(stack: Sequence[Box]) -> float:
    return sum(box.height for box in stack) + (len(stack) - 1) * _GAP


def _columns(stacks: dict[tuple[int, int], list[list[Box]]], positions: Sequence[int], n_positions: int) -> list[Band]:
    """The columns from left to right, titled with their positions; a narrow one with a number stands for tokens left out."""
    columns, x, last = [], GUTTER, -1
    for position in [*positions, n_positions]:
        if missing := position - last - 1:
            columns.append(Band(f"+{missing}", x, _SKIPPED, is_empty=True))
            x = columns[-1].stop
        last = position
        here = [_width(cell) for (_, at), cell in stacks.items() if at == position]
        if here or position < n_positions:
            columns.append(Band(str(position), x, max(here, default=_DIAMOND) + _COLUMN_GAP))
            x = columns[-1].stop
    return columns


def _spread(columns: Sequence[Band], spare: float) -> list[Band]:
    """The columns, each wider by its part of the spare width."""
    wider = spare / len(columns)
    return [
        replace(column, start=column.start + n * wider, size=column.size + wider) for n, column in enumerate(columns)
    ]


def _uncross(stacks: dict[tuple[int, int], list[list[Box]]], columns: dict[int, Band], links: Sequence[Link]) -> None:
    """Order the boxes of paths inside each cell, in place, so that the links of paths are as short as they can be."""
    where: dict[int, float] = {}
    ends: dict[int, list[int]] = defaultdict(list)
    for link in links:
        if link.on_path:
            ends[link.source].append(link.target)
            ends[link.target].append(link.source)

    def spots(cell: Sequence[Sequence[Box]], column: Band) -> dict[int, float]:
        lefts = itertools.accumulate(
            (_size(stack) + _BESIDE for stack in cell), initial=column.middle - _width(cell) / 2
        )
        return {box.item: left + _size(stack) / 2 for left, stack in zip(lefts, cell, strict=False) for box in stack}

    def reach(cell: Sequence[Sequence[Box]], column: Band) -> float:
        here = spots(cell, column)
        return sum((abs(x - where[other]) for item, x in here.items() for other in ends[item] if other in where), 0.0)

    for key in [*sorted(stacks)] * 2:
        n_paths, column = sum(len(stack) == 1 and bool(ends[stack[0].item]) for stack in stacks[key]), columns[key[1]]
        if 1 < n_paths <= _MOST_PERMUTED:
            orders = itertools.permutations(stacks[key][:n_paths])
            stacks[key] = min(
                ([*order, *stacks[key][n_paths:]] for order in orders), key=lambda cell: reach(cell, column)
            )
        where |= spots(stacks[key], column)


def _rows(items: Sequence[Item], n_layers: int) -> list[int | str]:
    """Rows from the top; in the place of layers that hold nothing, the title of the band that they share."""
    used = sorted({item.row for item in items if item.kind is not NodeKind.LOGIT}, reverse=True)
    rows: list[int | str] = []
    above = max([n_layers, *(row // 2 + 1 for row in used)])
    for row in used:
        layer = row // 2  # of inputs, -1
        if above - layer > 1:
            rows.append(f"{layer + 1}–{above - 1}: none" if above - layer > 2 else f"layer {layer + 1}: none")
        rows.append(row)
        above = layer
    return rows


def _outputs(items: Sequence[Item]) -> list[Box]:
    """The boxes of outputs by position and influence."""
    numbers = [number for number, item in enumerate(items) if item.kind is NodeKind.LOGIT]
    return [_box(items, number, _PAGE) for number in sorted(numbers, key=lambda n: items[n].position)]


def _place_outputs(outputs: Sequence[Box], columns: dict[int, Band], width: float, boxes: list[Box]) -> Band:
    """Outputs share one band across the whole width, in lines that are centred above the column of the last of them."""
    room = width - GUTTER - MARGIN
    lines: list[list[Box]] = [[]]
    for box in outputs:
        if lines[-1] and _width([[placed] for placed in [*lines[-1], box]]) > room:
            lines.append([])
        lines[-1].append(box)
    height = max(box.height for box in outputs)
    for number, line in enumerate(lines):
        size = _width([[box] for box in line])
        x = min(max(columns[max(columns)].middle - size / 2, GUTTER), width - MARGIN - size)
        for box in line:
            y = _BAND / 2 + number * (height + _GAP) + height / 2
            boxes.append(replace(box, x=x + box.width / 2, y=y))
            x += box.width + _BESIDE
    return Band("output", 0.0, 1.5 * _BAND + len(lines) * (height + _GAP) - _GAP)


def _place_row(
    row: int, cells: dict[int, list[list[Box]]], columns: dict[int, Band], start: float, boxes: list[Box]
) -> Band:
    """Place the cells of one row below `start`: inputs at its floor, everything else around its middle."""
    tallest = max(_height(stack) for cell in cells.values() for stack in cell)
    below = _BAND if row >= 0 else _BAND / 2
    for position, cell in cells.items():
        x = columns[position].middle - _width(cell) / 2
        for stack in cell:
            size = _size(stack)
            y = start + _BAND + (tallest - _height(stack)) * (0.5 if row >= 0 else 1.0)
            for box in stack:
                boxes.append(replace(box, x=x + size / 2, y=y + box.height / 2))
                y += box.height + _GAP
            x += size + _BESIDE
    return Band(row_title(row), start, _BAND + tallest + below)
