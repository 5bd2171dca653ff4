"""The commands take low-rank sparse attention as the crosscoder of attention, or say in one line why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from circuits import CircuitGraph, NodeKind
from circuits.cli import main as circuits_main
from replacement import LanguageModel, checkpoint
from replacement.cli import main
from replacement.index.store import FeatureIndex

PROMPT = "w3 w5 w7 w8 w4 w9"


@pytest.fixture(scope="module")
def folders(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, a crosscoder of its MLPs, low-rank sparse attention, and rows of tokens."""
    folder, root = model_folder("gpt2"), tmp_path_factory.mktemp("lorsa")
    lm = LanguageModel.from_pretrained(folder)
    checkpoint.save(tiny.crosscoder_for(lm), root / "mlps")
    checkpoint.save(tiny.lorsa_for(lm), root / "lorsa")
    np.save(root / "rows.npy", np.random.default_rng(0).integers(3, 12, (40, 16)))
    return {"model": str(folder), **{name: str(root / name) for name in ("mlps", "lorsa", "rows.npy")}}


@pytest.fixture(scope="module")
def options(folders: dict[str, str]) -> list[str]:
    """The options that load the model."""
    return [
        *("--model", folders["model"], "--crosscoder", folders["mlps"]),
        *("--attention-crosscoder", folders["lorsa"]),
    ]


@pytest.fixture(scope="module")
def circuit(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced graph with features of low-rank sparse attention."""
    folder = tmp_path_factory.mktemp("traced")
    assert circuits_main(["trace", PROMPT, *options, "--out", str(folder)]) == 0
    assert CircuitGraph.load(folder / "circuit.safetensors").heads is None
    return folder / "graph.safetensors"


def facts_of(capsys: Any, call: Any, *arguments: str) -> Any:
    """What a command prints with --json."""
    capsys.readouterr()
    assert call([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_trace_export_and_show(circuit: Path, tmp_path: Path, capsys: Any) -> None:
    graph = CircuitGraph.load(circuit)
    of_lorsa = graph.nodes.mask(NodeKind.FEATURE) & graph.nodes.of_attention
    assert of_lorsa.any()
    assert graph.identity_error <= 1e-4
    labels = graph.nodes.select(of_lorsa & graph.nodes.expanded).label
    assert any(label.startswith("~ ") for label in labels)
    for name, suffix in (("neuronpedia", "json"), ("svg", "svg"), ("dot", "dot")):
        graph.export(name, tmp_path / f"graph.{suffix}")
    graph.to_html(tmp_path / "page.html")
    assert CircuitGraph.load(tmp_path / "graph.json").nodes.of_attention.any()


def test_why_a_query_key_group_attends(circuit: Path, options: list[str], capsys: Any) -> None:
    facts = facts_of(capsys, circuits_main, "heads", str(circuit), "--attends", "attention:1.2@5<3", *options)
    assert (facts["name"], facts["heads"], facts["query"], facts["key"]) == ("L1Q2", "replaced", 5, 3)
    assert facts["identity_error"] <= 1e-4
    original = facts_of(capsys, circuits_main, "heads", str(circuit), "--attends", "1.2@5<3", *options)
    assert (original["name"], original["heads"]) == ("L1H2", "original")
    assert circuits_main(["heads", str(circuit), "--attends", "attention:1.2@5<3", *options]) == 0
    assert 'L1Q2: "w4" at 5 attends to "w7" at 3' in capsys.readouterr().out


def test_a_feature_by_source_positions(circuit: Path, options: list[str], capsys: Any) -> None:
    graph = CircuitGraph.load(circuit)
    node = int(np.flatnonzero(graph.nodes.mask(NodeKind.FEATURE) & graph.nodes.of_attention)[0])
    layer, index, position = (int(getattr(graph.nodes, name)[node]) for name in ("layer", "index", "position"))
    name = f"attention:{layer}/{index}@{position}"
    facts = facts_of(capsys, circuits_main, "heads", str(circuit), "--feature", name, *options)
    assert facts["heads"][0]["name"] == f"L{layer}Q{index // 12}"
    assert facts["heads"][0]["encoder_share"] == pytest.approx(1)
    assert facts["identity_error"] <= 1e-4


def test_what_needs_original_heads_is_refused_in_one_line(circuit: Path, options: list[str], capsys: Any) -> None:
    graph = CircuitGraph.load(circuit)
    ends = [graph.nodes.ids()[int(end[0])] for end in (graph.edges.source, graph.edges.target)]
    for question in ([], ["--edge", "->".join(ends)]):
        capsys.readouterr()
        assert circuits_main(["heads", str(circuit), *options, *question]) == 2
        error = capsys.readouterr().err.removeprefix("error: ").strip()
        assert error == (
            "no head of the model carries an edge of this graph: attention is replaced by low-rank sparse attention, whose "
            "features are heads themselves"
        )


def test_credit_of_original_heads_is_checked_for_the_features_that_read_them(
    circuit: Path, options: list[str], capsys: Any
) -> None:
    facts = facts_of(capsys, circuits_main, "heads", str(circuit), "--check", *options)
    assert facts["features"] > 0
    assert facts["rungs"]["direct"]["ablation"]["relative_error"] <= 1e-3


def test_a_graph_is_validated(circuit: Path, options: list[str], capsys: Any) -> None:
    facts = facts_of(capsys, circuits_main, "validate", str(circuit), *options)
    assert facts["self_check"]["relative_error"] <= 1e-3


def test_both_parts_are_validated(folders: dict[str, str], options: list[str], capsys: Any) -> None:
    arguments = ["--data", folders["rows.npy"], "--tokens", "160"]
    facts = facts_of(capsys, main, "validate", *options, *arguments)
    assert [row["part"] for row in facts["model"]["crosscoders"]] == ["mlp", "attention"]


def test_heads_are_indexed(folders: dict[str, str], options: list[str], capsys: Any) -> None:
    arguments = ["--data", folders["rows.npy"], "--tokens", "320", "--part", "attention"]
    assert main(["index", *options, *arguments]) == 0
    with FeatureIndex.open(Path(folders["lorsa"]) / "features.sqlite") as index:
        assert index.feature(1, 7).effects.read
