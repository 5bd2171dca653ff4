"""DOT: the picture of the SVG with its places, on one page, and what Graphviz makes of it."""

import itertools
import json
import re
import shutil
import struct
import subprocess

import pytest

from circuits import CircuitGraph, NodeKind
from circuits.export.picture import picture_of
from circuits.export.style import EDGE_COLOURS
from circuits.graph.exporters import MissingProgramError

T, P, E, F, L = NodeKind
PAGE_INCHES = (11.0, 7.6)
needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot program is not installed")


def drawn_by_dot(graph: CircuitGraph) -> list[dict]:
    """Nodes and clusters as Graphviz placed them, without a word of complaint."""
    ran = subprocess.run(["dot", "-Tjson"], input=graph.to_dot().encode(), capture_output=True, check=True, timeout=60)
    assert ran.stderr == b""
    return json.loads(ran.stdout)["objects"]


def test_labels_ids_and_emphasis(small) -> None:
    dot = small.to_dot()
    assert r'"second\n● 1/3 · 1"' in dot
    edges = re.findall(r'"?([\w-]+)"? -> "?([\w-]+)"? \[.*?color="(#\w+)".*?penwidth=([\d.]+)', dot)
    width = {(source, target): float(width) for source, target, _, width in edges}
    assert len(width) == len(small.edges), "the position's edge is that of its token"
    bold = {(source, target) for source, target, colour, _ in edges if colour in EDGE_COLOURS.values()}
    assert bold == {("E_12_1", "4_5_1"), ("E_11_0", "1_3_1"), ("1_3_1", "4_5_1")}
    assert min(width[pair] for pair in bold) > max(width[pair] for pair in set(width) - bold)
    (lowers,) = re.findall(r'E_12_1 -> "4_5_1" \[(.*)\]', dot)
    assert EDGE_COLOURS[False] in lowers
    assert "style=dashed" in lowers


@needs_dot
@pytest.mark.parametrize("seed", range(2))
def test_fifty_nodes_fit_a_page(crowd, seed) -> None:
    graph = crowd(tokens=11, nodes=50, edges=200, layers=range(4), n_layers=4, seed=seed)
    picture, svg = picture_of(graph, max_nodes=80), graph.to_svg()
    objects = drawn_by_dot(graph)
    ids = graph.nodes.ids()
    nodes = {node["name"]: node for node in objects if "pos" in node and not node["name"].startswith("row ")}
    assert set(nodes) == {ids[item.nodes[0]] for item in picture.items}
    areas = []
    for node in nodes.values():
        (x, y), half = map(float, node["pos"].split(",")), (float(node["width"]) * 36, float(node["height"]) * 36)
        areas.append((x - half[0], y - half[1], x + half[0], y + half[1]))
    for a, b in itertools.combinations(areas, 2):
        assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], "boxes do not overlap"
    for item in picture.items:
        if item.kind is not E:
            lines = nodes[ids[item.nodes[0]]]["label"].replace("● ", "").split("\\n")
            assert all(f">{line}</text>" in svg for line in map(xml_text, lines) if line), "the lines of the SVG"
    columns = {node["name"]: float(node["bb"].split(",")[0]) for node in objects if node["name"].startswith("cluster")}
    order = sorted(columns, key=lambda name: int(name.removeprefix("cluster ")))
    assert order == sorted(columns, key=lambda name: columns[name]), "in reading order"
    png = subprocess.run(["dot", "-Tpng"], input=graph.to_dot().encode(), capture_output=True, check=True).stdout
    inches = sorted(pixels / 96 for pixels in struct.unpack(">II", png[16:24]))
    assert inches[0] <= PAGE_INCHES[1]
    assert inches[1] <= PAGE_INCHES[0]


def xml_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


@needs_dot
def test_dot_program_reads_any_text(nasty, small) -> None:
    for graph in (nasty, small):
        plain = subprocess.run(
            ["dot", "-Tjson"], input=graph.to_dot().encode(), capture_output=True, check=True, timeout=60
        )
        assert plain.stderr == b""
        objects = {node["name"]: node for node in json.loads(plain.stdout)["objects"] if "nodes" not in node}
        names = {graph.nodes.ids()[item.nodes[0]] for item in picture_of(graph, max_nodes=80).items}
        assert names <= set(objects)
    nasty_json = subprocess.run(["dot", "-Tjson"], input=nasty.to_dot().encode(), capture_output=True, check=True)
    labels = {
        node["name"]: node.get("label") for node in json.loads(nasty_json.stdout)["objects"] if "nodes" not in node
    }
    assert labels["0_2_0"] == r"<b>\n● 0/2", "text in angle brackets stays text"
    assert labels["E_1_0"].startswith('a \\"quoted\\"') or labels["E_1_0"].startswith('a "quoted"')


@needs_dot
@pytest.mark.parametrize(("name", "magic"), [("dot-svg", b"<?xml"), ("dot-png", b"\x89PNG"), ("dot-pdf", b"%PDF")])
def test_pictures_of_graphviz(small, tmp_path, name, magic) -> None:
    assert small.export(name, tmp_path / "picture").read_bytes().startswith(magic)


def test_without_graphviz_the_text_is_written(small, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingProgramError, match=r"expected Graphviz's `dot` program .* written as dot to .*circuit\.dot"
    ):
        small.export("dot-png", tmp_path / "circuit.png")
    assert (tmp_path / "circuit.dot").read_text() == small.to_dot()
    assert not (tmp_path / "circuit.png").exists()


def test_words_of_a_failing_graphviz_are_passed_on(small, tmp_path, monkeypatch) -> None:
    (tmp_path / "dot").write_text("#!/bin/sh\necho out of paper >&2\nexit 3\n")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match=r"draw the graph as png, but `dot` failed \(out of paper\)"):
        small.export("dot-png", tmp_path / "circuit.png")
