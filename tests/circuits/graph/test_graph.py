"""The graph value: checks, equality, and the file it is saved to."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from circuits import CircuitGraph, NodeTable
from circuits.graph.edges import Edges


def test_counts_and_repr(small) -> None:
    assert small.counts() == {
        "total": 8, "features": 2, "errors": 1, "tokens": 2, "positions": 1, "logits": 2, "edges": 8,
    }  # fmt: skip
    assert repr(small) == "CircuitGraph('ab': 8 nodes, 2 features, 1 errors, 8 edges)"
    assert small.identity_error == 1e-6


def test_saved_graph_comes_back(small, tmp_path) -> None:
    path = small.save(tmp_path / "folder" / "graph.safetensors")
    assert CircuitGraph.load(path) == small
    assert [file.name for file in path.parent.iterdir()] == ["graph.safetensors"]


@given(st.data())
def test_every_graph_survives_its_file(draw_circuit, tmp_path_factory, data) -> None:
    graph = draw_circuit(data).prune(nodes=0.7)
    path = graph.save(tmp_path_factory.mktemp("graphs") / "graph.safetensors")
    assert CircuitGraph.load(path) == graph


def test_any_label_survives(build_graph, tmp_path) -> None:
    label = 'quote " back\\slash\n<b>\x00 \u2192 \ud83d'
    graph = build_graph(
        [
            {"kind": 0, "index": 1, "label": label},
            {"kind": 4, "layer": 3, "index": 1, "expanded": True, "output_weight": 1.0},
        ],
        [(1, 0, 1.0)],
    )
    assert CircuitGraph.load(graph.save(tmp_path / "g.safetensors")).nodes.label[0] == label


def test_saving_over_a_file_replaces_it(small, tmp_path) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_text("old")
    small.save(path)
    assert CircuitGraph.load(path) == small


def test_pruning_is_noted_and_keeps_inflow(small) -> None:
    pruned = small.prune(nodes=0.5)
    assert pruned.metadata["pruning"] == {"nodes": 0.5, "edges": 0.98}
    assert "pruning" not in small.metadata
    inflow = dict(zip(small.nodes.ids(), small.nodes.inflow, strict=True))
    assert all(inflow[name] == value for name, value in zip(pruned.nodes.ids(), pruned.nodes.inflow, strict=True))


def test_missing_file(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors: expected a circuit file, but there is no such file"):
        CircuitGraph.load(tmp_path / "none.safetensors")


def test_truncated_file(small, tmp_path) -> None:
    path = small.save(tmp_path / "graph.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        ValueError, match=r"graph\.safetensors: expected a circuit file, given one that is damaged or foreign"
    ):
        CircuitGraph.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 64])
def test_file_of_another_kind(tmp_path, content) -> None:
    path = tmp_path / "graph.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"graph\.safetensors: expected a circuit file, given one that is damaged or foreign"
    ):
        CircuitGraph.load(path)


def test_foreign_safetensors(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"W": np.zeros(3)}, path)
    with pytest.raises(
        ValueError, match=r"weights\.safetensors: expected a circuit file, given another kind of safetensors"
    ):
        CircuitGraph.load(path)


def _with_header(path, change) -> None:
    """Rewrite the JSON header of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_newer_schema(small, tmp_path) -> None:
    path = small.save(tmp_path / "graph.safetensors")
    _with_header(path, lambda facts: facts.update(schema="99"))
    with pytest.raises(ValueError, match=r"graph\.safetensors: expected circuit schema 4 or older, given 99"):
        CircuitGraph.load(path)


def test_place_that_cannot_be_written(small, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file: expected a folder, but .*file is a file"):
        small.save(tmp_path / "file" / "graph.safetensors")
    with pytest.raises(ValueError, match="expected a file name, given a folder"):
        small.save(tmp_path)


def rebuilt(graph, **columns) -> CircuitGraph:
    table = {name: getattr(graph.nodes, name) for name in graph.nodes.__dataclass_fields__}
    return CircuitGraph(NodeTable(**{**table, **columns}), graph.edges, graph.metadata)


def test_parts_must_fit(small) -> None:
    with pytest.raises(ValueError, match=r"expected output weights that sum to 1, given 2\.0"):
        rebuilt(small, output_weight=small.nodes.output_weight * 2)
    with pytest.raises(ValueError, match="expected edges into expanded nodes only, given some into node 5"):
        rebuilt(small, expanded=small.nodes.expanded & (small.nodes.kind == 4))
    with pytest.raises(ValueError, match="expected an inflow of at least the kept edges' 4 in row 5, given 2"):
        rebuilt(small, inflow=small.nodes.inflow / 2)
    with pytest.raises(ValueError, match="expected positions below 1, given 1"):
        CircuitGraph(small.nodes, small.edges, {**small.metadata, "tokens": ["a"], "token_ids": [11]})
    with pytest.raises(ValueError, match="expected edges among 8 nodes, given 3"):
        CircuitGraph(small.nodes, Edges.from_coo(*np.zeros((3, 0), dtype=int), n_nodes=3), small.metadata)
    with pytest.raises(ValueError, match="but there is no prompt"):
        CircuitGraph(small.nodes, small.edges, {"tokens": ["a", "b"], "n_layers": 1, "identity_error": 0.0})
    with pytest.raises(ValueError, match="expected facts that can be written as JSON"):
        CircuitGraph(small.nodes, small.edges, {**small.metadata, "seconds": float("nan")})
