"""The Dallas circuit of the shipped demo: exact, small, and complete enough."""

from __future__ import annotations

import importlib
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
from circuits.graph.conventions import EXACT
from circuits.trace_options import TraceOptions
from replacement import Crosscoder, ModelShape, TopK, Wiring, checkpoint
from replacement.demo.corpus.geography import state_of
from replacement.demo.families import FAMILIES
from replacement.demo.family_cases import JUDGE
from replacement.demo.feature_families import layer_and_index, read_firings
from replacement.loading import ARTIFACTS

EXAMPLES = Path(__file__).parents[3] / "examples"
CROSSCODER = str(ARTIFACTS / "crosscoder")
PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> replacement.ReplacementModel:
    """The shipped replacement model."""
    return replacement.load("demo")


@pytest.mark.parametrize("city", ["Dallas", "Wasilla", "Tampa", "Baltimore"])
def test_groups_of_a_two_hop_circuit(model: replacement.ReplacementModel, city: str) -> None:
    """At most eight groups beside tokens and errors; the most influential one is the state's, as its name and its score say."""
    circuit = circuits.trace(model, PROMPT.replace("Dallas", city)).prune()
    grouping, influence = circuit.group(), circuit.influence()
    groups = [group for group in grouping.groups if group.kind == "features"]
    assert len(groups) + sum(group.kind == "outputs" for group in grouping.groups) <= 8
    top = max(groups, key=lambda group: influence[list(group.members)].sum())
    assert top.name.startswith(state_of(city))
    assert top.f1 is not None
    assert top.f1 > 0.8
    to_answer = [edge for edge in grouping.edges() if grouping.groups[edge.target].kind == "outputs"]
    assert grouping.groups[to_answer[0].source] == top
    assert to_answer[0].weight > 0


def test_dallas_circuit(model: replacement.ReplacementModel) -> None:
    graph = circuits.trace(model, PROMPT)
    assert graph.metadata["targets"][0]["token"] == "Austin"
    assert graph.identity_error <= 1e-4
    full = graph.scores()
    assert full.replacement >= 0.6
    assert full.completeness >= 0.8
    circuit = graph.prune()
    assert len(circuit.nodes) <= 30
    pruned = circuit.scores()
    assert pruned.replacement >= 0.6
    assert pruned.completeness >= 0.85


def test_only_this_packages_conventions_have_a_budget(model: replacement.ReplacementModel) -> None:
    """Pruned sets that agree with circuit-tracer's are not cut further, unless a budget is asked for."""
    loose: dict[str, Any] = {"node_threshold": 1.0, "edge_threshold": 1.0, "heads": False, "use_index": False}
    _, exact = TraceOptions(**loose).trace(model, PROMPT)
    assert len(exact.edges) <= EXACT.circuit_edges
    agreeing = {**loose, "conventions": "circuit-tracer"}
    full, circuit = TraceOptions(**agreeing).trace(model, PROMPT)
    assert circuit.counts() == full.prune(nodes=1.0, edges=1.0).counts()
    assert len(circuit.edges) > EXACT.circuit_edges
    _, cut = TraceOptions(**agreeing, circuit_edges=50).trace(model, PROMPT)
    assert len(cut.edges) <= 50


def test_features_that_fire_for_texas_cities_are_in_the_circuit(model: replacement.ReplacementModel) -> None:
    """Some feature of the pruned circuit fires for most Texas cities and for few others, at the city or at the last word."""
    circuit = circuits.trace(model, PROMPT).prune()
    nodes = circuit.nodes
    mask = nodes.mask(NodeKind.FEATURE)
    inside = set(zip(nodes.layer[mask].tolist(), nodes.index[mask].tolist(), strict=True))
    asked = [case for case in FAMILIES[0].of(JUDGE) if case.prompt.endswith(" is")]
    in_texas = np.array([case.concept == "Texas" for case in asked])
    best = 0.0
    for place in (asked, [case._replace(beginning=case.prompt) for case in asked]):
        firings = read_firings(model, place)
        fires_BF = np.zeros((firings.n_cases, firings.n_features), dtype=bool)
        fires_BF[firings.case_S, firings.feature_S] = True
        is_inside = [layer_and_index(model, feature) in inside for feature in range(firings.n_features)]
        rare = fires_BF[~in_texas].mean(0) <= 0.2
        best = max(best, fires_BF[in_texas].mean(0)[rare & is_inside].max(initial=0.0))
    assert best >= 0.7


def test_the_share_that_passes_through_the_state_is_that_of_the_graph(
    model: replacement.ReplacementModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All influence from a city passes through everything that is not its own tokens' direct edge to the answer."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    two_hop = importlib.import_module("two_hop")
    case = next(case for case in FAMILIES[0].of(JUDGE) if case.detail == "Dallas" and case.asks)
    graph = circuits.trace(model, case.prompt, targets="Austin")
    sources, last = two_hop.city_mask(model, graph, case), two_hop.case_positions(model, [case])[0]
    pieces = [graph.metadata["tokens"][position] for position in graph.nodes.position[sources]]
    assert "".join(piece.removeprefix("##").strip() for piece in pieces) == "Dallas"
    assert graph.metadata["tokens"][last].strip() == pieces[-1].strip()
    everything = two_hop.feature_mask(
        model, graph, case, range(model.crosscoder.n_groups * model.crosscoder.n_features)
    )
    assert (graph.nodes.position[everything] == last).all()
    facts = two_hop.measure(model, n_prompts=2)
    assert facts["prompts"] == 2
    shares = facts["through_state_features"]
    assert 0 <= shares["best_feature"] <= shares["good_features"] <= 1


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
