"""How links run through a placed picture: curves from the top of a box to the bottom of another, and tags that sit on them.

A link of a path never lies behind a box: where the direct curve would, the link climbs through the gaps between the boxes of
the rows on its way and moves sideways only in the clear bands between rows. Other links are single curves behind the boxes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from circuits.export.picture import Link
from circuits.export.svg_layout import SMALL_FONT, Band, Box, Layout
from circuits.export.svg_shapes import ARROW
from circuits.export.text_metrics import text_width

Point = tuple[float, float]
Area = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Lanes = dict[Band, list[tuple[float, float]]]
"""Ranges of x in which path links climb through a row."""

_CLEARANCE = 4.0
_LANE = 7.0
"""Least distance of two path links that climb through the same row."""
_STEP = 6.0
_TAG_HEIGHT = 13.0


def routes(links: Sequence[Link], layout: Layout) -> list[tuple[Point, ...]]:
    """The control points of every link's curve: a start, and three more for each cubic piece."""
    starts, stops = _ports(links, layout.boxes)
    lanes: Lanes = defaultdict(list)
    curves: dict[int, tuple[Point, ...]] = {}
    for number in reversed(range(len(links))):  # the strongest path has the first choice
        link = links[number]
        below, above = layout.boxes[link.source], layout.boxes[link.target]
        start, stop = (starts[number], below.top), (stops[number], above.bottom + (ARROW if link.on_path else 0.0))
        direct = (start, *_bend(start, stop))
        if not link.on_path or start[1] <= stop[1] or _is_free(direct, (link.source, link.target), layout.boxes):
            curves[number] = direct
        else:
            curves[number] = _climb(start, stop, (link.source, link.target), layout, lanes)
    return [curves[number] for number in range(len(links))]


def _ports(links: Sequence[Link], boxes: Sequence[Box]) -> tuple[list[float], list[float]]:
    """x of each link at its source and at its target: spread over the box in the order of the other ends, so that few cross."""
    ends = [(link.source, link.target) for link in links]
    return _spread(links, ends, boxes), _spread(links, [(target, source) for source, target in ends], boxes)


def _spread(links: Sequence[Link], ends: Sequence[tuple[int, int]], boxes: Sequence[Box]) -> list[float]:
    by_end: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for number, (end, _) in enumerate(ends):
        by_end[end, links[number].on_path].append(number)
    ports = [0.0] * len(ends)
    for (end, on_path), numbers in by_end.items():
        numbers.sort(key=lambda number: boxes[ends[number][1]].x)
        spread = boxes[end].width * (0.6 if on_path else 0.8) if boxes[end].lines else 0.0
        for rank, number in enumerate(numbers):
            ports[number] = boxes[end].x + spread * ((rank + 0.5) / len(numbers) - 0.5)
    return ports


def _bend(start: Point, stop: Point) -> tuple[Point, Point, Point]:
    """The rest of a cubic curve that leaves and arrives vertically."""
    bend = max(0.5 * (start[1] - stop[1]), 14.0 if start[0] != stop[0] else 0.0)
    return (start[0], start[1] - bend), (stop[0], stop[1] + bend), stop


def _climb(start: Point, stop: Point, ends: tuple[int, int], layout: Layout, lanes: Lanes) -> tuple[Point, ...]:
    """A curve through the gaps of the rows between two boxes, with as few bends as they allow; takes a lane in each."""
    stations = _stations(start, stop, layout, lanes)
    curve, here = [start], 0
    while here < len(stations) - 1:
        reachable = (
            there
            for there in range(len(stations) - 1, here, -1)
            if there == here + 1
            or _is_free((stations[here], *_bend(stations[here], stations[there])), ends, layout.boxes)
        )
        there = next(reachable)
        curve += _bend(stations[here], stations[there])
        here = there
    return tuple(curve)


def _stations(start: Point, stop: Point, layout: Layout, lanes: Lanes) -> list[Point]:
    """Points to climb through: out of the row of the source, up a gap of every row between, and into the row of the target."""
    stations = [start]
    for row in reversed(layout.rows):
        boxes = [box for box in layout.boxes if row.start <= box.y < row.stop]
        if row.is_empty or not boxes or row.start > start[1] or row.stop < stop[1]:
            continue
        top, bottom = min(box.top for box in boxes) - _CLEARANCE, max(box.bottom for box in boxes) + _CLEARANCE
        if row.start <= start[1] < row.stop:
            stations.append((start[0], top))
        elif row.start <= stop[1] < row.stop:
            stations.append((stop[0], max(bottom, stop[1])))
        else:
            (x, y) = stations[-1]
            x = _gap(x + (stop[0] - x) * (y - top) / max(y - stop[1], 1.0), boxes, lanes[row], layout)
            lanes[row].append((x - _LANE, x + _LANE))
            stations += [(x, bottom), (x, top)]
    return [*stations, stop]


def _gap(wish: float, boxes: Sequence[Box], taken: Sequence[tuple[float, float]], layout: Layout) -> float:
    """The x nearest to a wish where a link can climb through a row; the wish itself where there is no room at all."""
    blocked = sorted([(box.left - _CLEARANCE, box.right + _CLEARANCE) for box in boxes] + list(taken))
    free, x = [], layout.columns[0].start
    for left, right in [*blocked, (layout.width, layout.width)]:
        if left >= x:
            free.append(min(max(wish, x), left))
        x = max(x, right)
    return min(free, key=lambda x: abs(x - wish), default=wish)


def points(curve: Sequence[Point]) -> np.ndarray:
    """float64[n, 2], points along a curve, at most some pixels from each other."""
    pieces = [np.array([curve[0]])]
    for begin in range(0, len(curve) - 1, 3):
        p, q, r, s = np.array(curve[begin : begin + 4])
        n_steps = int(np.abs(s - p).sum() / _STEP) + 2
        t = np.linspace(0.0, 1.0, n_steps + 1)[1:, None]
        pieces.append((1 - t) ** 3 * p + 3 * t * (1 - t) ** 2 * q + 3 * t * t * (1 - t) * r + t**3 * s)
    return np.concatenate(pieces)


def _is_free(curve: Sequence[Point], ends: Iterable[int], boxes: Sequence[Box]) -> bool:
    along = points(curve)
    return not any(_n_inside(along, area(box, _CLEARANCE - 1.0)) for box in boxes if box.item not in ends)


def _n_inside(points: np.ndarray, area: Area) -> int:
    """How many points lie inside a rectangle."""
    return int(((points > area[:2]) & (points < area[2:])).all(1).sum())


def area(box: Box, margin: float = 0.0) -> Area:
    """The rectangle of a box and a margin around it."""
    return box.left - margin, box.top - margin, box.right + margin, box.bottom + margin


def overlap(a: Area, b: Area) -> bool:
    """Whether two rectangles share more than a border."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def tags(links: Sequence[Link], curves: Sequence[Sequence[Point]], layout: Layout) -> dict[int, Area]:
    """Link -> where the name of its heads sits: on the middle of its line if it can, away from boxes and other names.

    Only links of paths are named, and those whose line has no room for a name are not.
    """
    lines = {number: points(curve) for number, curve in enumerate(curves) if links[number].on_path}
    taken, result = [area(box, 1.0) for box in layout.boxes], {}
    for number in sorted(lines, reverse=True):
        if not links[number].heads:
            continue
        half = text_width(links[number].heads, SMALL_FONT) / 2 + 4.0
        here = lines[number]
        places = sorted(range(len(here)), key=lambda place: abs(place - len(here) / 2))
        areas = [(x - half, y - _TAG_HEIGHT / 2, x + half, y + _TAG_HEIGHT / 2) for x, y in here[places].tolist()]
        areas = [spot for spot in areas if not any(overlap(spot, other) for other in taken)]
        if areas:
            foreign = np.concatenate([np.empty((0, 2)), *(line for other, line in lines.items() if other != number)])
            result[number] = min(areas, key=lambda spot: _n_inside(foreign, spot))
            taken.append(result[number])
    return result
