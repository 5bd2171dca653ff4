"""`circuits heads`: what it says about a graph, an edge, a feature and a check, and one line for every mistake."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import circuits
import replacement
from circuits import CircuitGraph, FeatureTarget, NodeKind
from circuits.cli import main
from circuits.graph.influence import edge_influence
from circuits.heads.edge_split import split_heads
from circuits.heads.feature_heads import head_view
from circuits.heads.pages import feature_page
from circuits.heads.relu_credit import EXACT_PLAYERS
from circuits.heads.removal_check import HeadCheck

SEVERAL = "expected one of --edge, --feature, --attends and --check, given several"
ATTENDS = "attends: expected layer.head, layer.head@query or layer.head@query<key"
PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> replacement.ReplacementModel:
    return replacement.load("demo")


@pytest.fixture(scope="module")
def graph(model: replacement.ReplacementModel) -> CircuitGraph:
    """A pruned circuit of the demo, without heads."""
    return circuits.trace(model, PROMPT).prune(nodes=0.8, edges=0.95)


@pytest.fixture
def saved(graph: CircuitGraph, tmp_path: Path) -> Path:
    return graph.save(tmp_path / "circuit.safetensors")


@pytest.fixture
def split(model: replacement.ReplacementModel, graph: CircuitGraph, tmp_path: Path) -> Path:
    """The same circuit, with the heads of every edge."""
    return circuits.with_heads(model, graph).save(tmp_path / "split.safetensors")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(replacement, "load", load)


def says(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["heads", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def facts_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    found = json.loads(says(capsys, *arguments, "--json"))
    assert isinstance(found, dict)
    return found


def strongest_edge(graph: CircuitGraph) -> tuple[int, str]:
    number = int(np.argmax(edge_influence(graph)))
    ids = graph.nodes.ids()
    return number, f"{ids[graph.edges.source[number]]}->{ids[graph.edges.target[number]]}"


@pytest.mark.usefixtures("no_model")
def test_heads_of_a_graph_that_has_them(split: Path, capsys: Any) -> None:
    graph = CircuitGraph.load(split)
    facts = facts_of(capsys, split, "--top", 3)
    influence_E, carried = edge_influence(graph), np.zeros((4, 4))
    direct = 0.0
    for edge, influence in enumerate(influence_E.tolist()):
        size = (
            abs(graph.heads.direct[edge]) + abs(graph.heads.rest[edge]) + sum(abs(w) for *_, w in graph.heads.of(edge))
        )
        direct += influence * abs(graph.heads.direct[edge]) / size
        for layer, head, weight in graph.heads.of(edge):
            carried[layer, head] += influence * abs(weight) / size
    for row in facts["heads"]:
        assert row["influence"] == pytest.approx(carried[row["layer"], row["head"]], rel=1e-4)
        assert row["share"] == pytest.approx(row["influence"] / influence_E.sum(), rel=1e-4)
    assert len(facts["heads"]) == (carried > 0).sum()
    assert facts["direct"]["influence"] == pytest.approx(direct, rel=1e-4)
    shares = [row["share"] for row in facts["heads"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) + facts["direct"]["share"] + facts["rest"]["share"] == pytest.approx(1)
    assert len(facts["edges"]) == 3
    assert f"{facts['edges'][0]['source']}->{facts['edges'][0]['target']}" == strongest_edge(graph)[1]
    page = says(capsys, split)
    for text in (PROMPT, "L0H0", "direct", "Strongest edges", strongest_edge(graph)[1]):
        assert text in page


def test_heads_are_computed_where_the_file_has_none(saved: Path, split: Path, capsys: Any) -> None:
    computed, kept = facts_of(capsys, saved), facts_of(capsys, split)
    assert computed.keys() == kept.keys()
    for one, other in zip(computed["heads"], kept["heads"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("file", ["saved", "split"])
def test_an_edge_by_both_hops(
    model: Any, graph: CircuitGraph, file: str, request: pytest.FixtureRequest, capsys: Any
) -> None:
    logits = graph.nodes.mask(NodeKind.LOGIT)
    into = np.flatnonzero(logits[graph.edges.target])
    heads_ELH = split_heads(model, graph).heads_ELH
    number = int(into[np.argmax(np.abs(heads_ELH[into]).sum((1, 2)))])
    ids = graph.nodes.ids()
    name = f"{ids[graph.edges.source[number]]} -> {ids[graph.edges.target[number]]}"
    path = request.getfixturevalue(file)
    facts = facts_of(capsys, path, "--edge", name)
    for hop in ("last", "first"):
        expected, found = split_heads(model, graph, hop=hop), facts[hop]
        parts = found["direct"] + found["rest"] + sum(head["weight"] for head in found["heads"])
        assert parts == pytest.approx(facts["weight"], rel=1e-4)
        assert found["direct"] == pytest.approx(expected.direct_E[number], rel=1e-3, abs=1e-5)
        size = abs(expected.direct_E[number]) + np.abs(expected.heads_ELH[number]).sum()
        named = {(head["layer"], head["head"]): head["weight"] for head in found["heads"]}
        for place in zip(*np.nonzero(np.abs(expected.heads_ELH[number]) > 0.0101 * size), strict=True):
            assert named[place] == pytest.approx(expected.heads_ELH[number][place], rel=1e-3)
        assert all(abs(weight) > 0.0099 * size for weight in named.values())
        assert named
    page = says(capsys, path, "--edge", name)
    for text in ("last hop", "first hop", "direct", f"{facts['weight']:+.4f}"):
        assert text in page


def test_a_feature_with_credit_and_picture(
    model: Any, graph: CircuitGraph, saved: Path, tmp_path: Path, capsys: Any
) -> None:
    nodes = graph.nodes
    features = np.flatnonzero(nodes.mask(NodeKind.FEATURE))
    row = int(features[nodes.layer[features].argmax()])
    layer, index, position = (int(getattr(nodes, name)[row]) for name in ("layer", "index", "position"))
    name, picture = f"{layer}/{index}@{position}", tmp_path / "heads.svg"
    options = ["--feature", name, "--rule", "shapley", "--top", 5]
    facts = facts_of(capsys, saved, *options, "--plot", picture)
    view = head_view(model, PROMPT, FeatureTarget(layer, index, position))
    credit = view.credit("shapley")
    assert facts["feature"] == name
    assert (facts["rule"], facts["activation"]) == ("shapley", pytest.approx(view.activation))
    assert facts["residual"] == pytest.approx(credit.residual, abs=1e-6)
    console = Console(file=io.StringIO(), width=400)
    console.print(feature_page(facts))
    assert f"picture: {picture}" in console.file.getvalue()
    by_head = dict(zip(view.players, credit.credit_J, strict=False))
    assert len(facts["heads"]) == 5
    for head in facts["heads"]:
        assert head["credit"] == pytest.approx(by_head[head["layer"], head["head"]], abs=1e-5)
        assert (head["standard_error"] > 0) == (np.count_nonzero(view.contributions) > EXACT_PLAYERS)
    total = sum(head["contribution"] for head in facts["heads"]) + facts["other_heads"]["contribution"]
    assert total + facts["direct"]["contribution"] + facts["bias"] == pytest.approx(facts["pre_activation"], rel=1e-4)
    assert facts["files"] == {"plot": str(picture)}
    assert picture.read_text().startswith("<?xml")
    assert "these losses need not sum to the activation" in " ".join(says(capsys, saved, "--feature", name).split())
    page = says(capsys, saved, *options)
    for text in (
        f"feature {name}",
        "credit (shapley)",
        f"{4 * (layer + 1) - 5} other heads",
        "direct",
        "bias",
        "residual",
    ):
        assert text in page


def tokens_of(model: Any, graph: CircuitGraph) -> Any:
    return torch.tensor(graph.metadata["token_ids"], device=model.language_model.device)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("2.0", {"layer": 2, "head": 0}),
        ("1.3@-2", {"layer": 1, "head": 3, "query": -2}),
        (" 3.1@7<5 ", {"layer": 3, "head": 1, "query": 7, "key": 5}),
        ("2.2<0", {"layer": 2, "head": 2, "key": 0}),
        ("2.2@-1<-3", {"layer": 2, "head": 2, "key": 6}),
    ],
)
def test_why_a_head_attends(
    model: Any, graph: CircuitGraph, saved: Path, capsys: Any, where: str, place: dict[str, int]
) -> None:
    facts = facts_of(capsys, saved, "--attends", where, "--top", 7)
    found = circuits.attribute_score(model, tokens_of(model, graph), contrast="mean", **place)
    for name in ("layer", "head", "query", "key", "contrast"):
        assert facts[name] == getattr(found, name)
    for name in ("score", "pattern", "value"):
        assert facts[name] == pytest.approx(getattr(found, name), rel=1e-5)
    assert facts["identity_error"] <= 1e-3
    tokens = model.language_model.token_strings(graph.metadata["token_ids"])
    assert (facts["query_token"], facts["key_token"]) == (tokens[found.query], tokens[found.key])
    for shown, (query, key, contribution) in zip(facts["pairs"], found.top(7), strict=True):
        assert shown["contribution"] == pytest.approx(contribution, rel=1e-3)
        assert (shown["query"], shown["key"]) == (query.to_json(), key.to_json())
    for name in ("by_query", "by_key"):
        for shown, (node, contribution) in zip(facts[name], getattr(found, name)(7), strict=True):
            assert shown == {**node.to_json(), "contribution": pytest.approx(contribution, rel=1e-3)}


def test_why_a_head_attends_as_a_page(saved: Path, capsys: Any) -> None:
    facts = facts_of(capsys, saved, "--attends", "2.0@8<7")
    page = says(capsys, saved, "--attends", "2.0@8<7")
    words = " ".join(page.split())
    title = f'L2H0: "{facts["query_token"].strip()}" at 8 attends to "{facts["key_token"].strip()}" at 7'
    numbers = (
        f"pattern {facts['pattern']:.4f}, score {facts['score']:+.4f}, above the mean of the other visible keys by"
    )
    for text in (title, numbers, "Largest pairs", "By query node", "By key node", "sum of all pairs", "feature "):
        assert text in words
    assert len(facts["pairs"]) == len(facts["by_key"]) == 10
    shown = page[page.index("By key node") :]
    assert [f"{node['contribution']:+.4f}" in shown for node in facts["by_key"][:5]] == [True] * 5
    assert f"{facts['by_key'][5]['contribution']:+.4f}" not in shown


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Records what is checked, instead of doing it."""
    calls: list[dict[str, Any]] = []

    def check(model: Any, prompts: list[Any], **options: Any) -> HeadCheck:
        calls.append({"prompts": prompts, **options})
        values = {"path": np.array([1.0, 2.0]), "gate": np.array([1.0, 1.0])}
        return HeadCheck(len(prompts), 2, values, {"direct": np.array([1.0, 3.0]), "live": np.array([2.0, 4.0])})

    monkeypatch.setattr("circuits.heads.removal_check.check_heads", check)
    return calls


def test_check_without_a_graph(checked: list[dict[str, Any]], capsys: Any) -> None:
    facts = facts_of(capsys, "--check")
    assert (facts["prompts"], facts["features"], facts["pairs"]) == (20, 2, 2)
    assert facts["rungs"]["direct"]["path"] == {"correlation": pytest.approx(1), "relative_error": 0.25}
    assert facts["rungs"]["live"]["gate"] == {"correlation": None, "relative_error": pytest.approx(4 / 6)}
    assert len({tuple(prompt) for prompt in checked[0]["prompts"]}) == 20
    page = " ".join(says(capsys, "--check").split())
    for text in ("2 (feature, head) pairs", "exact here by construction", "relative error", "1.000", "–"):
        assert text in page


def test_check_of_a_graphs_prompt(checked: list[dict[str, Any]], graph: CircuitGraph, saved: Path, capsys: Any) -> None:
    facts_of(capsys, saved, "--check")
    (prompt,) = checked[0]["prompts"]
    assert prompt.tolist() == graph.metadata["token_ids"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--edge", "a->b", "--check"], SEVERAL),
        (["--edge", "a->b", "--feature", "1/2@3"], SEVERAL),
        (["--attends", "2.0", "--edge", "a->b"], SEVERAL),
        (["--attends", "2.0", "--feature", "1/2@3"], SEVERAL),
        (["--attends", "2.0", "--check"], SEVERAL),
        (["--attends", "2/0"], f"{ATTENDS}, given '2/0'"),
        (["--attends", "2.0@"], f"{ATTENDS}, given '2.0@'"),
        (["--attends", "2.0<4@8"], f"{ATTENDS}, given '2.0<4@8'"),
        (["--attends", "-1.0"], f"{ATTENDS}, given '-1.0'"),
        (["--rule", "path"], "rule: expected together with --feature"),
        (["--rule", "lime"], "rule: expected one of gate, path, shapley, ablation, given 'lime'"),
        (["--top", "0"], "top: expected at least 1, given 0"),
        (["--top", "many"], "Invalid value for '--top'"),
        (
            ["--feature", "2.345"],
            "feature: expected the name of a feature such as 2/345@7 or attention:2/345@7, got '2.345'",
        ),
        (["--feature", ""], "feature: expected the name of a feature such as 2/345@7 or attention:2/345@7, got ''"),
        (["--feature", "-1/3@7"], "feature: expected the name of a feature"),
        (["--feature", "1" * 9999], "11111…'"),
        (["--feature", "1/2@3", "--rule", "PATH"], "rule: expected one of gate, path, shapley, ablation, given 'PATH'"),
        (["--attends", ""], f"{ATTENDS}, given ''"),
        (["--attends", "2.0@1e3"], f"{ATTENDS}, given '2.0@1e3'"),
        (["--edge", ""], "edge: expected two node ids as SOURCE->TARGET, given ''"),
        (["--edge", "x" * 9999 + "->E_8_8"], "edge: the graph has no node 'xxxx"),
        (["--edge", "->".join("ab" * 99)], "edge: the graph has no node 'a'"),
        (["--top", "-9"], "top: expected at least 1, given -9"),
        (["--feature", "1/2@3", "--plot", "/proc/heads.svg"], "/proc"),
        (["--feature", "1/2@3", "--plot", "/dev/null/heads.svg"], "/dev/null"),
        (["--plot", "x.svg"], "plot: expected together with --feature"),
        (["--feature", "1/2@3", "--plot", "x.gif"], "x.gif: expected a file that ends in .svg or .png"),
        (["--edge", "E_1_1"], "edge: expected two node ids as SOURCE->TARGET, given 'E_1_1'"),
        (["--edge", "zzz->E_8_8"], "edge: the graph has no node 'zzz'"),
    ],
)
def test_a_mistake_is_one_line(saved: Path, capsys: Any, options: list[str], message: str) -> None:
    assert message in fails(capsys, saved, *options)


def fails(capsys: Any, *arguments: object) -> str:
    assert main(["heads", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert len(output.err) < 500
    return output.err


@pytest.mark.usefixtures("no_model")
def test_mistakes_about_the_file(capsys: Any) -> None:
    assert "expected a graph, given none" in fails(capsys)
    assert "there is no such file" in fails(capsys, "missing.safetensors")
    assert "--check draws prompts of the demo's corpus: give a graph of gpt2" in fails(
        capsys, "--check", "--model", "gpt2"
    )


@pytest.mark.usefixtures("no_model")
def test_mistyped_nodes_are_answered_with_similar_ones(graph: CircuitGraph, saved: Path, capsys: Any) -> None:
    name = strongest_edge(graph)[1]
    source, target = name.split("->")
    assert f"the graph has no node '{source}1'; similar ones: {source}" in fails(
        capsys, saved, "--edge", f"{source}1->{target}"
    )
    answer = fails(capsys, saved, "--edge", f"{target}->{source}")
    assert f"the graph has no edge {target}->{source}" in answer
    assert f"{target} is reached from {source}" in fails(capsys, saved, "--edge", f"{target}->{target}")


def test_mistakes_that_need_the_model(graph: CircuitGraph, saved: Path, tmp_path: Path, capsys: Any) -> None:
    assert "feature 3/99999 is not active at position 8" in fails(capsys, saved, "--feature", "3/99999@8")
    assert "there are no attention features" in fails(capsys, saved, "--feature", "attention:3/1@8")
    assert "lies outside the prompt of 9 tokens" in fails(capsys, saved, "--feature", "3/1@9")
    for where, message in (
        ("4.0", "the language model has no layer 4: it has 4 layers"),
        ("1.4", "layer 1 has no head 4: it has 4 heads"),
        ("1.0@9", "query position 9 lies outside the prompt of 9 tokens"),
        ("1.0@-10", "query position -10 lies outside the prompt of 9 tokens"),
        ("1.0<9", "key position 9 lies outside the prompt of 9 tokens"),
        ("1.0@4<5", "key position 5 lies after query position 4, which cannot attend to it"),
        ("1.0@0", "no contrast: position 0 is the only key that position 0 sees"),
    ):
        assert message in fails(capsys, saved, "--attends", where)
    huge = "9" * 30
    for feature, message in (
        (f"3/{huge}@8", f"feature 3/{huge} is not active at position 8"),
        (f"{huge}/3@8", f"the crosscoder has no features in layer {huge}"),
        (f"3/1@{huge}", "lies outside the prompt of 9 tokens"),
        ("3/1@-10", "position -10 lies outside the prompt of 9 tokens"),
    ):
        assert message in fails(capsys, saved, "--feature", feature)
    for where in (f"{huge}.0", f"1.{huge}", f"1.0@{huge}", f"1.0@8<{huge}", f"1.0@8<-{huge}"):
        assert huge in fails(capsys, saved, "--attends", where)


@pytest.mark.parametrize("fact", ["model_fingerprint", "crosscoder_fingerprint"])
def test_graphs_of_others_are_refused(graph: CircuitGraph, tmp_path: Path, capsys: Any, fact: str) -> None:
    """Whatever is asked: it would be answered for another model, or for other features of the same number."""
    facts = {**graph.metadata, fact: "other", "loaded_from": {"model": "demo"}}
    path = dataclasses.replace(graph, metadata=facts).save(tmp_path / "other.safetensors")
    message = {"model_fingerprint": "the graph was traced in demo, whose weights are not those of demo"}
    questions = [[], ["--feature", "3/1@8"], ["--attends", "1.0"], ["--check"], ["--edge", strongest_edge(graph)[1]]]
    for question in questions:
        assert message.get(fact, "the graph was traced with another crosscoder") in fails(capsys, path, *question)


@pytest.mark.usefixtures("no_model")
def test_the_model_is_the_graphs(graph: CircuitGraph, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Model and crosscoders come from the graph, unless options name others."""
    asked: list[dict[str, Any]] = []

    def load(model: str, **options: Any) -> None:
        asked.append({"model": model, **options})
        raise ValueError("seen enough")

    monkeypatch.setattr(replacement, "load", load)
    stored = {"model": "/models/one", "crosscoder": "/runs/two", "attention_crosscoder": "/runs/three"}
    facts = {**graph.metadata, "attention": "attention, 4 x 64 features, TopK", "loaded_from": stored}
    path = dataclasses.replace(graph, metadata=facts).save(tmp_path / "stored.safetensors")
    for question in (
        [],
        ["--feature", "3/1@8"],
        ["--attends", "1.0"],
        ["--check"],
        ["--edge", strongest_edge(graph)[1]],
    ):
        assert "seen enough" in fails(capsys, path, *question, "--dtype", "float64")
        assert asked.pop() == {**stored, "base": None, "device": "cpu", "dtype": "float64"}
    assert "seen enough" in fails(capsys, path, "--check", "--crosscoder", "four")
    assert asked.pop() == {**stored, "base": None, "crosscoder": "four", "device": "cpu", "dtype": "float32"}


@pytest.mark.usefixtures("no_model")
def test_an_attention_crosscoder_for_a_graph_without_one_is_refused(saved: Path, capsys: Any) -> None:
    message = "attention-crosscoder: the graph was traced with linear attention, it takes none"
    assert message in fails(capsys, saved, "--attention-crosscoder", "demo")


@pytest.mark.usefixtures("no_model")
def test_pictures_replace_regular_files_only(saved: Path, tmp_path: Path, capsys: Any) -> None:
    targets = {name: tmp_path / f"{name}.svg" for name in ("fifo", "folder", "device")}
    os.mkfifo(targets["fifo"])
    targets["folder"].mkdir()
    targets["device"].symlink_to("/dev/full")
    for name, target in targets.items():
        message = fails(capsys, saved, "--feature", "1/2@3", "--plot", target)
        assert f"{target}: expected a file name, given a" in message, name
    assert stat.S_ISFIFO(targets["fifo"].stat().st_mode)
    assert targets["device"].is_symlink()


def test_a_graph_without_edges(model: Any, graph: CircuitGraph, tmp_path: Path, capsys: Any) -> None:
    empty = graph.prune(nodes=0.0, edges=0.0)
    assert len(empty.edges) == 0
    path = circuits.with_heads(model, empty).save(tmp_path / "empty.safetensors")
    assert (facts := facts_of(capsys, path))["heads"] == facts["edges"] == []
    assert PROMPT in says(capsys, path)
    assert "the graph has no" in fails(capsys, path, "--edge", strongest_edge(graph)[1])


def test_more_than_there_is(split: Path, capsys: Any) -> None:
    facts = facts_of(capsys, split, "--top", "9" * 30)
    assert len(facts["edges"]) == len(CircuitGraph.load(split).edges)


def test_help_loads_no_model_code() -> None:
    script = "import sys; from circuits.cli import main; main(['heads', '--help']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    for text in ("SOURCE->TARGET", "2.0@9<5"):
        assert text in ran.stdout
    assert ran.stdout.strip().endswith("False")
