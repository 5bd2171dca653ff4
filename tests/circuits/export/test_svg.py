"""The picture parses, keeps its boxes apart, fits its labels and says what it left out."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.export.svg_layout import fit, place, text_width, wrap

T, P, E, F, L = NodeKind
NASTY = 'a "quoted" <b>&amp;\\ \x00\x1b\n\t\u202e \ud83d ]]> --> \u4e2d\u6587'


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in parse(svg).iter("{http://www.w3.org/2000/svg}text")]


def crowded(build_graph, *, label="") -> CircuitGraph:
    """Seven features in one cell, four logits, three tokens."""
    rows = [{"kind": T, "index": i, "position": i, "label": f"word{i}"} for i in range(3)]
    rows += [{"kind": E, "layer": 0, "position": 2}]
    rows += [
        {
            "kind": F,
            "layer": 0,
            "position": 2,
            "index": i,
            "label": label or f"meaning number {i} → result",
            "expanded": True,
        }
        for i in range(7)
    ]
    rows += [
        {"kind": L, "layer": 1, "position": 2, "index": i, "label": " out", "probability": 0.2, "expanded": True,
         "output_weight": 0.25}
        for i in range(4)
    ]  # fmt: skip
    edges = [(4 + i, i % 3, 1.0 + i) for i in range(7)] + [(11 + i, 4 + j, 1.0) for i in range(4) for j in range(7)]
    return build_graph(rows, [*edges, (11, 3, -2.0)])


def overlap(a, b) -> bool:
    return abs(a.x - b.x) < (a.width + b.width) / 2 - 1e-6 and abs(a.y - b.y) < (a.height + b.height) / 2 - 1e-6


@given(st.data())
def test_boxes_never_overlap_and_stay_inside(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    layout = place(graph.nodes, graph.influence())
    boxes = layout.boxes
    assert sorted(box.node for box in boxes) == list(range(len(graph.nodes)))
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    for box in boxes:
        assert box.width / 2 <= box.x <= layout.width - box.width / 2
        assert 0 <= box.top <= box.bottom <= layout.height
        assert all(text_width(line) <= box.width for line in box.lines)
    ys = {kind: [box.y for box in boxes if graph.nodes.kind[box.node] == kind] for kind in NodeKind}
    assert min(ys[T]) > max(ys[F] + ys[E] + [0.0]), "inputs are at the bottom"
    assert max(ys[L]) < min(ys[F] + ys[E] + ys[T]), "outputs are on top"


def test_crowded_cell_is_laid_side_by_side(build_graph) -> None:
    graph = crowded(build_graph)
    boxes = place(graph.nodes, graph.influence()).boxes
    columns = {round(box.x) for box in boxes if graph.nodes.kind[box.node] == F}
    assert len(columns) == 2
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


@settings(max_examples=30)
@given(st.data())
def test_every_graph_is_drawn_as_valid_xml(draw_circuit, data) -> None:
    root = parse(draw_circuit(data).to_svg())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    sizes = [float(node.get("font-size")) for node in root.iter() if node.get("font-size")]
    assert min(sizes) >= 10


def test_any_text_is_escaped(build_graph) -> None:
    graph = crowded(build_graph, label=NASTY)
    svg = graph.to_svg()
    assert "<b>" not in svg
    assert "\x00" not in svg
    assert "\u202e" not in svg
    assert any('a "quoted"' in text for text in texts(svg))
    assert "<b>" in "".join(parse(svg).itertext())
    svg.encode("utf-8")


def test_long_labels_end_in_an_ellipsis_and_are_whole_in_the_tooltip(build_graph) -> None:
    label = "a label that goes on " * 20
    root = parse(crowded(build_graph, label=label).to_svg())
    titles = [node.text for node in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(label.strip() in title for title in titles)
    shown = [text for text in texts(crowded(build_graph, label=label).to_svg()) if text.startswith("a label")]
    assert shown
    assert all(text_width(text) <= 160 for text in shown)


def test_caption_shows_scores_and_what_was_left_out(build_graph) -> None:
    graph = crowded(build_graph)
    scores = graph.scores()
    everything = texts(graph.to_svg())[-1]
    assert f"replacement {scores.replacement:.3f}" in everything
    assert f"completeness {scores.completeness:.3f}" in everything
    assert "15 nodes" in everything
    assert "drawn" not in everything
    part = texts(graph.to_svg(max_nodes=10))[-1]
    assert "10 of 15 nodes drawn" in part


def test_the_most_influential_nodes_are_drawn(build_graph) -> None:
    graph = crowded(build_graph)
    influence = np.where(graph.nodes.kind == F, graph.influence(), 0)
    best = graph.nodes.label[int(np.argmax(influence))]
    svg = graph.to_svg(max_nodes=8)
    assert best.split(" →")[0] in "".join(texts(svg))
    assert svg.count("meaning number") < graph.to_svg().count("meaning number")


def test_sign_decides_the_colour(small) -> None:
    colours = re.findall(r'<path d="M[^"]*C[^"]*" fill="none" stroke="(#\w+)"', small.to_svg())
    assert colours.count("#0072b2") == int((small.edges.weight > 0).sum())
    assert colours.count("#d55e00") == int((small.edges.weight < 0).sum())


def test_untraced_features_are_dashed_and_explained(small) -> None:
    assert "causes not traced" in small.to_svg()
    assert small.to_svg().count("stroke-dasharray") == 2  # the feature and its legend


def test_long_prompts_keep_the_columns_that_matter(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i, "label": f"w{i}"} for i in range(200)]
    rows.append({"kind": L, "layer": 1, "position": 199, "index": 1, "expanded": True, "output_weight": 1.0})
    svg = build_graph(rows, [(200, i, float(i)) for i in range(1, 200)]).to_svg(max_nodes=20)
    assert "w199" in texts(svg)
    assert "w1" not in texts(svg)
    assert "20 of 201 nodes drawn" in texts(svg)[-1]


def test_a_drawn_column_has_its_word(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i, "label": f"w{i}"} for i in range(60)]
    rows.append({"kind": F, "layer": 0, "position": 30, "index": 1, "label": "late"})
    rows.append({"kind": L, "layer": 1, "position": 59, "index": 1, "expanded": True, "output_weight": 1.0})
    svg = build_graph(rows, [(61, 60, 5.0), (61, 2, 1.0)]).to_svg(max_nodes=2)
    assert {"late", "w30", "w59"} <= set(texts(svg))


def test_room_for_nothing(small) -> None:
    with pytest.raises(ValueError, match="max_nodes: expected at least 1, given 0"):
        small.to_svg(max_nodes=0)


def test_wrapping() -> None:
    assert wrap("short", 100.0) == ("short",)
    assert wrap("Dallas, Houston → Texas", 120.0) == ("Dallas, Houston", "→ Texas")
    assert wrap("completion of a fact", 90.0) == ("completion of", "a fact")
    assert wrap("Donaudampfschifffahrt", 60.0)[0].endswith("…")
    assert fit("", 5.0) == ""
    for text in ("w30", "Austin", "i"):
        assert fit(text, text_width(text) + 14.0 - 14.0) == text
    assert text_width("中") > text_width("a") > text_width("i")


def test_notebooks_show_the_picture(small) -> None:
    bundle = small._repr_mimebundle_()
    assert bundle["text/plain"] == repr(small)
    assert parse(bundle["image/svg+xml"]).tag.endswith("svg")
