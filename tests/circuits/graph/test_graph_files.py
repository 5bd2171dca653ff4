"""Graph files in folders: which are found, in which order, and what is said of those that do not fit."""

import dataclasses
from pathlib import Path

import pytest

from circuits import CircuitGraph
from circuits.graph.graph_files import CIRCUIT_FILE, GRAPH_FILE, GraphFiles
from circuits.trace_options import files_of


@pytest.fixture
def traced(small, tmp_path) -> Path:
    """A folder as `circuits trace --prompts` leaves it: two prompts, one that failed, one that is being written."""
    folder = tmp_path / "graphs"
    for name in ("b", "a"):
        small.save(folder / name / "graph.safetensors")
        small.prune(nodes=0.3).save(folder / name / "circuit.safetensors")
    for name, file in (("failed", "record.json"), (".hidden", "graph.safetensors"), ("failed", "notes.txt")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text("{}")
    (folder / "summary.csv").write_text("id\n")
    return folder


def test_names_are_those_that_tracing_writes() -> None:
    assert files_of(["safetensors"]) == {"graph": GRAPH_FILE, "safetensors": CIRCUIT_FILE}


def test_prompts_of_a_folder(traced, small) -> None:
    files = GraphFiles.of([traced])
    assert [file.name for file in files.files] == ["a", "b"]
    assert files.without == ("failed",)
    assert [graph for _, graph in files.graphs()] == [small, small]
    pruned = GraphFiles.of([traced], pruned=True)
    assert [graph.metadata["pruning"]["nodes"] for _, graph in pruned.graphs()] == [0.3, 0.3]
    assert [dict(facts) for _, facts in files.metadata()] == [small.metadata] * 2


def test_files_folders_and_folders_of_files_in_the_order_given(traced, small, tmp_path) -> None:
    single = small.save(tmp_path / "single.safetensors")
    flat = tmp_path / "flat"
    for name in ("2", "1"):
        small.save(flat / f"{name}.safetensors")
    found = GraphFiles.of([single, traced / "b", flat])
    assert [file.name for file in found.files] == ["single", "b", "1", "2"]
    done: list[int] = []
    assert len(list(found.graphs(done.append))) == len(found)
    assert done == [1, 2, 3, 4]


def test_a_graph_of_another_tool_by_name(small, tmp_path) -> None:
    path = small.export("neuronpedia", tmp_path / "graph.json")
    [(file, facts)] = GraphFiles.of([path]).metadata()
    assert (file.name, facts["imported"]["format"]) == ("graph", CircuitGraph.load(path).metadata["imported"]["format"])


def test_bad_paths(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected a folder of graphs, such as .* writes; given none"):
        GraphFiles.of([tmp_path / "empty"])
    with pytest.raises(ValueError, match=r"missing\.safetensors: expected a circuit file, but there is no such file"):
        GraphFiles.of([tmp_path / "missing.safetensors"])
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"foreign\.safetensors: expected a circuit file, given one that is damaged"):
        list(GraphFiles.of([foreign]).metadata())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", "other", r"expected the model of .*a\.safetensors \(toy\), given other"),
        ("model_fingerprint", "2:ab", r"expected the weights of the model of .* \(not known\), given 2:ab"),
        ("crosscoder_fingerprint", "2:cd", r"expected the crosscoder of .* \(not known\), given 2:cd"),
        ("n_layers", 5, r"expected the number of layers of .* \(3\), given 5"),
        ("conventions", "circuit-tracer", r"expected the conventions of .* \(not known\), given circuit-tracer"),
    ],
)
def test_graphs_of_different_models_are_refused(small, tmp_path, name, value, words) -> None:
    other = dataclasses.replace(small, metadata={**small.metadata, name: value})
    paths = [small.save(tmp_path / "a.safetensors"), other.save(tmp_path / "b.safetensors")]
    with pytest.raises(
        ValueError, match=rf"b\.safetensors: {words}: graphs of one model and crosscoder can be compared"
    ):
        list(GraphFiles.of(paths).metadata())
