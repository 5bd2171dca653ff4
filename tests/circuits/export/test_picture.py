"""What a picture joins, emphasises and leaves out, against the graph itself."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.export.picture import FEW_TOKENS, QUIET_LINKS, picture_of
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.groups import Grouping
from circuits.graph.influence import edge_influence
from circuits.graph.paths import strongest_paths

T, P, E, F, L = NodeKind


@given(st.data())
def test_every_node_and_edge_is_drawn_once_or_counted(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    picture = picture_of(graph, max_nodes=data.draw(st.integers(1, 60)))
    shown = sorted(itertools.chain.from_iterable(item.nodes for item in picture.items))
    assert len(set(shown)) == len(shown) == picture.n_nodes
    item_of = {node: number for number, item in enumerate(picture.items) for node in item.nodes}
    ends = [
        (item_of.get(s, -1), item_of.get(t, -1)) for t, s in zip(graph.edges.target, graph.edges.source, strict=True)
    ]
    links = {(link.source, link.target): link for link in picture.links}
    assert len(links) == len(picture.links)
    assert picture.n_edges == sum(pair in links for pair in ends)
    weights = dict.fromkeys(links, 0.0)
    for pair, weight in zip(ends, graph.edges.weight.tolist(), strict=True):
        if pair in links:
            weights[pair] += weight
    assert {pair: link.weight for pair, link in links.items()} == pytest.approx(weights)
    assert all(0 <= link.strength <= 1 + 1e-9 for link in picture.links)


@given(st.data())
def test_paths_are_those_of_the_graph(draw_circuit, data) -> None:
    graph = draw_circuit(data)
    picture = picture_of(graph, max_nodes=1)
    paths = strongest_paths(graph)
    assert [share for share, _ in picture.paths] == [path.share for path in paths]
    emphasised = {(link.source, link.target) for link in picture.links if link.on_path}
    assert emphasised == {pair for _, items in picture.paths for pair in itertools.pairwise(items)}
    for path, (_, items) in zip(paths, picture.paths, strict=True):
        assert all(node in picture.items[item].nodes for node, item in zip(path.nodes, items, strict=True))
        assert all(picture.items[item].on_path for item in items)
    strongest = [link for link in picture.links if link.on_path and link.strength == pytest.approx(1.0)]
    assert bool(strongest) == bool(paths)


def test_weakest_links_are_left_out_but_every_box_keeps_one(crowd) -> None:
    graph = crowd(tokens=10, nodes=60, edges=300, layers=range(6), n_layers=6, seed=1)
    picture = picture_of(graph, max_nodes=80)
    quiet = [link for link in picture.links if not link.on_path]
    assert QUIET_LINKS <= len(picture.links) < len(graph.edges)
    ends = {end for link in picture.links for end in (link.source, link.target)}
    item_of = {node: number for number, item in enumerate(picture.items) for node in item.nodes}
    joined = {item_of[node] for node in [*graph.edges.source.tolist(), *graph.edges.target.tolist()]}
    assert ends == joined
    influence = edge_influence(graph)
    assert max(link.strength for link in quiet) == pytest.approx(1.0)
    strongest = int(np.argmax(influence))
    pair = item_of[int(graph.edges.source[strongest])], item_of[int(graph.edges.target[strongest])]
    assert pair in {(link.source, link.target) for link in picture.links}


@pytest.fixture
def stacked(build_graph) -> CircuitGraph:
    """Three features of one label at one place, a fourth elsewhere, and a position that reads as its token."""
    feature = {"kind": F, "label": "Texan city", "expanded": True}
    rows = [{"kind": T, "index": 7, "position": 0, "label": "Dallas"}, {"kind": P, "position": 0}]
    rows += [feature | {"layer": 0, "index": index, "activation": 1.5} for index in range(3)]
    rows += [feature | {"layer": 1, "index": 9, "activation": 1.25}]
    rows += [
        {
            "kind": L,
            "layer": 2,
            "index": 1,
            "label": "Austin",
            "probability": 0.9,
            "output_weight": 1.0,
            "expanded": True,
        }
    ]
    into_feature = [(5, 2, 4.0), (5, 3, -1.0), (5, 4, 0.5)]
    return build_graph(
        rows, [(2, 0, 1.0), (3, 0, 1.0), (4, 1, 1.0), *into_feature, (6, 5, 2.0), (6, 3, 0.1), (6, 4, 0.1)]
    )


def test_equal_labels_at_one_place_are_a_stack(stacked) -> None:
    picture = picture_of(stacked, max_nodes=80)
    assert [(item.text, item.small, item.nodes) for item in picture.items] == [
        ("Dallas", "", (0, 1)),
        ("Texan city", "0/0 · 1.5", (2,)),  # on the strongest path, so a box of its own
        ("Texan city ×2", "0/1, 2", (3, 4)),
        ("Texan city", "1/9 · 1.2", (5,)),
        ("Austin", "90 %", (6,)),
    ]
    link = next(link for link in picture.links if (link.source, link.target) == (2, 3))
    assert link.weight == -0.5
    assert link.tooltip.count("\n") == 1, "both edges are in the tooltip"
    assert "feature 0/1 at 0 (Texan city) → feature 1/9 at 0 (Texan city): -1" in link.tooltip


def test_tooltips_have_the_whole_label_and_its_score(stacked) -> None:
    facts = {"0/1": {"source": "rule", "f1": 0.875, "text": "Texan city, of any size"}}
    graph = dataclasses.replace(stacked, metadata={**stacked.metadata, "feature_labels": facts})
    tooltip = picture_of(graph, max_nodes=80).items[2].tooltip.splitlines()[0]
    assert tooltip.startswith(
        "feature 0/1 at 0 (Texan city); Texan city, of any size; F1 0.88; activation 1.5; influence "
    )


def test_heads_of_a_link_are_those_of_its_edges_together(stacked) -> None:
    heads = np.zeros((len(stacked.edges), 2, 3))
    heads[:, 1, 2] = 0.6 * stacked.edges.weight
    heads[:, 0, 1] = 0.2 * stacked.edges.weight
    graph = dataclasses.replace(stacked, heads=EdgeHeads.from_dense(0.2 * stacked.edges.weight, heads))
    assert {link.heads for link in picture_of(graph, max_nodes=80).links} == {"L1H2"}


def test_lone_tokens_of_a_long_prompt_are_few(build_graph) -> None:
    rows = [{"kind": T, "index": i, "position": i, "label": f"w{i}"} for i in range(200)]
    rows.append({"kind": L, "layer": 1, "position": 199, "index": 1, "expanded": True, "output_weight": 1.0})
    picture = picture_of(build_graph(rows, [(200, i, float(i)) for i in range(1, 200)]), max_nodes=80)
    tokens = [item.text for item in picture.items if item.kind is T]
    assert tokens == [f"w{i}" for i in range(200 - len(tokens), 200)]
    assert len(tokens) <= FEW_TOKENS + 5
    assert picture.n_nodes == len(tokens) + 1


def test_a_group_of_outputs_is_one_box_with_the_sums_of_its_members(build_graph) -> None:
    rows = [{"kind": T, "index": 1, "label": "to"}, {"kind": F, "layer": 0, "index": 2, "label": "a", "expanded": True}]
    outputs = {"42": 0.2, "7": 0.15, "87": 0.15, "33": 0.1, "?": 0.4}
    for index, (label, weight) in enumerate(outputs.items()):
        logit = {"kind": L, "layer": 1, "index": index, "label": label, "output_weight": weight, "expanded": True}
        rows.append(logit | {"probability": weight / 2})
    edges = [(1, 0, 2.0), (2, 1, 1.0), (3, 1, 3.0), (4, 1, -0.5), (4, 0, 1.5), (5, 0, -9.0), (6, 1, 0.25)]
    graph = build_graph(rows, edges)
    picture = picture_of(graph, max_nodes=80)
    texts = [(item.text, item.small) for item in picture.items]
    assert texts == [("to", ""), ("a", "0/2"), ("4 numbers: 7 … 87", "30 % together"), ('"?"', "20 %")]
    weights = {(link.source, link.target): link.weight for link in picture.links}
    assert weights == {(0, 1): 2.0, (0, 2): 1.5 - 9.0, (1, 2): 1.0 + 3.0 - 0.5, (1, 3): 0.25}
    assert picture.n_nodes == len(graph.nodes)
    assert picture.n_edges == len(graph.edges)
    assert picture.items[2].tooltip.count("output") == 4, "the tooltip lists all of them"
    svg = graph.to_svg()
    assert "4 numbers: 7 … 87" in svg
    assert "group of outputs: its lines and shares are sums over its members" in svg


@pytest.mark.parametrize(
    ("label", "name", "text"),
    [
        ("Texas: El Paso | Houston … → Austin", "Texas", "El Paso | Houston … → Austin"),
        ("thing in question sentences: boat", "thing in question sentences", "boat"),
        ('after ": | ;"', "", 'after ": | ;"'),
        ("a | b: c", "", "a | b: c"),
        ("~ a, b → c: d", "", "~ a, b → c: d"),
        ("Texas:", "", "Texas:"),
    ],
)
def test_a_name_stands_above_the_examples(build_graph, label, name, text) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "Dallas"},
        {"kind": F, "layer": 0, "index": 345, "label": label, "activation": 2.25, "expanded": True},
        {"kind": L, "layer": 1, "index": 2, "label": "Austin", "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(1, 0, 1.0), (2, 1, 1.0)])
    feature = picture_of(graph, max_nodes=80).items[1]
    assert (feature.name, feature.text) == (name, text)
    if name:
        assert f'font-weight="600" text-anchor="middle" xml:space="preserve">{name.split()[0]}' in graph.to_svg()


def test_marks_tell_kinds(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "a"},
        {"kind": E, "layer": 0},
        {"kind": F, "layer": 0, "index": 2, "expanded": True},
        {"kind": F, "layer": 0, "index": 2, "part": 1, "expanded": True},
        {"kind": L, "layer": 1, "index": 3, "label": "b", "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(3, 0, 1.0), (2, 3, 2.0), (4, 2, 1.0), (4, 1, 0.5)])
    marks = {item.text: item.mark for item in picture_of(graph, max_nodes=80).items if item.kind is not F}
    assert marks == {"a": "square", "error": "diamond", "b": "square"}
    assert {item.mark for item in picture_of(graph, max_nodes=80).items if item.kind is F} == {"circle", "triangle"}
    assert "feature of attention: " in graph.to_svg()


@given(st.data(), st.integers(0, 2**32 - 1))
def test_a_stored_group_is_one_box_and_nothing_is_lost(draw_circuit, data, seed) -> None:
    """Groups of any features, over layers and positions: then links may run downwards and paths return to a box."""
    graph = draw_circuit(data)
    features = np.flatnonzero(graph.nodes.mask(F) & ~graph.nodes.is_target)
    numbers = np.random.default_rng(seed).integers(3, size=len(features))
    parts = [tuple(features[numbers == number].tolist()) for number in range(3)]
    others = [(node,) for node in range(len(graph.nodes)) if node not in features]
    everything = [*filter(None, parts), *others]
    names = [f"group {number}" for number in range(len(everything))]
    grouping = Grouping.build(graph, names, everything, [None] * len(everything))
    carrying = graph.with_groups(grouping)
    picture = picture_of(carrying, max_nodes=1000)
    boxes = {tuple(sorted(item.nodes)): item for item in picture.items}
    for members, name in zip(everything, names, strict=True):
        if len(members) > 1:
            box = boxes[members]
            assert (box.name, box.text) == (name, f"{len(members)} features")
            assert len(box.tooltip.splitlines()) == min(len(members), 11)
    assert picture.n_nodes == len(graph.nodes)
    drawn = {(link.source, link.target) for link in picture.links}
    item_of = {node: number for number, item in enumerate(picture.items) for node in item.nodes}
    pairs = [(item_of[s], item_of[t]) for s, t in zip(graph.edges.source, graph.edges.target, strict=True)]
    assert picture.n_edges == sum(pair in drawn or pair[0] == pair[1] for pair in pairs)
    for link in picture.links:
        ends = [set(picture.items[end].nodes) for end in (link.source, link.target)]
        assert ends[0].isdisjoint(ends[1])
        chosen = [s in ends[0] and t in ends[1] for s, t in zip(graph.edges.source, graph.edges.target, strict=True)]
        assert link.weight == pytest.approx(float(graph.edges.weight[chosen].sum()), rel=1e-5, abs=1e-6)
    assert all(pair in drawn for _, items in picture.paths for pair in itertools.pairwise(items))
    assert "<svg" in carrying.to_svg()
    assert "digraph" in carrying.to_dot()


def test_the_picture_of_a_group_says_its_name_and_members(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "a"},
        {"kind": F, "layer": 0, "index": 4, "expanded": True, "label": "Texas: Waco"},
        {"kind": F, "layer": 1, "index": 5, "expanded": True, "label": "Texas: Dallas"},
        {"kind": L, "layer": 3, "index": 3, "label": "Austin", "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(1, 0, 1.0), (2, 0, 1.0), (3, 1, 2.0), (3, 2, 1.0)])
    svg, dot = (getattr(graph.with_groups(graph.group()), name)() for name in ("to_svg", "to_dot"))
    for text in (svg, dot):
        assert "2 features" in text
        assert "0/4, 1/5" in text
        assert "feature 0/4 at 0 (Texas: Waco)" in text
        assert "feature 1/5 at 0 (Texas: Dallas)" in text
    assert "2 features" not in graph.to_svg()
