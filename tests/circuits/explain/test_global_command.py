"""`circuits global`: builds a file, answers from it, and one line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from index_file import write

import circuits
import replacement
from circuits.cli import main
from replacement.loading import ARTIFACTS

DALLAS = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Global circuits of some rows of the demo's corpus."""
    path = tmp_path_factory.mktemp("global") / "demo.safetensors"
    assert main(["global", str(path), "--data", "demo", "--tokens", "700", "--neighbours", "20"]) == 0
    return path


def test_a_build_says_what_it_made(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["global", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_prompts"] == 10
    assert facts["n_tokens"] <= 640
    assert facts["corpus"] == "the demo corpus, in rows of 64 tokens"
    assert facts["is_exact"]
    assert 0 < facts["edges"] < facts["n_pairs"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing of the pass stays
    assert main(["global", str(file)]) == 0
    assert "at most 20 into each feature" in capsys.readouterr().out


def test_neighbours_with_labels(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = circuits.GlobalCircuits.load(file)
    number = int(found.features["firings"][2048:].argmax()) + 2048
    name = found.numbers.name(number)
    assert main(["global", str(file), "--feature", name, "--top", "5", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["feature"] == name
    assert facts["firings"] == found.features["firings"][number]
    assert [row["name"] for row in facts["upstream"]] == [row.name for row in found.upstream(name, top=5)]
    assert set(facts["upstream"][0]) == {"name", "effect", "share", "direct", "virtual_weight", "label"}
    with replacement.FeatureIndex.open(ARTIFACTS / "crosscoder" / "features.sqlite") as index:
        for row in (facts, *facts["upstream"], *facts["downstream"]):
            layer, feature = map(int, row.get("name", name).split("/"))
            label = index.label(layer, feature)
            assert row["label"] == (None if label is None or label.text == "unclear" else label.text)
    assert main(["global", str(file), "--feature", name, "--top", "5"]) == 0
    page = capsys.readouterr().out
    assert all(row["name"] in page for row in facts["upstream"])
    assert "Driven by" in page


def test_how_much_of_a_graph_is_global(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = circuits.trace(replacement.load("demo"), DALLAS)
    graph.save(tmp_path / "dallas.safetensors")
    assert main(["global", str(file), "--graph", str(tmp_path / "dallas.safetensors"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompt"] == DALLAS
    assert facts["global"] == circuits.GlobalCircuits.load(file).explained(graph)
    assert facts["control"]["edges"] == facts["global"]["edges"] > 0
    assert main(["global", str(file), "--graph", str(tmp_path / "dallas.safetensors")]) == 0
    assert "shuffled sources" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.safetensors"], "got no such file"),
        (
            ["FILE", "--feature", "9/9"],
            "there is no feature '9/9': expected one of mlp layers 0, 1, 2, 3 with features 0 to 2047",
        ),
        (["FILE", "--feature", "Texas"], "expected the name of a feature"),
        (
            ["FILE", "--feature", "2/3", "--data", "demo"],
            "expected one of --data, --feature and --graph, given several",
        ),
        (
            ["new.safetensors", "--data", "demo", "--tokens", "10"],
            "tokens: expected at least 64, one row of the demo corpus, got 10",
        ),
        (["new.safetensors", "--data", "nothing.txt"], "nothing.txt"),
        (
            ["new.safetensors", "--data", "demo", "--memory", "1MB"],
            "memory: expected at least 126 MB for 64 neighbours",
        ),
        (["new.safetensors", "--data", "demo", "--paths", "some"], "paths: expected 'all' or 'direct'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[str],
    message: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["global", *(str(file) if argument == "FILE" else argument for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_a_corpus_without_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the capital of Texas is Austin .", encoding="utf-8")
    arguments = ["global", str(tmp_path / "new.safetensors"), "--data", str(text), "--context", "32"]
    assert main(arguments) == 2
    assert "short.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_an_index_of_another_crosscoder(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "features.sqlite")
    assert main(["global", str(file), "--feature", "2/3", "--index", str(other)]) == 2
    assert "is of another crosscoder than the global circuits" in capsys.readouterr().err
