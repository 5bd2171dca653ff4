"""Statistics of graphs against dense matrices, networkx and figures by hand; the files that hold them."""

import builtins
import csv
import json
import math
import re
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.cli import main
from circuits.explain.statistics import COLUMNS, LAYER_COLUMNS, TEXTS, columns, graph_statistics
from circuits.explain.statistics_command import write_statistics
from circuits.graph.graph_files import GraphFiles
from circuits.graph.nodes import NodeKind

README = Path(__file__).parents[3] / "circuits" / "explain" / "README.md"


def entropy(amounts: np.ndarray) -> float:
    shares = amounts[amounts > 0] / amounts.sum()
    return float(-(shares * np.log(shares)).sum())


@given(st.data())
def test_every_column_against_dense_matrices_and_networkx(draw_circuit, to_dense, to_shares, data) -> None:
    graph = draw_circuit(data)
    row, nodes, matrix, shares = graph_statistics(graph), graph.nodes, to_dense(graph), to_shares(graph)
    network = nx.from_numpy_array(np.abs(matrix.T), create_using=nx.DiGraph)
    output = nodes.output_weight
    through = output @ np.linalg.inv(np.eye(len(nodes)) - shares)
    influence, crossing = through - output, through[:, None] * shares
    features, errors = nodes.mask(NodeKind.FEATURE), nodes.mask(NodeKind.ERROR)
    inputs = nodes.mask(NodeKind.TOKEN, NodeKind.POSITION)
    into = [degree for _, degree in network.in_degree() if degree]
    out = [degree for _, degree in network.out_degree() if degree]
    has_inputs = np.abs(matrix).sum(1) > 0
    effective = [math.exp(entropy(np.abs(matrix[node]))) for node in np.flatnonzero(has_inputs)]
    at_position = [influence[inputs & (nodes.position == i)].sum() for i in range(len(graph.metadata["tokens"]))]
    ranked = sorted(influence[features], reverse=True)
    fewest = next((n for n in range(len(ranked) + 1) if sum(ranked[:n]) >= 0.8 * sum(ranked) * (1 - 1e-12)), 0)
    total = sum(at_position)
    expected = {
        "tokens": len(graph.metadata["tokens"]),
        "outputs": nodes.mask(NodeKind.LOGIT).sum(),
        "answer_value": nodes.value[output.argmax()],
        "nodes": len(nodes),
        "features": features.sum(),
        "expanded": (features & nodes.expanded).sum(),
        "errors": errors.sum(),
        "edges": network.number_of_edges(),
        "fan_in": np.mean(into) if into else 0,
        "fan_in_largest": max(into, default=0),
        "fan_in_effective": np.average(effective, weights=through[has_inputs]) if through[has_inputs].sum() else 0,
        "fan_out": np.mean(out) if out else 0,
        "depth": nx.dag_longest_path_length(network, weight=""),
        "path_length": crossing.sum(),
        "input_share": influence[inputs].sum(),
        "error_share": influence[errors].sum(),
        "unexpanded_share": through[nodes.unexpanded].sum(),
        "lost_share": (through * (1 - shares.sum(1)))[nodes.expanded].sum(),
        "direct_share": (output[:, None] * shares)[:, inputs].sum(),
        "negative_share": crossing[matrix < 0].sum() / crossing.sum() if crossing.sum() else 0,
        "influence_entropy": entropy(influence[features]) if influence[features].sum() else 0,
        "influence_largest": max(influence[features], default=0),
        "features_80": fewest,
        "activation_mean": 1.0 if features.any() else 0.0,
        "activation_largest": 1.0 if features.any() else 0.0,
        "token_first_share": at_position[0] / total if total else 0,
        "token_last_share": at_position[-1] / total if total else 0,
        "token_largest_share": max(at_position) / total if total else 0,
        "token_entropy": entropy(np.array(at_position)) if total else 0,
        "replacement": graph.scores().replacement,
        "completeness": graph.scores().completeness,
    }
    for layer in range(graph.metadata["n_layers"]):
        of_layer = nodes.layer == layer
        expected[f"features_layer_{layer}"] = (features & of_layer).sum()
        expected[f"influence_layer_{layer}"] = influence[features & of_layer].sum()
        expected[f"error_layer_{layer}"] = influence[errors & of_layer].sum()
    assert row.keys() == {*TEXTS, *columns(graph.metadata["n_layers"])}
    assert row.keys() - expected.keys() == {*TEXTS, "answer_probability", "answer_margin"}
    for name, value in expected.items():
        assert row[name] == pytest.approx(float(value), abs=1e-9), name


def test_what_the_model_answers(small) -> None:
    row = graph_statistics(small, name="first")
    assert [row[name] for name in TEXTS] == ["first", "ab", "␣x"]
    assert (row["answer_probability"], row["answer_margin"]) == pytest.approx((0.6, 0.4))
    metadata = {**small.metadata, "targets": []}
    unknown = graph_statistics(type(small)(small.nodes, small.edges, metadata))
    assert unknown["answer"] == ""
    assert math.isnan(unknown["answer_probability"])
    assert math.isnan(unknown["answer_margin"])


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """Three graphs, one of which does not know its answer."""
    unknown = type(small)(small.nodes, small.edges, {**small.metadata, "targets": []})
    for name, graph in (("b", small), ("a", small.prune(nodes=0.3)), ("c", unknown)):
        graph.save(tmp_path / "graphs" / name / "graph.safetensors")
    (tmp_path / "graphs" / "failed").mkdir()
    return tmp_path / "graphs"


def test_csv_has_a_row_for_every_graph(folder, small, tmp_path, capsys) -> None:
    out = tmp_path / "statistics.csv"
    assert main(["statistics", str(folder), "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["graphs"], facts["without_graph"], facts["file"]) == (3, ["failed"], str(out))
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    expected = graph_statistics(small, name="b")
    assert {name: rows[1][name] for name in expected} == {name: str(value) for name, value in expected.items()}
    assert rows[2]["answer_probability"] == ""
    values = np.array([float(row["edges"]) for row in rows])
    edges = {"mean": values.mean(), "spread": values.std(), "smallest": values.min(), "largest": values.max()}
    assert facts["columns"]["edges"].pop("unit") == "count"
    assert facts["columns"]["edges"] == pytest.approx({"count": 3, **edges}, rel=1e-12)
    assert facts["columns"]["answer_probability"]["count"] == 2
    assert main(["statistics", str(folder)]) == 0
    assert "influence_entropy" in capsys.readouterr().out


def test_parquet_has_the_same_rows_and_says_what_columns_are(folder, small, tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "statistics.parquet"
    write_statistics(GraphFiles.of([folder]), out)
    table = parquet.read_table(out)
    assert table.column("id").to_pylist() == ["a", "b", "c"]
    assert table.column("answer_margin").to_pylist() == pytest.approx([0.4, 0.4, None])
    assert {name: table.column(name)[1].as_py() for name in table.column_names} == graph_statistics(small, name="b")
    assert table.schema.field("edges").metadata == {b"unit": b"count", b"description": b"edges"}


def test_parquet_is_written_in_groups(folder, tmp_path, monkeypatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("circuits.explain.statistics_file.ROWS_AT_ONCE", 2)
    out = tmp_path / "statistics.parquet"
    write_statistics(GraphFiles.of([folder]), out)
    assert parquet.ParquetFile(out).metadata.num_row_groups == 2
    assert parquet.read_table(out).num_rows == 3


def test_the_readme_lists_every_column() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.M)
    expected = {name: (unit, text) for name, (unit, text) in (COLUMNS | LAYER_COLUMNS).items()}
    names = {name if name in COLUMNS else name.removesuffix("_0"): (unit, text) for name, unit, text in listed}
    assert {name: names.get(name) for name in expected} == expected


def test_mistakes(folder, small, tmp_path, capsys, monkeypatch) -> None:
    def fails(*arguments: object) -> str:
        assert main(["statistics", *map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        return output.err

    assert "out: expected a file that ends in .csv or .parquet" in fails(folder, "--out", tmp_path / "rows.txt")
    (tmp_path / "empty").mkdir()
    assert "empty: expected a folder of graphs" in fails(tmp_path / "empty")
    assert "there is no such file" in fails(tmp_path / "missing")
    other = type(small)(small.nodes, small.edges, {**small.metadata, "model": "other"})
    other.save(folder / "d" / "graph.safetensors")
    assert "graphs of one model and crosscoder can be compared" in fails(folder, "--out", tmp_path / "rows.csv")
    (folder / "d" / "graph.safetensors").write_text("no graph")
    assert "expected a circuit file" in fails(folder, "--out", tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()

    real_import = builtins.__import__

    def without_pyarrow(name: str, *arguments: object, **options: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "out: Parquet needs pyarrow, which is not installed" in fails(folder, "--out", tmp_path / "rows.parquet")
