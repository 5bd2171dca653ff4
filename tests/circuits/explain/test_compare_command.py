"""`circuits compare`: facts and pages of two graphs and of many, files, and one line for every mistake."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from circuits import CircuitGraph
from circuits.cli import main

Run = Callable[..., str]


@pytest.fixture
def run(capsys) -> Run:
    """Runs the command and gives what it printed."""

    def command(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return command


@pytest.fixture
def fails(capsys) -> Run:
    """Runs the command and gives its one line of error."""

    def command(*arguments: object) -> str:
        assert main(["compare", *map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        return output.err

    return command


@pytest.fixture
def pair(small, tmp_path) -> list[Path]:
    """The small graph, and the same without its first feature under a prompt of another second token."""
    keep = np.ones(len(small.nodes), dtype=bool)
    keep[4] = False
    other = small.select(keep, np.ones(len(small.edges), dtype=bool))
    changed = {"tokens": ["a", "c"], "token_ids": [11, 13], "prompt": "ac"}
    other = dataclasses.replace(other, metadata={**other.metadata, **changed})
    return [small.save(tmp_path / "first.safetensors"), other.save(tmp_path / "second.safetensors")]


def test_two_graphs(pair, run) -> None:
    facts = json.loads(run(*pair, "--json"))
    assert facts.keys() == {"graphs", "without_graph", "difference", "consensus", "file"}
    assert facts["graphs"] == ["first", "second"]
    difference = facts["difference"]
    assert difference["prompts"] == ["ab", "ac"]
    assert difference["tokens"] == [{"position": 1, "texts": ["b", "c"]}]
    assert difference["overlap"]["features"]["only_first"] == 1
    [vanished] = [row for row in difference["nodes"] if row["status"] == "vanishes"]
    assert (vanished["names"], vanished["label"]) == (["0/7@0", None], "first")
    page = run(*pair)
    assert "at 1: b → c" in page
    assert "first 0/7@0" in page
    assert "vanishes" in page
    assert "Nothing differs." in run(pair[0], pair[0])


def test_many_graphs_and_a_file_for_the_consensus(pair, run, tmp_path) -> None:
    out = tmp_path / "consensus.safetensors"
    facts = json.loads(run(*pair, pair[0], "--frequency", "0.9", "--out", out, "--json"))
    assert facts["difference"] is None
    assert facts["file"] == str(out)
    consensus = facts["consensus"]
    assert consensus["prompts"] == 3
    assert consensus["tokens"] == ["a", "b, c (2)"]
    assert consensus["counts"]["features"] == {"any": 2, "circuit": 1, "all": 1, "one": 0}
    assert len(consensus["features"]) == 2
    assert len(json.loads(run(*pair, pair[0], "--most", "1", "--json"))["consensus"]["features"]) == 1
    circuit = CircuitGraph.load(out)
    assert circuit.counts()["features"] == 1
    assert circuit.metadata["consensus"]["frequency"] == 0.9
    for suffix in ("svg", "html", "graphml", "json"):
        page = run(*pair, pair[0], "--out", tmp_path / f"consensus.{suffix}")
        assert (tmp_path / f"consensus.{suffix}").exists()
    assert "3 prompts, aligned" in page
    assert "first 0/7@0" in page


def test_prompts_without_a_graph_are_named(small, run, tmp_path) -> None:
    for name in ("a", "b", "c"):
        small.save(tmp_path / name / "graph.safetensors")
    (tmp_path / "failed").mkdir()
    assert json.loads(run(tmp_path, "--json"))["without_graph"] == ["failed"]
    assert "1 prompts without a graph left out: failed" in run(tmp_path)


def test_mistakes(pair, small, fails, tmp_path) -> None:
    first = pair[0]
    assert f"graphs: expected at least two to compare, given one, {first}" in fails(first)
    assert "expected a circuit file, but there is no such file" in fails(first, tmp_path / "missing.safetensors")
    (tmp_path / "empty").mkdir()
    assert "expected a folder of graphs" in fails(first, tmp_path / "empty")
    (tmp_path / "text.safetensors").write_text("no graph")
    assert "text.safetensors: expected a circuit file" in fails(first, tmp_path / "text.safetensors")
    other_model = dataclasses.replace(small, metadata={**small.metadata, "model": "other"})
    other = other_model.save(tmp_path / "other.safetensors")
    assert "graphs of one model and crosscoder can be compared" in fails(first, other)
    longer = {"tokens": ["x", "y", "z"], "token_ids": [1, 2, 3]}
    unlike = dataclasses.replace(small, metadata={**small.metadata, **longer}).save(tmp_path / "unlike.safetensors")
    assert "expected prompts that can be aligned" in fails(first, unlike)
    assert "frequency: expected a share of the prompts between 0 and 1" in fails(*pair, "--frequency", "1.5")
    assert "out: expected a file that ends in one of .dot" in fails(*pair, "--out", tmp_path / "consensus.txt")
    assert not (tmp_path / "consensus.txt").exists()
    assert "most" in fails(*pair, "--most", "0")
