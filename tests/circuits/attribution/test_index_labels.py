"""Labels of a feature index in a graph: used where they are clear, shown with their score by every export, else a hint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import circuits
from circuits.attribution.hints import LONGEST, _hint
from circuits.graph.feature_labels import label_note
from circuits.graph.nodes import NodeKind
from replacement import ReplacementModel, Wiring, checkpoint
from replacement.index.records import UNCLEAR, Label
from replacement.index.store import FILE_NAME, FeatureIndex
from replacement.index.writing import IndexWriter

LONG = "words ending in " + ", ".join(f'"{letter}"' for letter in "abcdefghijklmnopqrst")
RULE, PERSON = Label("city names", "rule", "city names", 0.9, 0.8, 0.85), Label("Ada's label", "person")
WEAK = Label(UNCLEAR, "rule", "after", 0.1, 0.1, 0.1)


def model_of(lm: Any, *, attention: bool = False) -> ReplacementModel:
    of_attention = tiny.crosscoder_for(lm, wiring=Wiring.attention(lm)) if attention else None
    return ReplacementModel(lm, tiny.crosscoder_for(lm), attention_crosscoder=of_attention)


def index_of(path: Path, crosscoder: Any, labels: dict[tuple[int, int], Label]) -> FeatureIndex:
    facts = {
        "crosscoder_fingerprint": crosscoder.fingerprint,
        "model": "tiny",
        "layers": list(crosscoder.wiring.layers),
        "n_features": crosscoder.n_features,
        "n_tokens": 10,
        "vocabulary_size": 3,
        "settings": {},
    }
    writer = IndexWriter(path, facts, ["a", "b", "c"])
    writer.labels((*feature, label) for feature, label in labels.items() if label.source == "rule")
    writer.person_labels({feature: [label] for feature, label in labels.items() if label.source == "person"})
    writer.close()
    return FeatureIndex.open(path)


def names(graph: circuits.CircuitGraph) -> dict[tuple[int, int, int], list[tuple[int, str]]]:
    """Row and label of every feature, by part, layer and index."""
    found: dict[tuple[int, int, int], list[tuple[int, str]]] = {}
    nodes = graph.nodes
    for row in np.flatnonzero(nodes.mask(NodeKind.FEATURE)).tolist():
        key = (int(nodes.part[row]), int(nodes.layer[row]), int(nodes.index[row]))
        found.setdefault(key, []).append((row, nodes.label[row]))
    return found


@pytest.fixture(autouse=True)
def every_feature_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuits.attribution.trace.LABELLED", 10**6)


@pytest.fixture
def traced(language_model: Any, tmp_path: Path) -> tuple[ReplacementModel, circuits.CircuitGraph, FeatureIndex]:
    """A graph without an index, and an index with a label of each kind for four of its features."""
    model = model_of(language_model("llama"))
    graph = circuits.trace(model, tiny.random_tokens(), index=())
    chosen = [(layer, index) for _, layer, index in list(names(graph))[:4]]
    kinds = (RULE, PERSON, WEAK, Label(LONG, "rule", LONG, 1.0, 1.0, 1.0))
    return model, graph, index_of(tmp_path / FILE_NAME, model.crosscoder, dict(zip(chosen, kinds, strict=True)))


def test_clear_labels_replace_hints(traced: Any) -> None:
    model, hinted, index = traced
    for graph in (
        circuits.trace(model, tiny.random_tokens(), index=index),
        circuits.with_labels(model, hinted, index=index),
    ):
        by_rule, by_person, weak, long, *others = names(graph).items()
        assert {label for _, label in by_rule[1]} == {"city names"}
        assert {label for _, label in by_person[1]} == {"Ada's label"}
        assert all(label.startswith("~ ") for _, entries in (weak, *others) for _, label in entries)
        kept = long[1][0][1].removesuffix("…")
        assert len(kept) < LONGEST < len(LONG)
        assert LONG.startswith(f"{kept} "), "cut between words"
        facts = graph.metadata["feature_labels"]
        name_of = {key: f"{key[1]}/{key[2]}" for key in names(graph)}
        assert facts[name_of[by_rule[0]]] == {"source": "rule", "precision": 0.9, "recall": 0.8, "f1": 0.85}
        assert facts[name_of[by_person[0]]] == {"source": "person"}
        assert facts[name_of[weak[0]]] == {"source": "hint"}
        assert facts[name_of[long[0]]]["text"] == LONG
        notes = [label_note(graph, entries[0][0]) for _, entries in (by_rule, by_person, weak)]
        assert notes == ["F1 0.85", "by a person", "a guess from weights"]
        assert label_note(graph, 0) == ""


def test_labels_stay_where_no_index_is_named(traced: Any) -> None:
    model, hinted, index = traced
    assert circuits.with_labels(model, hinted) == hinted
    labelled = circuits.with_labels(model, hinted, index=index)
    assert circuits.with_labels(model, labelled, index=()) == labelled
    assert labelled.prune().metadata["feature_labels"] == labelled.metadata["feature_labels"]


def test_every_export_shows_the_score(traced: Any, tmp_path: Path) -> None:
    model, hinted, index = traced
    graph = circuits.with_labels(model, hinted, index=index)
    (row, _), *_ = next(iter(names(graph).values()))
    name = graph.nodes.ids()[row]
    assert graph.to_networkx().nodes[name]["label_note"] == "F1 0.85"
    assert "(city names); F1 0.85" in graph.to_dot()
    (node,) = [node for node in graph.to_neuronpedia()["nodes"] if node["node_id"] == name]
    assert (node["clerp"], node["label"]) == ("city names (F1 0.85)", "city names")
    for file in ("graph.safetensors", "graph.json"):
        graph.export("safetensors" if file.endswith("safetensors") else "neuronpedia", tmp_path / file)
        assert names(circuits.CircuitGraph.load(tmp_path / file)) == names(graph)
    saved = circuits.CircuitGraph.load(tmp_path / "graph.safetensors")
    assert saved.metadata["feature_labels"] == graph.metadata["feature_labels"]


def test_each_crosscoder_has_its_index(language_model: Any, tmp_path: Path) -> None:
    model, tokens = model_of(language_model("llama"), attention=True), tiny.random_tokens()
    assert model.attention_crosscoder is not None
    features = names(circuits.trace(model, tokens, index=()))
    chosen = [next(key[1:] for key in features if key[0] == part) for part in (0, 1)]
    indexes = [
        index_of(tmp_path / f"{part}", crosscoder, {feature: Label(part, "rule", part, 1.0, 1.0, 1.0)})
        for (part, crosscoder), feature in zip(model.crosscoders.items(), chosen, strict=True)
    ]
    labelled = names(circuits.trace(model, tokens, index=indexes))
    assert {label for _, label in labelled[(0, *chosen[0])]} == {"mlp"}
    assert {label for _, label in labelled[(1, *chosen[1])]} == {"attention"}


def test_an_index_beside_the_crosscoder_is_found(traced: Any, tmp_path: Path) -> None:
    model, hinted, index = traced
    checkpoint.save(model.crosscoder, tmp_path / "crosscoder")
    index.path.rename(tmp_path / "crosscoder" / FILE_NAME)
    model.loaded_from = {"model": "somewhere", "crosscoder": str(tmp_path / "crosscoder")}
    try:
        graph = circuits.trace(model, tiny.random_tokens())
        assert "city names" in graph.nodes.label
        assert circuits.trace(model, tiny.random_tokens(), index=()).nodes.label == hinted.nodes.label
    finally:
        model.loaded_from = None


def test_an_index_of_another_crosscoder_is_refused(traced: Any, language_model: Any, tmp_path: Path) -> None:
    model, hinted, index = traced
    other = index_of(tmp_path / "other", tiny.crosscoder_for(language_model("llama"), n_features=32), {})
    with pytest.raises(ValueError, match=r"index: .*other is of another crosscoder than the model's"):
        circuits.trace(model, tiny.random_tokens(), index=other)
    with pytest.raises(ValueError, match="is of the same crosscoder as another index"):
        circuits.with_labels(model, hinted, index=[index, index])


@pytest.mark.parametrize(
    "facts", [["2/3"], {"2/3": "rule"}, {"2/3": {"source": "rule", "f1": 1.5}}, {"2/3": {"source": 1}}]
)
def test_facts_of_labels_are_checked(traced: Any, facts: Any) -> None:
    _, graph, _ = traced
    with pytest.raises(ValueError, match="expected feature_labels to be an object of objects with a source and scores"):
        circuits.CircuitGraph(graph.nodes, graph.edges, {**graph.metadata, "feature_labels": facts})


def test_hints_are_short_and_can_be_read() -> None:
    assert _hint([" Dallas", "\ufffd", "Dallas", " Austin"], ["\ufffd\ufffd"]) == "~ Dallas, Austin → …"
    assert _hint(["?"], ["Austin"]) == '~ "?" → Austin'
    assert _hint(["<E2>", " ", "a"], ["b"]) == '~ "␣", a → b'
    assert _hint(["aaaa"], [f"token{n}" for n in range(9)]) == "~ aaaa → token0, token1, token2"
    assert _hint(["internationalisation" * 2, "b"], ["c" * 30, "d" * 30]) == f"~ b → {'c' * 30}, {'d' * 30}"
    assert _hint(["a" * 30, "b" * 30], ["c" * 30]) == f"~ {'a' * 30} → {'c' * 30}", "at most LONGEST characters"


def test_graph_json_of_other_tools_keeps_its_words(traced: Any, tmp_path: Path) -> None:
    """A label that is no text is no label of ours."""
    _, graph, _ = traced
    content = graph.to_neuronpedia()
    for node in content["nodes"]:
        node["label"] = 7
    (tmp_path / "graph.json").write_text(json.dumps(content))
    assert names(circuits.CircuitGraph.load(tmp_path / "graph.json")) == names(graph)
