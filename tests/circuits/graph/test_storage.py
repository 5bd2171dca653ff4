"""The graph file: damage is never taken for another graph, files of earlier releases load, facts are of the right kind."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import CircuitGraph
from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.storage import digest, to_bytes

DTYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?"}


def written_by_hand(path: Path, tensors: list[tuple[str, str, list]], header: dict[str, str]) -> Path:
    """A safetensors file made byte by byte from names, dtypes and values."""
    entries: dict[str, object] = {"__metadata__": header}
    data = b""
    for name, dtype, values in tensors:
        content = np.array(values, dtype=DTYPES[dtype]).tobytes()
        entries[name] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# A token, a feature and a logit; 7 = 2 x 3 + 1.
COLUMNS = [
    ("nodes.kind", "I8", [0, 3, 4]),
    ("nodes.layer", "I32", [-1, 0, 2]),
    ("nodes.position", "I32", [0, 0, 0]),
    ("nodes.index", "I64", [7, 5, 9]),
    ("nodes.activation", "F32", [0, 3, 0]),
    ("nodes.probability", "F32", [0, 0, 0.5]),
    ("nodes.output_weight", "F64", [0, 0, 1]),
    ("nodes.expanded", "BOOL", [False, True, True]),
    ("nodes.value", "F64", [0, 3, 7]),
    ("nodes.bias", "F64", [0, 1, 1]),
    ("nodes.inflow", "F64", [0, 2, 6]),
    ("edges.indptr", "I64", [0, 0, 1, 2]),
    ("edges.source", "I32", [0, 1]),
    ("edges.weight", "F32", [2, 6]),
]
ATTENTION = ("nodes.attention", "BOOL", [False, True, False])
HEADS = [
    ("heads.direct", "F32", [2, 4]),
    ("heads.rest", "F32", [0, 0.5]),
    ("heads.indptr", "I64", [0, 0, 1]),
    ("heads.layer", "I16", [1]),
    ("heads.head", "I16", [3]),
    ("heads.weight", "F32", [1.5]),
]
FACTS = {"prompt": "a", "tokens": ["a"], "n_layers": 2, "identity_error": 1e-6}


def header(schema: str, **changes: object) -> dict[str, str]:
    return {
        "format": "crosstrace.circuit",
        "schema": schema,
        "labels": json.dumps(["a", "first", "b"]),
        "metadata": json.dumps({**FACTS, **changes}),
    }


def test_files_of_schema_1_load(tmp_path) -> None:
    graph = CircuitGraph.load(written_by_hand(tmp_path / "old.safetensors", COLUMNS, header("1")))
    assert graph.nodes.ids() == ("E_7_0", "0_5_0", "3_9_0")
    assert graph.nodes.label == ("a", "first", "b")
    assert (graph.edges.target.tolist(), graph.edges.source.tolist()) == ([1, 2], [0, 1])
    assert graph.metadata == FACTS
    assert graph.heads is None
    assert CircuitGraph.load(graph.save(tmp_path / "new.safetensors")) == graph


def test_files_of_schema_2_load(tmp_path) -> None:
    path = written_by_hand(tmp_path / "old.safetensors", [*COLUMNS, ATTENTION, *HEADS], header("2"))
    graph = CircuitGraph.load(path)
    assert graph.nodes.ids() == ("E_7_0", "A0_5_0", "3_9_0")
    assert graph.nodes.of_attention.tolist() == [False, True, False]
    assert graph.heads is not None
    assert graph.heads.of(1) == [(1, 3, 1.5)]
    assert CircuitGraph.load(graph.save(tmp_path / "new.safetensors")) == graph


def test_schema_3_needs_its_digest(tmp_path) -> None:
    columns = [*COLUMNS, ("nodes.part", "I8", [0, 0, 0])]
    path = written_by_hand(tmp_path / "new.safetensors", columns, header("3"))
    with pytest.raises(ValueError, match=r"new\.safetensors: expected a circuit file, given one without 'digest'"):
        CircuitGraph.load(path)
    facts = header("3")
    facts["digest"] = digest({name: np.array(values, dtype=DTYPES[dtype]) for name, dtype, values in columns}, facts)
    assert len(CircuitGraph.load(written_by_hand(path, columns, facts)).edges) == 2
    columns[4] = ("nodes.activation", "F32", [0, 2, 0])
    written_by_hand(path, columns, facts)
    with pytest.raises(ValueError, match=r"new\.safetensors: .* damaged or foreign \(its content is not that of its"):
        CircuitGraph.load(path)


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_is_named_or_harmless(draw_circuit, tmp_path_factory, data) -> None:
    """Every bit of a file, with and without heads: one `ValueError` that names the file, or the same graph."""
    graph = draw_circuit(data)
    if data.draw(st.booleans()):
        heads = EdgeHeads.from_dense(graph.edges.weight / 2, (graph.edges.weight / 2)[:, None, None])
        graph = dataclasses.replace(graph, heads=heads)
    content = bytearray(to_bytes(graph))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    where = st.integers(0, header_end - 1) if data.draw(st.booleans()) else st.integers(0, len(content) - 1)
    content[data.draw(where)] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flips") / "graph.safetensors"
    path.write_bytes(content)
    try:
        assert CircuitGraph.load(path) == graph
    except ValueError as error:
        if str(path) not in str(error):
            raise


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 5}, "expected tokens to be a list of texts, given 5"),
        ({"tokens": ["a", 5]}, r'expected tokens to be a list of texts, given \["a", 5\]'),
        ({"prompt": None}, "expected prompt to be text, given null"),
        ({"n_layers": "x"}, 'expected n_layers to be a whole number of at least 1, given "x"'),
        ({"n_layers": True}, "expected n_layers to be a whole number of at least 1, given true"),
        ({"n_layers": 0}, "expected n_layers to be a whole number of at least 1, given 0"),
        ({"identity_error": "a"}, 'expected identity_error to be a number of at least 0, given "a"'),
        ({"identity_error": -1}, "expected identity_error to be a number of at least 0, given -1"),
        (
            {"targets": 3},
            "expected targets to be a list of objects with a token, a probability and a position, given 3",
        ),
        ({"targets": [{"token": " x", "probability": "high"}]}, "expected targets to be a list of objects"),
        ({"targets": [{"token": " x", "position": 1.5}]}, "expected targets to be a list of objects"),
        ({"top_tokens": [[" x", 0.5]]}, "expected top_tokens to be a list of objects"),
        ({"token_ids": "abc"}, "expected token_ids to be a list of whole numbers"),
        ({"token_ids": [1, 2]}, "expected one id for each of 1 tokens, given 2"),
        ({"token_ids": [10**30]}, "expected token_ids to be a list of whole numbers"),
        ({"pruning": {"nodes": 0.8}}, "expected pruning to be an object with the numbers nodes and edges"),
        ({"pruning": 0.8}, "expected pruning to be an object with the numbers nodes and edges"),
        ({"seconds": "long"}, "expected seconds to be a number"),
        ({"unexpanded_share": None}, "expected unexpanded_share to be a number, given null"),
        ({"attention": 3}, "expected attention to be text"),
        ({"loaded_from": {"model": 3}}, "expected loaded_from to be an object of texts"),
        ({"loaded_from": "demo"}, "expected loaded_from to be an object of texts"),
        ({"stopped_by": ["x" * 500]}, r'expected stopped_by to be text, given \["x+…$'),
        ({"coverage": 10**400}, "expected coverage to be a number"),
    ],
)
def test_facts_of_a_wrong_kind_are_named(tmp_path, changes, message) -> None:
    """Also in files without a digest, which anybody could have written."""
    path = written_by_hand(tmp_path / "old.safetensors", COLUMNS, header("1", **changes))
    with pytest.raises(ValueError, match=rf"old\.safetensors: .*{message.removesuffix('$')}"):
        CircuitGraph.load(path)
    graph = CircuitGraph.load(written_by_hand(path, COLUMNS, header("1")))
    with pytest.raises(ValueError, match=f"CircuitGraph.metadata: {message}"):
        CircuitGraph(graph.nodes, graph.edges, {**graph.metadata, **changes})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"labels": "5"}, "its labels are no list of texts"),
        ({"labels": '["a", null, "b"]'}, "its labels are no list of texts"),
        ({"labels": '["a"]'}, "expected shape"),
        ({"labels": "[" * 100_000}, "damaged or foreign"),
        ({"metadata": "[]"}, "its metadata is no object"),
        ({"metadata": "{"}, "damaged or foreign"),
        ({"metadata": "{}"}, "expected prompt, tokens, n_layers, identity_error, but there is no prompt, tokens"),
        ({"metadata": '{"identity_error": NaN}'}, "there is no prompt"),
        ({"schema": "-1"}, "expected circuit schema 4 or older, given -1"),
        ({"schema": "²"}, "expected circuit schema 4 or older, given ²"),
        ({"schema": "0"}, "expected circuit schema 4 or older, given 0"),
    ],
)
def test_headers_of_a_wrong_kind_are_named(tmp_path, texts, message) -> None:
    path = written_by_hand(tmp_path / "old.safetensors", COLUMNS, header("1") | texts)
    with pytest.raises(ValueError, match=rf"old\.safetensors: .*{message}"):
        CircuitGraph.load(path)


@given(st.data(), st.integers(-100, 100))
def test_weights_in_16_bits(draw_circuit, tmp_path_factory, data, exponent) -> None:
    """Rows of any scale: every weight within the recorded error, nothing else changed, and saving again loses nothing more."""
    graph = draw_circuit(data)
    scale = 2.0**exponent
    edges = dataclasses.replace(graph.edges, weight=(graph.edges.weight * scale).astype(np.float32))
    graph = dataclasses.replace(
        graph, edges=edges, nodes=dataclasses.replace(graph.nodes, inflow=graph.nodes.inflow * scale)
    )
    path = tmp_path_factory.mktemp("half") / "graph.safetensors"
    loaded = CircuitGraph.load(graph.save(path, weight_bits=16))
    error = loaded.metadata["weight_error"]
    assert error <= 2**-11
    assert {**graph.metadata, "weight_error": error} == loaded.metadata
    assert loaded.nodes == graph.nodes
    assert np.array_equal(loaded.edges.source, edges.source)
    largest = np.array([np.abs(row).max(initial=0) for row in np.split(edges.weight, edges.indptr[1:-1])])
    size = np.maximum(np.abs(edges.weight), 2.0**-28 * largest[edges.target])
    assert (np.abs(loaded.edges.weight - edges.weight) <= error * size * (1 + 1e-6)).all()
    assert loaded.scores().replacement == pytest.approx(graph.scores().replacement, abs=2e-3)
    assert CircuitGraph.load(loaded.save(path, weight_bits=16)) == loaded


def test_16_bits_halve_the_weights_and_are_checked(small, tmp_path) -> None:
    with pytest.raises(ValueError, match="weight_bits: expected 16 or 32, given 8"):
        small.save(tmp_path / "small.safetensors", weight_bits=8)
    columns = [*COLUMNS[:-1], ("nodes.part", "I8", [0, 0, 0]), ("edges.weight", "F16", [2, 6])]
    for exponent in ("I16", [0, 0]), ("I32", [0, 0, 0]):
        tensors = [*columns, ("edges.exponent", *exponent)]
        facts = header("4")
        arrays = {name: np.array(values, dtype=DTYPES[dtype]) for name, dtype, values in tensors}
        facts["digest"] = digest(arrays, facts)
        path = written_by_hand(tmp_path / "half.safetensors", tensors, facts)
        with pytest.raises(
            ValueError, match=r"half\.safetensors: .*expected weights in float16 with int16\[3\] exponents"
        ):
            CircuitGraph.load(path)


@pytest.mark.parametrize("name", [name for name, _, _ in COLUMNS])
def test_a_missing_column_is_named(tmp_path, name) -> None:
    columns = [column for column in COLUMNS if column[0] != name]
    path = written_by_hand(tmp_path / "old.safetensors", columns, header("1"))
    with pytest.raises(ValueError, match=rf"old\.safetensors: expected a circuit file, given one without '{name}'"):
        CircuitGraph.load(path)


def test_columns_of_a_wrong_shape_or_dtype_are_named(tmp_path) -> None:
    for changed in (
        ("nodes.layer", "I64", [-1, 0, 2]),
        ("nodes.kind", "F32", [0, 3, 4]),
        ("edges.weight", "F64", [2, 6]),
    ):
        columns = [changed if column[0] == changed[0] else column for column in COLUMNS]
        with pytest.raises(ValueError, match=r"old\.safetensors: .*expected an? .*array of"):
            CircuitGraph.load(written_by_hand(tmp_path / "old.safetensors", columns, header("1")))


def test_the_same_graph_is_the_same_bytes(small: CircuitGraph, tmp_path: Path) -> None:
    """Whatever order the library writes the texts of its header in."""
    contents = {small.save(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}
    contents |= {small.export("safetensors", tmp_path / "exported").read_bytes() for _ in range(8)}
    assert len(contents) == 1
    assert CircuitGraph.load(tmp_path / "exported").metadata == small.metadata
