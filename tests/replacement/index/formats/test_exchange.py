"""An index written for other tools, and their explanations stored as people's labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from replacement.cli import main
from replacement.index import formats
from replacement.index.formats.exchange import export_index, import_labels
from replacement.index.records import UNCLEAR, Label
from replacement.index.store import FeatureIndex
from replacement.index.writing import IndexWriter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An index of four features with a rule's label of two of them."""
    facts = {
        "crosscoder_fingerprint": "2:abc",
        "model": "org/tiny model",
        "layers": [0, 2],
        "n_features": 2,
        "n_tokens": 10,
        "vocabulary_size": 2,
        "settings": {"before": 1, "after": 1, "n_quantiles": 2},
    }
    writer = IndexWriter(tmp_path / "features.sqlite", facts, ["a", "b"])
    nothing = (0, 0.0, 1.0, b"\x01", b"\x00")
    writer.features([(number, *nothing) for number in range(4)])
    writer.labels(
        [(0, 1, Label("cities", "rule", "cities", 0.9, 0.8, 0.85)), (2, 0, Label(UNCLEAR, "rule", "x", 0.0, 0.0, 0.0))]
    )
    writer.close()
    return tmp_path / "features.sqlite"


@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_an_index_is_written_for_other_tools(file: Path, tmp_path: Path, layout: str) -> None:
    facts = export_index(file, tmp_path / "out", layout=layout)
    assert facts == {"features": 4, "layout": layout, "folder": str(tmp_path / "out")}
    back = list(formats.read(tmp_path / "out"))
    with FeatureIndex.open(file) as index:
        assert [(record.layer, record.index, record.effects) for record in back] == [
            (record.layer, record.index, record.effects) for record in index
        ]
        if layout == "neuronpedia":
            assert [record.label for record in back] == [record.label for record in index]
            line = json.loads((tmp_path / "out" / "0-crosstrace.jsonl").read_text().splitlines()[0])
            assert line["modelId"] == "org-tiny-model"


def test_explanations_become_peoples_labels(file: Path, tmp_path: Path) -> None:
    export_index(file, tmp_path / "out", layout="neuronpedia")
    path = tmp_path / "out" / "0-crosstrace.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    first["explanations"] = [{"description": "states", "explanationModelName": "gpt-4o-mini"}, {"description": " "}]
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert import_labels(file, tmp_path / "out") == {"labels": 1, "index": str(file)}
    with FeatureIndex.open(file) as index:
        assert index.label(0, 0) == Label("states", "person")
        assert index.label(0, 1) == Label("cities", "rule", "cities", 0.9, 0.8, 0.85)
    first["index"] = "2"
    path.write_text(json.dumps(first))
    with pytest.raises(ValueError, match="there is no feature 0/2"):
        import_labels(file, path)


def test_mistakes_are_named_before_any_work(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout: expected neuronpedia or saedashboard, got 'csv'"):
        export_index(tmp_path / "nothing", tmp_path / "out", layout="csv")
    with pytest.raises(ValueError, match="does not exist: expected a feature index"):
        export_index(tmp_path / "nothing", tmp_path / "out", layout="neuronpedia")


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = main(["features", *arguments])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    export = ("--export", "neuronpedia", "--out", str(tmp_path / "out"))
    code, text = run(str(file), *export, "--json")
    assert (code, json.loads(text)["features"]) == (0, 4)
    feature = json.loads((tmp_path / "out" / "0-crosstrace.jsonl").read_text().splitlines()[0])
    path = tmp_path / "explained.json"
    path.write_text(json.dumps({**feature, "explanations": [{"description": "x"}]}))
    code, text = run(str(file), "--import", str(path), "--json")
    assert (code, json.loads(text)) == (0, {"labels": 1, "index": str(file)})
    for arguments, message in (
        ((str(file), "0/1", *export), "error: expected features or --search, or --export and --import, given both"),
        ((str(file), "--export", "neuronpedia"), "error: export: expected --export LAYOUT with --out FOLDER"),
        ((str(file), *export), "would be lost"),
        ((str(file), "--import", str(tmp_path / "nothing")), "nothing does not exist: expected feature JSON"),
    ):
        code, text = run(*arguments)
        assert code == 2
        assert message in text.replace("\n", " ")
