"""The Dallas circuit of the shipped demo: exact, small, and complete enough."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import circuits
import replacement
from circuits import NodeKind
from circuits.cli import main

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
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
        (["trace", "word " * 70], "does not know 'word'"),
        (["trace", "the " * 70], "the prompt has 71 tokens: demo reads at most 64"),
        (["trace", "the capital of Atlantis is"], "does not know 'Atlantis'"),
        (["trace", PROMPT, "--target", "Narnia"], "'Narnia' is not a single token"),
        (["trace", PROMPT, "--model", "/nowhere"], "no language model folder at /nowhere"),
        (["trace", PROMPT, "--crosscoder", "/nowhere"], "/nowhere is not a folder"),
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
