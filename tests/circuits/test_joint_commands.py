"""The commands take a joint crosscoder as they take two crosscoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from circuits import CircuitGraph
from circuits.attribution.labels import open_indexes
from circuits.attribution.metadata import crosscoder_fingerprint
from circuits.cli import main as circuits_main
from circuits.viewer import evidence
from replacement import LanguageModel, Wiring, checkpoint, load
from replacement.cli import main
from replacement.command_line import ModelOptions
from replacement.crosscoder.joint import split

PROMPT = "w3 w5 w7 w8"


@pytest.fixture(scope="module")
def folders(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, a joint crosscoder in the folder of its training run, its parts, and rows of tokens."""
    folder, root = model_folder("gpt2"), tmp_path_factory.mktemp("joint")
    lm = LanguageModel.from_pretrained(folder)
    joint = tiny.crosscoder_for(lm, wiring=Wiring.joint(lm))
    checkpoint.save(joint, root / "joint" / "crosscoder")
    for name, part in zip(("mlps", "attention"), split(joint), strict=True):
        checkpoint.save(part, root / name)
    np.save(root / "rows.npy", np.random.default_rng(0).integers(3, 12, (40, 16)))
    return {"model": str(folder), **{n: str(root / n) for n in ("joint", "mlps", "attention", "rows.npy")}}


def options(folders: dict[str, str], crosscoder: str = "joint") -> list[str]:
    """The options that load the model."""
    return ["--model", folders["model"], "--crosscoder", folders[crosscoder]]


def error_of(capsys: Any, call: Any, *arguments: str) -> str:
    """The one line that a mistake ends in."""
    capsys.readouterr()
    assert call(list(arguments)) == 2
    return str(capsys.readouterr().err).removeprefix("error: ").strip()


def test_a_trace_is_that_of_two_crosscoders(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """And a graph finds its model again."""
    for name, loaded in (
        ("one", options(folders)),
        ("two", [*options(folders, "mlps"), "--attention-crosscoder", folders["attention"]]),
        ("asked", [*options(folders), "--attention", "features"]),
    ):
        assert circuits_main(["trace", PROMPT, *loaded, "--out", str(tmp_path / name)]) == 0
    graphs = [CircuitGraph.load(next((tmp_path / name).glob("*.safetensors"))) for name in ("one", "two", "asked")]
    assert graphs[0].nodes.of_attention.any()
    for other in graphs[1:]:
        assert other.nodes.ids() == graphs[0].nodes.ids()
        assert np.array_equal(other.edges.weight, graphs[0].edges.weight)
        assert other.metadata["crosscoder_fingerprint"] == graphs[0].metadata["crosscoder_fingerprint"]
    assert "attention_crosscoder" not in graphs[0].metadata["loaded_from"]
    again = ModelOptions().for_graph(graphs[0].metadata).load()
    assert crosscoder_fingerprint(again) == graphs[0].metadata["crosscoder_fingerprint"]
    message = error_of(capsys, circuits_main, "trace", PROMPT, *options(folders), "--attention", "linear")
    assert message == "attention: expected features with a joint crosscoder, given linear"
    message = error_of(
        capsys, circuits_main, "trace", PROMPT, *options(folders), "--attention-crosscoder", folders["attention"]
    )
    assert message == "a joint crosscoder replaces attention, too: expected no attention crosscoder beside it"


def test_both_parts_are_validated(folders: dict[str, str], capsys: Any) -> None:
    arguments = ["--data", folders["rows.npy"], "--tokens", "160", "--json"]
    assert main(["validate", *options(folders), *arguments]) == 0
    facts = json.loads(capsys.readouterr().out)
    two = [*options(folders, "mlps"), "--attention-crosscoder", folders["attention"]]
    assert main(["validate", *two, *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert [row["part"] for row in facts["model"]["crosscoders"]] == ["mlp", "attention"]


def test_both_parts_are_indexed_in_one_folder(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    for part in ("mlp", "attention"):
        arguments = ["--data", folders["rows.npy"], "--tokens", "320", "--part", part]
        assert main(["index", *options(folders), *arguments]) == 0
    folder = Path(folders["joint"]) / "crosscoder"
    assert {file.name for file in folder.glob("*.sqlite")} == {"features.sqlite", "attention_features.sqlite"}
    model = load(folders["model"], crosscoder=folders["joint"])
    with open_indexes(model) as indexes:
        assert {part: index.facts["part"] for part, index in indexes.items()} == {
            "mlp": "mlp",
            "attention": "attention",
        }
    facts = {"loaded_from": model.loaded_from, "crosscoder_fingerprint": None}
    with evidence.open_indexes(facts) as (indexes, notes):
        assert set(indexes) == {"mlp", "attention"}
        assert not notes


def test_other_layouts_refuse_it(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    assert main(["show", folders["joint"]]) == 0
    assert "joint, 6 groups" in capsys.readouterr().out
    message = error_of(capsys, main, "convert", folders["joint"], str(tmp_path / "out"), "--to", "circuit-tracer-clt")
    assert "joint" in message


def test_a_joint_crosscoder_of_attention_alone(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a joint one is given as the crosscoder of both"):
        load(folders["model"], crosscoder=folders["mlps"], attention_crosscoder=folders["joint"])
    model = load(folders["model"], crosscoder=folders["joint"], dtype="float64")
    assert model.attention_crosscoder is not None
    assert model.attention_crosscoder.dtype == torch.float64
