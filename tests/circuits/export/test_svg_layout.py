"""Geometry: nothing overlaps, labels fit their boxes, paths keep clear of boxes, and names of heads sit on their lines."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import NodeKind
from circuits.export.picture import Picture, picture_of
from circuits.export.svg_layout import SMALL_FONT, Layout, place
from circuits.export.svg_routes import Point, area, overlap, points, routes, tags
from circuits.export.text_metrics import text_width

T, P, E, F, L = NodeKind
SIZES = {
    "demo": {"tokens": 11, "nodes": 42, "edges": 90, "layers": range(6), "n_layers": 6},
    "20 tokens": {"tokens": 20, "nodes": 87, "edges": 300, "layers": range(6), "n_layers": 6},
    "30 layers": {"tokens": 12, "nodes": 50, "edges": 150, "layers": (0, 1, 2, 9, 10, 17, 26), "n_layers": 30},
    "long prompt": {"tokens": 70, "nodes": 160, "edges": 600, "layers": range(12), "n_layers": 12},
}


def drawn(graph) -> tuple[Picture, Layout, list[tuple[Point, ...]]]:
    picture = picture_of(graph, max_nodes=80)
    facts = graph.metadata
    layout = place(picture.items, picture.links, n_layers=facts["n_layers"], n_positions=len(facts["tokens"]))
    return picture, layout, routes(picture.links, layout)


def check_boxes(picture, layout) -> None:
    boxes = layout.boxes
    assert [box.item for box in boxes] == list(range(len(picture.items)))
    areas = [area(box, 0.49) for box in boxes]  # the half width of an outline
    assert not any(overlap(a, b) for a, b in itertools.combinations(areas, 2))
    for box, item in zip(boxes, picture.items, strict=True):
        assert 0 <= box.left <= box.right <= layout.width
        assert 0 <= box.top <= box.bottom <= layout.height
        assert all(text_width(line, box.font, bold=item.on_path) <= box.width - 10 for line in box.lines)
        assert text_width(box.small, SMALL_FONT) <= box.width - 10
        (column,) = [band for band in layout.columns if band.title == str(item.position)]
        assert item.kind is L or column.start <= box.left <= box.right <= column.stop
    rows = {item.row: box.y for item, box in zip(picture.items, boxes, strict=True)}
    assert [rows[row] for row in sorted(rows)] == sorted(rows.values(), reverse=True), "layers upwards"
    middles = [column.middle for column in layout.columns if not column.is_empty]
    assert middles == sorted(middles), "reading order"


def check_lines(picture, layout, curves) -> None:
    for link, curve in zip(picture.links, curves, strict=True):
        below, above = layout.boxes[link.source], layout.boxes[link.target]
        assert curve[0][1] == below.top
        assert below.left <= curve[0][0] <= below.right
        assert above.left <= curve[-1][0] <= above.right
        assert above.bottom <= curve[-1][1] <= above.bottom + 8
        if link.on_path:
            others = [area(box, -1.0) for box in layout.boxes if box.item not in (link.source, link.target)]
            x, y = points(curve).T
            for left, top, right, bottom in others:
                assert not ((left < x) & (x < right) & (top < y) & (y < bottom)).any()
    spots = tags(picture.links, curves, layout)
    assert not any(overlap(a, b) for a, b in itertools.combinations(spots.values(), 2))
    assert not any(overlap(spot, area(box)) for spot in spots.values() for box in layout.boxes)
    for number, (left, top, right, bottom) in spots.items():
        away = points(curves[number]) - ((left + right) / 2, (top + bottom) / 2)
        assert np.abs(away).sum(1).min() < 1e-6, "on its line"
        assert text_width(picture.links[number].heads, SMALL_FONT) <= right - left


@given(st.data())
def test_any_circuit(draw_circuit, data) -> None:
    picture, layout, curves = drawn(draw_circuit(data))
    check_boxes(picture, layout)
    check_lines(picture, layout, curves)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_crowded_circuits(crowd, size, seed) -> None:
    picture, layout, curves = drawn(crowd(**SIZES[size], seed=seed))
    check_boxes(picture, layout)
    check_lines(picture, layout, curves)


@pytest.mark.parametrize("seed", range(4))
def test_names_of_heads_have_room_on_most_lines(crowd, seed) -> None:
    picture, layout, curves = drawn(crowd(**SIZES["demo"], seed=seed))
    named = [link for link in picture.links if link.on_path and link.heads]
    assert len(tags(picture.links, curves, layout)) >= 0.8 * len(named) > 0


def test_layers_that_hold_nothing_share_a_band(crowd) -> None:
    _, layout, _ = drawn(crowd(**SIZES["30 layers"], seed=0))
    titles = [row.title for row in layout.rows]
    layers = ["27–29: none", "layer 26", "18–25: none", "layer 17", "11–16: none", "layer 10", "layer 9", "3–8: none"]
    assert titles == ["output", *layers, "layer 2", "layer 1", "layer 0", "input"]
    assert all(row.size < 20 for row in layout.rows if row.is_empty)
    assert [row.stop for row in layout.rows[:-1]] == [row.start for row in layout.rows[1:]]


def test_tokens_that_are_left_out_share_a_column(crowd) -> None:
    picture, layout, _ = drawn(crowd(**SIZES["long prompt"], seed=0))
    covered = sum(int(column.title) if column.is_empty else 1 for column in layout.columns)
    assert covered == 70
    assert len({item.position for item in picture.items}) == sum(not column.is_empty for column in layout.columns) < 70


def test_labels_are_whole_where_there_is_room(build_graph) -> None:
    label = "Houston | Dallas | El Paso → Austin"
    rows = [
        {"kind": T, "index": 1, "label": "Dallas"},
        {"kind": F, "layer": 0, "index": 345, "label": label, "activation": 2.25, "expanded": True},
        {"kind": L, "layer": 1, "index": 2, "label": "Austin", "expanded": True, "output_weight": 1.0},
    ]
    _, layout, _ = drawn(build_graph(rows, [(1, 0, 1.0), (2, 1, 1.0)]))
    assert layout.boxes[1].lines == ("Houston | Dallas |", "El Paso", "→ Austin")
    assert layout.boxes[1].small == "0/345 · 2.2"
