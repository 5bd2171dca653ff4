"""The Dallas circuit of the shipped demo: exact, small, and complete enough."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import circuits
import replacement
from circuits import NodeKind
from circuits.cli import main
from replacement import Crosscoder, ModelShape, TopK, Wiring, checkpoint
from replacement.loading import ARTIFACTS

EXAMPLES = Path(__file__).parents[3] / "examples"
CROSSCODER = str(ARTIFACTS / "crosscoder")
PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> replacement.ReplacementModel:
    """The shipped replacement model."""
    return replacement.load("demo")


def test_dallas_circuit(model: replacement.ReplacementModel) -> None:
    graph = circuits.trace(model, PROMPT)
    assert graph.metadata["targets"][0]["token"] == "Austin"
    assert graph.identity_error <= 1e-4
    full = graph.scores()
    assert full.replacement >= 0.6
    assert full.completeness >= 0.8
    circuit = graph.prune()
    assert len(circuit.nodes) <= 80
    pruned = circuit.scores()
    assert pruned.replacement >= 0.6
    assert pruned.completeness >= 0.8


def test_features_that_fire_for_texas_cities_are_in_the_circuit(model: replacement.ReplacementModel) -> None:
    """Some feature of the pruned circuit fires for most Texas cities and for few others."""
    from replacement.demo.corpus import cities_of, state_of, states

    circuit = circuits.trace(model, PROMPT).prune()
    nodes = circuit.nodes
    mask = nodes.mask(NodeKind.FEATURE)
    inside = set(
        zip(nodes.layer[mask].tolist(), nodes.position[mask].tolist(), nodes.index[mask].tolist(), strict=True)
    )
    fires: dict[tuple[int, int, int], list[str]] = {key: [] for key in inside}
    cities = [city for state in states() for city in cities_of(state, capital=False)]
    for city in cities:
        features = model.localize(
            model.language_model.tokenize(f"the capital of the state containing {city} is")
        ).features
        keys = zip(features.group.tolist(), features.row.tolist(), features.index.tolist(), strict=True)
        for key in inside & set(keys):
            fires[key].append(state_of(city))
    in_texas = np.array([found.count("Texas") / len(cities_of("Texas", capital=False)) for found in fires.values()])
    elsewhere = np.array([sum(state != "Texas" for state in found) for found in fires.values()]) / len(cities)
    assert ((in_texas >= 0.7) & (elsewhere <= 0.2)).any()


def test_swapping_the_states_features_swaps_the_capital(
    model: replacement.ReplacementModel, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("two_hop", EXAMPLES / "two_hop.py")
    assert spec is not None
    assert spec.loader is not None
    two_hop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_hop)
    by_city = two_hop.features_by_city(model)
    from_texas, _ = two_hop.random_pairs(20, seed=1)
    right = two_hop.print_swaps(model, by_city, from_texas)
    assert right >= 16
    assert f"right, all features: {right} of 20" in capsys.readouterr().out


def test_cli_prints_one_json_object_and_writes_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", PROMPT, "--out", str(tmp_path / "out"), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert facts["prompt"] == PROMPT
    assert facts["targets"][0]["token"] == "Austin"
    assert set(facts) >= {
        "tokens", "nodes", "edges", "pruned", "scores", "pruned_scores", "identity_error", "stopped_by", "seconds", "files",
    }  # fmt: skip
    counts = facts["nodes"]
    assert counts["total"] == sum(value for name, value in counts.items() if name != "total")
    assert all(Path(path).is_file() for path in facts["files"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", " "], "prompt: expected some text"),
        (["trace", "the " * 70], "the prompt has 71 tokens: demo reads at most 64"),
        (["trace", "the capital of Atlantis is"], "does not know 'Atlantis'"),
        (["trace", PROMPT, "--target", "Narnia"], "'Narnia' is not a single token"),
        (["trace", PROMPT, "--model", "/nowhere"], "expected a crosscoder made for /nowhere"),
        (["trace", PROMPT, "--model", "/nowhere", "--crosscoder", CROSSCODER], "no language model folder at /nowhere"),
        (["trace", PROMPT, "--crosscoder", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not out.exists() or not list(out.iterdir())


def fails(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake; nothing is written."""
    assert main(["trace", PROMPT, *arguments, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not out.is_dir() or not list(out.iterdir())
    return captured.err


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (ModelShape(4, 64, 4, 16), "this crosscoder has width 64 at mlp_out, the model has 128"),
        (ModelShape(3, 128, 4, 32), "spans 3 layers, the model has 4"),
        (ModelShape(4, 128, 4, 32), "this crosscoder was trained on another model: on 'other' with weights 0123"),
    ],
    ids=["width", "depth", "model"],
)
def test_a_crosscoder_of_another_model(
    shape: ModelShape, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Crosscoder(
        Wiring.strictly_causal(shape), n_features=8, activation=TopK(2), model_name="other", model_fingerprint="0123"
    )
    checkpoint.save(other, tmp_path / "other")
    assert message in fails(["--crosscoder", str(tmp_path / "other")], tmp_path / "out", capsys)


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated, foreign, broken = (tmp_path / name for name in ("truncated", "foreign", "broken"))
    shutil.copytree(ARTIFACTS / "crosscoder", truncated)
    weights = truncated / "crosscoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    assert f"{weights} is damaged" in fails(["--crosscoder", str(truncated)], tmp_path / "out", capsys)
    shutil.copytree(ARTIFACTS / "language_model", foreign)
    assert "foreign has no known layout" in fails(["--crosscoder", str(foreign)], tmp_path / "out", capsys)
    shutil.copytree(ARTIFACTS / "language_model", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.h.2.mlp.c_fc.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "holds NaN or infinity" in fails(
        ["--model", str(broken), "--crosscoder", CROSSCODER], tmp_path / "out", capsys
    )
    (broken / "tokenizer.json").write_text("{}")
    assert "cannot load the language model" in fails(
        ["--model", str(broken), "--crosscoder", CROSSCODER], tmp_path / "out", capsys
    )


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "expected a folder" in fails([], tmp_path / "file" / "out", capsys)
    (tmp_path / "out" / "circuit.json").mkdir(parents=True)
    assert main(["trace", PROMPT, "--out", str(tmp_path / "out")]) == 2
    assert "circuit.json: expected a file name, given a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["circuit.json"]


def test_a_long_prompt_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Libraries that log on their own handlers escape pytest's capture."""
    script = "import sys; from circuits.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "trace", "the " * 70, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the prompt has 71 tokens: demo reads at most 64\n"
