"""The feature index in the page's payload: each feature and text once, nothing beyond the budget, no other crosscoder's."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from index_file import CITY, EFFECTS, TEXTS, write

from circuits import CircuitGraph, NodeKind
from circuits.graph.feature_labels import FEATURE_LABELS
from circuits.viewer import evidence as room
from circuits.viewer.evidence import evidence
from replacement.index.records import Example, FeatureRecord
from replacement.index.store import FeatureIndex

T, _, _, F, L = NodeKind
HOSTILE = ["<s>", " the", " Dallas", '</script><img src=x onerror="alert(1)">', "a%b", " \n"]


Build = Callable[..., CircuitGraph]


@pytest.fixture
def graph(build_graph: Build) -> Build:
    """Feature 0/1 at two positions, 2/0 and an attention feature, all of which feed one output."""
    feature = {"kind": F, "activation": 1.0}
    rows = [
        {"kind": T, "position": 0, "index": 5, "label": "a"},
        {"kind": T, "position": 1, "index": 6, "label": "b"},
        {**feature, "layer": 0, "index": 1, "position": 0, "label": "~ a → b"},
        {**feature, "layer": 0, "index": 1, "position": 1, "label": "~ a → b"},
        {**feature, "layer": 2, "index": 0, "position": 1},
        {**feature, "layer": 0, "index": 1, "position": 1, "part": 1},
        {"kind": L, "layer": 3, "position": 1, "index": 7, "output_weight": 1.0, "expanded": True},
    ]
    edges = [(6, 2, 1.0), (6, 3, 4.0), (6, 4, 2.0), (6, 5, 1.0)]
    return lambda **facts: build_graph(rows, edges, **{"crosscoder_fingerprint": "2:abc", **facts})


def opened(path: Path, **changed: Any) -> FeatureIndex:
    return FeatureIndex.open(write(path, **changed))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[FeatureIndex]:
    with opened(tmp_path / "features.sqlite") as result:
        yield result


def decoded(value: list[str]) -> list[int]:
    return np.frombuffer(base64.b64decode(value[1]), f"<{value[0]}").tolist()


def test_records_are_those_of_the_index(index: FeatureIndex, graph: Build) -> None:
    found = json.loads(json.dumps(evidence(graph(), index), allow_nan=False))
    of_node, texts = decoded(found["record"]), found["texts"]
    assert (of_node[:2], of_node[6]) == ([-1, -1], -1)
    assert of_node[2] == of_node[3] != of_node[4] != of_node[5], "the feature at two places once"
    record = found["records"][of_node[2]]
    assert (record["density"], record["max_activation"]) == (10 / 40, 8.0)
    assert (record["bin_width"], record["histogram"]) == (2.0, [3, 0, 300])
    assert record["examples"] == [[None, 1, 3, [1, 8.0, 2, 4.0]], [0.25, 2, 3, [2, 2.0]]]
    assert [texts[token] for token in decoded(found["tokens"])] == ["<s>", " Dallas", " the", " the", "dallas", "a%b"]
    (label, weak) = found["records"][of_node[4]]["labels"]
    assert label == {
        "text": "cities",
        "source": "rule",
        "claim": "cities",
        "precision": 0.9,
        "recall": 0.8,
        "f1": 0.8471,
    }
    assert (weak["text"], weak["f1"]) == ("unclear", 0.1333)
    assert (len(texts), found["kept"], list(found["notes"])) == (len(set(texts)), [2, 3], ["attention"])
    assert found["records"][of_node[5]] == {}, "the index is of MLP features"


def test_token_effects(index: FeatureIndex, build_graph: Build) -> None:
    found = evidence(build_graph(one_feature(0, 0), [(1, 0, 1.0)], crosscoder_fingerprint="2:abc"), index)
    (record,) = found["records"]
    for role in ("promoted", "suppressed", "read", "read_through_heads"):
        assert [(found["texts"][token], weight) for token, weight in record[role]] == list(getattr(EFFECTS, role))


def one_feature(layer: int, number: int) -> list[dict[str, Any]]:
    output = {"kind": L, "layer": 3, "index": 7, "output_weight": 1.0, "expanded": True}
    return [{"kind": F, "layer": layer, "index": number, "activation": 1.0}, output]


def test_what_the_graph_knows_of_a_label_is_there_without_an_index(graph: Build) -> None:
    facts = {"0/1": {"source": "hint"}, "2/0": {"source": "rule", "f1": 0.9}}
    found = evidence(graph(**{FEATURE_LABELS: facts}), ())
    assert found["records"][decoded(found["record"])[3]] == {"named": {"source": "hint"}}
    assert found["records"][decoded(found["record"])[4]] == {}, "its node has no label"
    assert (found["kept"], found["texts"], decoded(found["tokens"])) == ([0, 3], [], [])
    assert "without a feature index" in found["notes"]["mlp"]


def test_an_index_beside_the_crosscoder_is_found(tmp_path: Path, index: FeatureIndex, graph: Build) -> None:
    run = tmp_path / "run" / "crosscoder"
    run.mkdir(parents=True)
    shutil.copy(index.path, run)
    for folder in (run, run.parent):
        assert evidence(graph(loaded_from={"crosscoder": str(folder)}))["kept"] == [2, 3]
    changed = graph(loaded_from={"crosscoder": str(run)}, crosscoder_fingerprint="2:def")
    assert evidence(changed)["kept"] == [0, 3]
    assert "of another crosscoder" in evidence(changed)["notes"]["mlp"]
    for nowhere in ("hf:org/repo", str(tmp_path / "none"), "a\0b", "a" * 5000):
        assert evidence(graph(loaded_from={"crosscoder": nowhere}))["kept"] == [0, 3]


def test_indexes_of_both_parts(tmp_path: Path, index: FeatureIndex, graph: Build) -> None:
    facts = {"crosscoder_fingerprint": "2:att", "part": "attention"}
    both = graph(crosscoder_fingerprint="2:abc+2:att")
    with opened(tmp_path / "attention.sqlite", **facts) as attention:
        assert evidence(both, [index, attention])["kept"] == [3, 3]
        with pytest.raises(ValueError, match=r"index: .*attention.sqlite is of another crosscoder than the graph's"):
            evidence(graph(), attention)
        with pytest.raises(
            ValueError, match=r"index: .*attention.sqlite is of the features of attention, like another"
        ):
            evidence(both, [attention, attention])


def test_a_graph_that_does_not_name_its_crosscoder_takes_the_index_it_is_given(
    index: FeatureIndex, graph: Build
) -> None:
    unnamed = {name: fact for name, fact in graph().metadata.items() if name != "crosscoder_fingerprint"}
    assert evidence(CircuitGraph(graph().nodes, graph().edges, unnamed), index)["kept"] == [2, 3]


def test_the_most_influential_features_come_first_when_there_are_too_many(
    index: FeatureIndex, monkeypatch: pytest.MonkeyPatch, graph: Build
) -> None:
    monkeypatch.setattr(room, "MOST_FEATURES", 1)
    found = evidence(graph(), index)
    assert (found["kept"], "density" in found["records"][0]) == ([1, 3], True)
    assert decoded(found["record"])[2:4] == [0, 0], "0/1 carries 5 of 8"
    assert [record for record in found["records"][1:] if "density" in record] == []


@pytest.mark.parametrize(
    ("most", "top", "quantiles"), [(3, 2, [0]), (6, 4, [0, 4]), (12, 8, [0, 1, 3, 4]), (50, 10, [0, 1, 2, 3, 4])]
)
def test_examples_are_shared_between_the_top_and_the_quantiles(most: int, top: int, quantiles: list[int]) -> None:
    def examples(count: int, of: float | None) -> tuple[Example, ...]:
        return tuple(Example(("a",), (1.0,), 0, row, 0, of) for row in range(count))

    record = FeatureRecord(0, 0, 0.1, 1.0, top_examples=examples(10, None), quantile_examples=examples(5, 0.2))
    chosen = room._chosen(record, most)
    assert [example.row for example in chosen] == [*range(top), *quantiles]


def test_hostile_texts_and_numbers_are_data(tmp_path: Path, graph: Build) -> None:
    with opened(tmp_path / "features.sqlite", texts=HOSTILE) as index:
        found = evidence(graph(), index)
    assert HOSTILE[3] in found["texts"]
    assert room._rounded(float("nan")) == room._rounded(float("inf")) == 0.0
    assert TEXTS[3] not in found["texts"]
    assert CITY.text in json.dumps(found["records"])


def test_no_torch_is_needed() -> None:
    script = "import sys, circuits.viewer.evidence; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
