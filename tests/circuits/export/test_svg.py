"""The picture parses, escapes any text, explains its signs and says what it left out."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.export.picture import picture_of
from circuits.export.style import EDGE_COLOURS, QUIET_COLOURS
from circuits.graph.paths import strongest_paths

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
    assert any(text.endswith("…") for text in texts(crowded(build_graph, label=label).to_svg()))


def test_caption_shows_scores_and_what_was_left_out(build_graph) -> None:
    graph = crowded(build_graph)
    scores = graph.scores()
    *_, first, second, last = texts(graph.to_svg())
    assert first == f"replacement {scores.replacement:.3f} (share of the output traced to the tokens)"
    assert second == f"completeness {scores.completeness:.3f} (share of inputs that are not errors)", (
        "no room beside it"
    )
    assert last == "15 nodes  ·  36 edges  ·  all drawn  ·  identity error 1.0e-06"
    drawn, edges = re.search(r"not drawn: (\d+) weaker nodes, (\d+) weaker edges", graph.to_svg(max_nodes=10)).groups()
    assert int(drawn) == 5
    assert 0 < int(edges) < 36


def test_title_says_prompt_answer_and_probability(small) -> None:
    assert texts(small.to_svg())[0] == "ab → ␣x (60 %)"


def test_paths_are_written_below_the_picture(small) -> None:
    shown = texts(small.to_svg())
    paths = strongest_paths(small)
    together = f"({100 * sum(path.share for path in paths):.2g} % together)"
    start = shown.index(
        f"Strongest path of each important token, with its share of all influence on the output {together}"
    )
    assert len(paths) == 2
    # A badge, a share and the boxes of each: a -> second -> x with the id of the feature, then b -> x.
    assert shown[start + 1 : start + 7] == ["1", f"{100 * paths[0].share:.2g} %", "a", "second", "1/3", "␣x"]
    assert shown[start + 7 : start + 11] == ["2", f"{100 * paths[1].share:.2g} %", "b", "␣x"]


def test_the_most_influential_nodes_are_drawn(build_graph) -> None:
    graph = crowded(build_graph)
    influence = np.where(graph.nodes.kind == F, graph.influence(), 0)
    best = graph.nodes.label[int(np.argmax(influence))]
    svg = graph.to_svg(max_nodes=8)
    assert best.split(" →")[0] in "".join(texts(svg))
    assert svg.count("meaning number") < graph.to_svg().count("meaning number")


def test_paths_are_coloured_by_sign_and_other_edges_are_quiet(small) -> None:
    svg = small.to_svg()
    lines = re.findall(
        r'<path d="M[^"]*C[^"]*" fill="none" stroke="(#\w+)" stroke-width="([\d.]+)"( stroke-dasharray)?', svg
    )
    picture = picture_of(small, max_nodes=80)
    expected = [
        ((EDGE_COLOURS if link.on_path else QUIET_COLOURS)[link.weight > 0], link.weight < 0) for link in picture.links
    ]
    assert [(colour, bool(dash)) for colour, _, dash in lines] == expected
    assert {colour for colour, _ in expected} == {*EDGE_COLOURS.values(), *QUIET_COLOURS.values()}
    bold = [float(width) for colour, width, _ in lines if colour in EDGE_COLOURS.values()]
    assert min(bold) > max(float(width) for colour, width, _ in lines if colour in QUIET_COLOURS.values())


def test_legend_explains_only_what_is_drawn(small, build_graph) -> None:
    shown = texts(small.to_svg())
    for meaning in (
        "strongest path, raises its target",
        "strongest path, lowers its target",
        "error: what no feature explains",
    ):
        assert meaning in shown
    assert not any("attention head" in text for text in shown)
    rows = [{"kind": T, "label": "a"}, {"kind": L, "layer": 1, "index": 1, "expanded": True, "output_weight": 1.0}]
    plain = texts(build_graph(rows, [(1, 0, 1.0)]).to_svg())
    assert "strongest path, raises its target" in plain
    assert not any(
        text.startswith(("strongest path, lowers", "other influence", "error", "feature:")) for text in plain
    )


def test_untraced_features_are_dashed_and_explained(small) -> None:
    assert "causes not traced" in small.to_svg()
    assert small.to_svg().count('stroke-dasharray="4 2.5"') == 2  # the feature and its legend


def test_long_prompts_keep_the_columns_that_matter(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i, "label": f"w{i}"} for i in range(200)]
    rows.append({"kind": L, "layer": 1, "position": 199, "index": 1, "expanded": True, "output_weight": 1.0})
    svg = build_graph(rows, [(200, i, float(i)) for i in range(1, 200)]).to_svg(max_nodes=20)
    assert "w199" in texts(svg)
    assert "w1" not in texts(svg)
    assert "not drawn: 181 weaker nodes" in texts(svg)[-1]


def test_a_drawn_column_has_its_word(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i, "label": f"w{i}"} for i in range(60)]
    rows.append({"kind": F, "layer": 0, "position": 30, "index": 1, "label": "late"})
    rows.append({"kind": L, "layer": 1, "position": 59, "index": 1, "expanded": True, "output_weight": 1.0})
    svg = build_graph(rows, [(61, 60, 5.0), (61, 2, 1.0)]).to_svg(max_nodes=3)
    assert {"late", "w30", "w59"} <= set(texts(svg))


def test_room_for_nothing(small) -> None:
    with pytest.raises(ValueError, match="max_nodes: expected at least 1, given 0"):
        small.to_svg(max_nodes=0)


def test_notebooks_show_the_picture(small) -> None:
    bundle = small._repr_mimebundle_()
    assert bundle["text/plain"] == repr(small)
    assert parse(bundle["image/svg+xml"]).tag.endswith("svg")


def boxes_of(svg: str) -> dict[str, tuple[str, str, list[str]]]:
    """Name of a feature -> fill and outline of its box, and the colours of its texts."""
    found = {}
    for group in parse(svg).iter("{http://www.w3.org/2000/svg}g"):
        rect, words = group.find("{*}rect"), group.findall("{*}text")
        if rect is not None and words and "feature" in (group.findtext("{*}title") or ""):
            found["".join(words[0].itertext())] = (rect.get("fill"), rect.get("stroke"), [w.get("fill") for w in words])
    return found


def luminance(colour: str) -> int:
    return sum(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def test_what_few_thresholds_keep_is_pale_and_its_text_is_not(build_graph) -> None:
    logit = {"kind": L, "layer": 1, "index": 1, "label": " out", "expanded": True, "output_weight": 1.0}
    names = ("always", "often", "never")
    feature = {"kind": F, "layer": 0, "expanded": True}
    rows = [{"kind": T, "index": 1, "label": "a"}]
    rows += [{**feature, "index": index, "label": name} for index, name in enumerate(names)]
    edges = [(1, 0, 1.0), (2, 0, 1.0), (3, 0, 1.0), (4, 1, 80.0), (4, 2, 15.0), (4, 3, 5.0)]
    plain = build_graph([*rows, logit], edges)
    graph = plain.with_inclusion(nodes=[0.5, 0.9], edges=[1.0])
    before, after = boxes_of(plain.to_svg()), boxes_of(graph.to_svg())
    assert set(before) == set(after) == set(names)
    for name in names:
        assert after[name][2] == before[name][2], "texts keep their colours"
        assert "opacity" not in graph.to_svg(), "nothing shows through a box"
    outlines = [luminance(after[name][1]) for name in names]
    assert outlines == sorted(outlines)
    assert len(set(outlines)) == 3
    note = "the paler, the fewer pruning thresholds keep it"
    assert note in texts(graph.to_svg())
    assert note not in texts(plain.to_svg())
    assert "kept at 50 % of the pruning thresholds" in graph.to_svg()
    dot = graph.to_dot()
    assert note in dot
    assert note not in plain.to_dot()
    for name in names:
        for colour in after[name][:2]:
            assert f'"{colour}"' in dot
