"""Every format read back by somebody else's reader."""

import dataclasses
import io
import json
import subprocess
import sys

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits import CircuitGraph, NodeKind
from circuits.export import network, neuronpedia
from circuits.export.network import to_graphml
from circuits.graph import exporters
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.exporters import file_formats, json_pieces

T, P, E, F, L = NodeKind
FILES = ("json", "neuronpedia", "graphml", "dot")


@pytest.fixture
def with_heads(small) -> CircuitGraph:
    """The small graph with half of every edge direct, a third through head 1.2 and a sixth through head 0.1."""
    heads = np.zeros((len(small.edges), 2, 3))
    heads[:, 1, 2], heads[:, 0, 1] = small.edges.weight / 3, small.edges.weight / 6
    return dataclasses.replace(small, heads=EdgeHeads.from_dense(small.edges.weight / 2, heads))


def test_heads_are_written_on_edges(with_heads, tmp_path) -> None:
    """Text in GraphML and networkx, all of them in JSON, names in both pictures."""
    edge = with_heads.to_networkx().edges["0_7_0", "1_3_1"]
    assert edge["direct"] == pytest.approx(1.0)
    assert edge["heads"] == "direct 50 %, L1H2 33 %, L0H1 17 %"
    network = nx.read_graphml(with_heads.export("graphml", tmp_path / "c.graphml"))
    assert network.edges["0_7_0", "1_3_1"]["heads"] == edge["heads"]
    links = json.loads(with_heads.export("json", tmp_path / "c.json").read_text())["edges"]
    link = next(link for link in links if (link["source"], link["target"]) == ("0_7_0", "1_3_1"))
    assert [(layer, head) for layer, head, _ in link["by_head"]] == [(1, 2), (0, 1)]
    assert link["direct"] + sum(weight for *_, weight in link["by_head"]) == pytest.approx(link["weight"])
    assert ">L1H2</td>" in with_heads.to_dot()
    assert ">L1H2</text>" in with_heads.to_svg()
    assert "direct 50 %" in with_heads.to_svg()


def test_attention_features_have_ids_rows_and_names_of_their_own(build_graph) -> None:
    rows = [
        {"kind": T, "index": 1, "label": "a"},
        {"kind": E, "layer": 0},
        {"kind": E, "layer": 0, "part": 1},
        {"kind": F, "layer": 0, "index": 2, "expanded": True},
        {"kind": F, "layer": 0, "index": 2, "part": 1, "expanded": True},
        {"kind": L, "layer": 1, "index": 3, "label": "b", "expanded": True, "output_weight": 1.0},
    ]
    graph = build_graph(rows, [(4, 0, 1.0), (3, 4, 2.0), (5, 3, 1.0), (5, 1, 0.5), (5, 2, 0.5)])
    assert graph.nodes.ids() == ("E_1_0", "0_-1_0", "A0_-1_0", "0_2_0", "A0_2_0", "2_3_0")
    assert graph.to_networkx().nodes["A0_2_0"]["part"] == "attention"
    for picture in (graph.to_svg(), graph.to_dot()):
        assert picture.index("attention 0") != picture.index("layer 0")
    assert "attention feature 0/2 at 0" in graph.to_svg()
    assert {node["node_id"] for node in graph.to_neuronpedia()["nodes"]} == set(graph.nodes.ids())


@given(st.data())
def test_networkx_graph_equals_the_matrix(draw_circuit, to_dense, data) -> None:
    graph = draw_circuit(data)
    network = graph.to_networkx()
    assert list(network) == list(graph.nodes.ids())
    if len(graph.edges):
        matrix = nx.to_numpy_array(network, weight="weight")
        np.testing.assert_array_equal(matrix, to_dense(graph).T)
    assert nx.is_directed_acyclic_graph(network)


def test_networkx_attributes(small) -> None:
    network = small.to_networkx()
    feature = network.nodes["1_3_1"]
    assert feature["kind"] == "feature"
    assert feature["label"] == "second"
    assert feature["activation"] == 1.0
    assert feature["influence"] == pytest.approx(small.influence()[5])
    assert network.graph["tokens"] == ["a", "b"]
    assert network.edges["0_7_0", "1_3_1"]["weight"] == 2.0


def test_node_link_json_is_read_by_networkx(small, tmp_path) -> None:
    path = small.export("json", tmp_path / "circuit.json")
    back = nx.node_link_graph(json.loads(path.read_text()))
    assert nx.utils.graphs_equal(back, small.to_networkx())
    assert small.to_json()["directed"] is True


def test_pieces_of_json_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "_ITEMS_AT_ONCE", 2)
    for n in range(6):
        value = {"a": [1, "é"], "items": iter({"x": i} for i in range(n)), "b": None, "none": iter(())}
        text = "".join(json_pieces(value))
        assert json.loads(text) == {"a": [1, "é"], "items": [{"x": i} for i in range(n)], "b": None, "none": []}
    assert "".join(json_pieces({})) == "{}"
    with pytest.raises(ValueError, match="JSON"):
        "".join(json_pieces({"items": iter([float("nan")])}))


def test_many_edges_are_written_in_blocks(with_heads, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    whole = {name: with_heads.export(name, tmp_path / f"whole.{name}").read_bytes() for name in FILES}
    for module, name in ((network, "_EDGES_AT_ONCE"), (neuronpedia, "_LINKS_AT_ONCE"), (exporters, "_ITEMS_AT_ONCE")):
        monkeypatch.setattr(module, name, 3)
    assert len(with_heads.edges) > 6
    for name, content in whole.items():
        assert with_heads.export(name, tmp_path / f"blocks.{name}").read_bytes() == content
    link_data = nx.node_link_data(with_heads.to_networkx(), edges="edges")
    ours = with_heads.to_json()
    for edge in ours["edges"]:
        del edge["by_head"]
    assert {edge["source"] + edge["target"]: edge for edge in ours.pop("edges")} == {
        edge["source"] + edge["target"]: edge for edge in link_data.pop("edges")
    }
    assert ours == link_data


def test_graphml_is_read_by_networkx(small, nasty, tmp_path) -> None:
    back = nx.read_graphml(small.to_graphml(tmp_path / "circuit.graphml"))
    network = small.to_networkx()
    assert dict(back.nodes(data=True)) == dict(network.nodes(data=True))
    assert {edge[:2]: edge[2] for edge in back.edges(data=True)} == {
        edge[:2]: edge[2] for edge in network.edges(data=True)
    }
    assert back.edges["0_7_0", "1_3_1"]["weight"] == 2.0
    assert back.nodes["4_5_1"]["label"] == " x"
    assert back.nodes["1_3_1"]["expanded"] is True
    assert json.loads(back.graph["token_ids"]) == [11, 12]
    strange = nx.read_graphml(nasty.export("graphml", tmp_path / "nasty.graphml"))
    assert strange.nodes["E_1_0"]["label"].startswith('a "quoted" <b>bold</b>')


def test_graphml_takes_metadata_without_a_value(small) -> None:
    graph = CircuitGraph(small.nodes, small.edges, {**small.metadata, "crosscoder": None})
    text = "".join(to_graphml(graph))
    assert nx.read_graphml(io.BytesIO(text.encode())).graph["crosscoder"] == "null"


def test_unknown_format_lists_the_known_ones(small, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"format: expected one of dot, .*safetensors, svg, given 'gif'"):
        small.export("gif", tmp_path / "circuit.gif")
    assert not list(tmp_path.iterdir())


def test_without_exporters_the_error_says_where_they_are(tmp_path) -> None:
    script = (
        "from circuits.graph.circuit_graph import CircuitGraph\n"
        "from circuits.graph.exporters import exporter\n"
        "try:\n    exporter('svg')\nexcept ValueError as error:\n    print(error)\n"
        "import circuits\nassert circuits.CircuitGraph is CircuitGraph\nassert exporter('svg')"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout == (
        "format: expected one of safetensors, given 'svg'; `import circuits.export` registers the others\n"
    )


def test_networkx_is_no_file(small, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"format: expected one of dot, .*svg, given 'networkx'"):
        small.export("networkx", tmp_path / "circuit")


def test_every_text_format_is_written_whole(nasty, tmp_path) -> None:
    for name in file_formats():
        if not name.startswith("dot-"):
            path = nasty.export(name, tmp_path / "new" / f"circuit.{name}")
            assert path.stat().st_size > 0
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


def test_folder_that_cannot_be_written(small, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder: expected a folder, but .*file is a file"):
        small.export("svg", tmp_path / "file" / "folder" / "circuit.svg")


def test_folder_without_permission(small, tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(ValueError, match=r"expected a folder that can be written to, but .*\(Permission denied\)"):
        small.export("svg", tmp_path / "circuit.svg")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch) -> None:
    path = tmp_path / "circuit.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match=r"circuit\.json: could not be written \(No space left on device\)"):
        small.export("json", path)
    assert [file.name for file in tmp_path.iterdir()] == ["circuit.json"]
    assert path.read_text() == "old"
