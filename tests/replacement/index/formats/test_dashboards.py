"""Neuronpedia's feature JSON and SAEDashboard's batches: hand-written files in the published layout, round trips, bad files."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement.index import formats
from replacement.index.records import Example, FeatureRecord, Label, TokenEffects

EMPTY = {key: [] for key in (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
)}  # fmt: skip
SHARED = {
    "neg_str": ["the"],
    "neg_values": [-1.25],
    "pos_str": [" Texas", " Austin"],
    "pos_values": [2.5, 2.0],
    "frac_nonzero": 0.125,
    "freq_hist_data_bar_heights": [6, 2],
    "freq_hist_data_bar_values": [1.0, 3.0],
}
BATCH: dict[str, Any] = {
    "model_id": "tiny",
    "layer": 3,
    "sae_set": "set",
    "sae_id_suffix": None,
    "features": [
        {
            "feature_index": 7,
            **EMPTY,
            **SHARED,
            "activations": [
                {"bin_min": -1, "bin_max": 4.0, "bin_contains": -1, "tokens": ["in", " Dallas"], "values": [0.0, 4.0],
                 "qualifying_token_index": 1},
                {"bin_min": 2.0, "bin_max": 4.0, "bin_contains": 0.25, "tokens": [" Waco", ","], "values": [3.0, 0.5],
                 "qualifying_token_index": 0},
                {"bin_min": 0.0, "bin_max": 2.0, "bin_contains": 0.75, "tokens": ["a", "b", "c"], "values": [1.5, 0.75, 0],
                 "qualifying_token_index": 1},
            ],
        }
    ],
}  # fmt: skip
NAMES = {"modelId": "tiny", "layer": "3-set", "index": "7"}
FEATURE: dict[str, Any] = {
    **NAMES,
    "sourceSetName": "set",
    "maxActApprox": 4.0,
    **EMPTY,
    **SHARED,
    "activations": [
        {**NAMES, "tokens": ["in", " Dallas"], "values": [0.0, 4.0], "maxValue": 4.0, "maxValueTokenIndex": 1, "minValue": 0.0,
         "binMin": -1, "binMax": 4.0, "binContains": -1, "qualifyingTokenIndex": 1, "dataIndex": None},
        {**NAMES, "tokens": [" Waco", ","], "values": [3.0, 0.5], "maxValue": 3.0, "maxValueTokenIndex": 0, "minValue": 0.5,
         "binMin": 2.0, "binMax": 4.0, "binContains": 0.25, "qualifyingTokenIndex": 0, "dataIndex": None},
        {**NAMES, "tokens": ["a", "b", "c"], "values": [1.5, 0.75, 0], "maxValue": 1.5, "maxValueTokenIndex": 0, "minValue": 0,
         "binMin": 0.0, "binMax": 2.0, "binContains": 0.75, "qualifyingTokenIndex": 1, "dataIndex": None},
    ],
    "explanations": [
        {"description": "cities in Texas", "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini",
         "scores": [{"value": 0.8, "explanationScoreTypeName": "eleuther_recall", "explanationScoreModelName": "gpt-4o-mini"}]},
        {"description": "Texas", "typeName": None, "explanationModelName": None, "notes": None},
    ],
}  # fmt: skip
RECORD = FeatureRecord(
    layer=3,
    index=7,
    density=0.125,
    max_activation=4.0,
    histogram_edges=(0.0, 2.0, 4.0),
    histogram_counts=(6, 2),
    top_examples=(Example(("in", " Dallas"), (0.0, 4.0), 1, -1, -1),),
    quantile_examples=(
        Example((" Waco", ","), (3.0, 0.5), 0, -1, -1, quantile=0.75),
        Example(("a", "b", "c"), (1.5, 0.75, 0.0), 1, -1, -1, quantile=0.0),
    ),
    effects=TokenEffects(promoted=((" Texas", 2.5), (" Austin", 2.0)), suppressed=(("the", -1.25),)),
)
LABELLED = replace(RECORD, label=Label("cities in Texas", "language model"), other_labels=(Label("Texas", "person"),))


def put(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def test_a_published_batch_is_read(tmp_path: Path) -> None:
    put(tmp_path / "out" / "batch-0.json", BATCH)
    assert list(formats.read(tmp_path / "out")) == [RECORD]


@pytest.mark.parametrize("kind", ["object", "list", "lines", "gzip"])
def test_feature_json_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / {"lines": "f.jsonl", "gzip": "f.jsonl.gz"}.get(kind, "f.json")
    text = json.dumps([FEATURE] if kind == "list" else FEATURE)
    path.write_bytes(gzip.compress(text.encode()) if kind == "gzip" else text.encode())
    assert list(formats.read(path)) == [LABELLED]


def test_features_without_activations_are_read(tmp_path: Path) -> None:
    """Neuronpedia's exports hold activations in other files, and null where nothing was counted."""
    bare = {**FEATURE, "activations": [], "explanations": [], "maxActApprox": None, "frac_nonzero": None}
    (record,) = formats.read(put(tmp_path / "f.json", bare))
    assert (record.density, record.max_activation, record.top_examples, record.label) == (0.0, 0.0, (), None)


def test_batches_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9):
        feature = {**BATCH["features"][0], "feature_index": number}
        put(tmp_path / f"batch-{number}.json", {**BATCH, "features": [feature]})
    assert [record.index for record in formats.read(tmp_path)] == [9, 10]


@pytest.mark.parametrize("layout", formats.LAYOUTS)
def test_what_is_written_has_the_published_keys(tmp_path: Path, layout: str) -> None:
    formats.write([LABELLED], tmp_path / "out", layout=layout, model_id="tiny", name="set")
    if layout == "saedashboard":
        written = json.loads((tmp_path / "out" / "3-set" / "batch-0.json").read_text())
        assert written.keys() == BATCH.keys()
        ours, theirs = written["features"][0], BATCH["features"][0]
    else:
        ours, theirs = json.loads((tmp_path / "out" / "3-set.jsonl").read_text()), FEATURE
        assert {key: ours[key] for key in NAMES} == NAMES
        assert ours["explanations"][0]["description"] == "cities in Texas"
    assert ours.keys() == theirs.keys()
    for key in (*EMPTY, *SHARED):
        assert ours[key] == theirs[key], key
    for activation, expected in zip(ours["activations"], theirs["activations"], strict=True):
        assert activation.keys() >= expected.keys() - {"dataIndex"}
        assert {key: activation[key] for key in ("tokens", "values")} == {
            key: expected[key] for key in ("tokens", "values")
        }


NUMBERS = st.floats(min_value=0, max_value=100, width=32)
TOKENS = st.text(max_size=4)


def random_record(draw: Callable[..., Any]) -> FeatureRecord:
    def example(quantile: float | None, peak_value: float) -> Example:
        n = draw(st.integers(1, 4))
        peak = draw(st.integers(0, n - 1))
        values = [min(draw(NUMBERS), peak_value) for _ in range(n)]
        values[peak] = peak_value
        return Example(tuple(draw(TOKENS) for _ in range(n)), tuple(values), peak, -1, -1, quantile)

    n_bins, width = draw(st.integers(0, 4)), draw(st.sampled_from([0.5, 2.0]))
    scores = draw(st.none() | st.floats(0, 1))
    label = Label(
        draw(TOKENS), draw(st.sampled_from(["rule", "person", "language model"])), draw(TOKENS), scores, None, scores
    )
    quantiles = [0.8, 0.5, 0.0][: draw(st.integers(0, 3))]
    step = draw(st.sampled_from([0.0, 1.0]))
    return FeatureRecord(
        layer=draw(st.integers(0, 40)),
        index=draw(st.integers(0, 10**6)),
        density=draw(st.floats(0, 1)),
        max_activation=draw(NUMBERS),
        histogram_edges=tuple(width * n for n in range(n_bins + 1)) if n_bins else (),
        histogram_counts=tuple(draw(st.integers(0, 9)) for _ in range(n_bins)),
        top_examples=tuple(example(None, 100.0 - n) for n in range(draw(st.integers(0, 2)))),
        quantile_examples=tuple(example(q, 10.0 - step * place) for place, q in enumerate(quantiles)),
        effects=TokenEffects(promoted=tuple((draw(TOKENS), draw(NUMBERS)) for _ in range(draw(st.integers(0, 2))))),
        label=label,
        other_labels=(replace(label, text="other"),),
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_round_trips(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = random_record(data.draw)  # not a strategy: type checks draw random numbers of their own
    for layout in formats.LAYOUTS:
        folder = tmp_path_factory.mktemp("out")
        formats.write([record], folder, layout=layout, model_id="tiny", name="set")
        (back,) = formats.read(folder)
        expected = (
            record
            if layout == "neuronpedia"
            else replace(record, label=None, other_labels=(), max_activation=back.max_activation)
        )
        assert back == expected


def test_many_features_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replacement.index.formats.dashboards_writing.FEATURES_PER_BATCH", 2)
    many = [replace(RECORD, layer=layer, index=index) for layer in (0, 2) for index in range(3)]
    formats.write(iter(many), tmp_path / "out", layout="saedashboard", model_id="tiny", name="set")
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.json"))
    assert files == ["0-set/batch-0.json", "0-set/batch-1.json", "2-set/batch-0.json", "2-set/batch-1.json"]
    assert list(formats.read(tmp_path / "out")) == many


def changed(value: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The batch with facts of its feature changed, or left out for `...`."""
    feature = {key: fact for key, fact in {**value["features"][0], **changes}.items() if fact is not ...}
    return {**value, "features": [feature]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**BATCH, "layer": -1}, r"batch-0.json: expected layer to be a whole number from 0, given -1"),
        ({**BATCH, "features": {}}, "expected features to be a list"),
        ({**BATCH, "features": [3]}, r"features\[0\]: expected a JSON object, given 3"),
        (changed(BATCH, feature_index=...), r"features\[0\]: feature_index is missing"),
        (changed(BATCH, feature_index=True), "expected feature_index to be a whole number"),
        (changed(BATCH, pos_str=...), "feature 3/7: pos_str is missing"),
        (changed(BATCH, pos_str=["a"]), "feature 3/7: pos_str has 1 entries, pos_values 2"),
        (changed(BATCH, pos_values=[1.0, float("nan")]), "expected pos_values to be a finite number, given nan"),
        (changed(BATCH, neg_str=[None]), "expected neg_str to be a list of texts, given None"),
        (changed(BATCH, frac_nonzero=1.5), "expected frac_nonzero to be a finite number from 0 to 1, given 1.5"),
        (changed(BATCH, freq_hist_data_bar_heights=[6, -2]), "bar_heights to be a finite number of at least 0, given -2"),
        (changed(BATCH, freq_hist_data_bar_heights=[6]), "freq_hist_data_bar_heights has 1 entries, .*_values 2"),
        (changed(BATCH, activations=[{"tokens": ["a"], "values": []}]), r"activations\[0\]: tokens has 1 entries, values 0"),
        (changed(BATCH, activations="x"), "expected activations to be a list, given 'x'"),
        ({**FEATURE, "index": "x"}, "expected index to be a whole number from 0, given 'x'"),
        ({**FEATURE, "layer": "set"}, "expected layer to be a layer's number and the name of a set, such as 6-res-jb"),
        ({**FEATURE, "explanations": [{}]}, r"explanations\[0\]: description is missing"),
        ({"a": 1}, "expected a feature with an index, or a batch of features, given"),
        (3, "expected a JSON object, given 3"),
    ],
)  # fmt: skip
def test_malformed_facts_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(formats.read(put(tmp_path / "batch-0.json", content)))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    truncated = json.dumps(BATCH)[:-40]
    for name, content in {
        "batch-0.json": truncated.encode(),
        "f.jsonl": truncated.encode(),
        "g.jsonl.gz": gzip.compress(b"{}")[:-9],
        "p.json": pickle.dumps(BATCH),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not feature JSON"):
            list(formats.read(path))


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: expected feature JSON"):
        formats.read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no feature JSON"):
        formats.read(tmp_path)


def test_bad_arguments_of_writing(tmp_path: Path) -> None:
    good: dict[str, Any] = {"layout": "neuronpedia", "model_id": "tiny", "name": "set"}
    for change, message in (
        ({"layout": "html"}, "layout: expected neuronpedia or saedashboard, got 'html'"),
        ({"model_id": "a/b"}, "model_id: expected letters"),
        ({"name": ""}, "name: expected letters"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.write([RECORD], tmp_path / "out", **(good | change))
    put(tmp_path / "out" / "mine.txt", 1)
    with pytest.raises(ValueError, match="would be lost"):
        formats.write([RECORD], tmp_path / "out", **good)
