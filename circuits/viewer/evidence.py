"""What a feature index says about the features of a graph, for the page.

The payload's `features` holds every feature once, however many nodes it has, and every text once:

| field | holds |
|---|---|
| `record` | column: for each node the number of its record, -1 for none |
| `records` | see `_record`; a record without an index has `named` alone |
| `texts` | texts that records give by number |
| `tokens` | column: the tokens of all examples of all records, one example after the other |
| `kept` | features with a record of the index, features in the graph |
| `notes` | for each part without an index, `mlp` or `attention`, why its features have no evidence, for people |
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.edges import GraphData
from circuits.graph.feature_labels import label_facts
from circuits.graph.influence import node_influence
from circuits.graph.nodes import NodeKind, Part
from circuits.viewer.columns import column
from replacement.index.records import Example, FeatureRecord, Label
from replacement.index.showing import DEMO, DEMO_FOLDER
from replacement.index.store import ATTENTION_FILE_NAME, FILE_NAME, FeatureIndex

MOST_FEATURES = 2000
"""Features with a record, the most influential ones of a graph: a page must stay small enough to open."""
MOST_EXAMPLES = 4000
"""Examples in a page; features share them equally, and have at least `LEAST_EXAMPLES`."""
LEAST_EXAMPLES = 3
OTHER_LABELS = 3

Indexes = FeatureIndex | Sequence[FeatureIndex | Path] | None
"""An index of the MLPs' crosscoder or of attention's, or both, or their files; None for those beside the crosscoders."""


def evidence(graph: GraphData, index: Indexes = None) -> dict[str, Any]:
    """The payload's `features`.

    Args:
        index: feature indexes of the graph's crosscoders, by default those beside the crosscoders that the graph was traced
            with, where these are folders of this machine; `()` for what the graph itself knows.

    Raises:
        ValueError: an index of another crosscoder, or two of one.
    """
    nodes, influence = graph.nodes, node_influence(graph)
    features = np.flatnonzero(nodes.mask(NodeKind.FEATURE))
    columns = (column[features].tolist() for column in (nodes.part, nodes.layer, nodes.index))
    keys = dict(zip(features.tolist(), zip(*columns, strict=True), strict=True))
    order = features[np.argsort(-influence[features], kind="stable")].tolist()
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys[node] for node in order))}
    texts: dict[str, int] = {}
    tokens: list[int] = []
    with open_indexes(graph.metadata, index) as (indexes, notes):
        known = [key for key in numbers if Part(key[0]).name.lower() in indexes][:MOST_FEATURES]
        most = max(LEAST_EXAMPLES, MOST_EXAMPLES // max(len(known), 1))
        records: dict[Any, dict[str, Any]] = {key: {} for key in numbers}
        for part, layer, number in known:
            record = indexes[Part(part).name.lower()].feature(layer, number)
            records[part, layer, number] = _record(record, most, texts, tokens)
    for node in order:
        if facts := label_facts(graph, node):
            records[keys[node]].setdefault("named", facts)
    return {
        "record": column(np.array([numbers[keys[node]] if node in keys else -1 for node in range(len(nodes))])),
        "records": list(records.values()),
        "texts": list(texts),
        "tokens": column(np.array(tokens, dtype=np.int64)),
        "kept": [len(known), len(numbers)],
        "notes": notes,
    }


@contextmanager
def open_indexes(
    metadata: Mapping[str, Any], given: Indexes = None
) -> Iterator[tuple[dict[str, FeatureIndex], dict[str, str]]]:
    """The feature index of each part, `mlp` or `attention`, that has one, and for the others why not, for people.

    Raises:
        ValueError: a given index is of another crosscoder than the graph's, or there are two of one part.
    """
    fingerprints, indexes = metadata.get("crosscoder_fingerprint"), dict[str, FeatureIndex]()
    notes = {
        part.name.lower(): "The page was made without a feature index of this feature's crosscoder." for part in Part
    }
    with ExitStack() as opened:
        for index in _beside(metadata) if given is None else [given] if isinstance(given, FeatureIndex) else given:
            index = opened.enter_context(FeatureIndex.open(index)) if isinstance(index, Path) else index
            part, fingerprint = index.facts.get("part", "mlp"), index.facts["crosscoder_fingerprint"]
            fits = fingerprints is None or fingerprint in fingerprints.split("+")  # other tools' graphs do not say
            if fits and part not in indexes:
                indexes[part] = index
            elif given is None:
                notes[part] = "The feature index beside the crosscoder is of another crosscoder than the graph's."
            else:
                which = f"the features of {part}, like another one" if fits else "another crosscoder than the graph's"
                raise ValueError(f"index: {index.path} is of {which}")
        yield indexes, {part: note for part, note in notes.items() if part not in indexes}


def _beside(metadata: Mapping[str, Any]) -> Iterator[Path]:
    """Files of the indexes that lie beside the crosscoders that a graph was traced with."""
    loaded = metadata.get("loaded_from", {})
    for name in ("crosscoder", "attention_crosscoder"):
        if name in loaded:
            folder = DEMO_FOLDER / name if loaded[name] == DEMO else Path(loaded[name])
            for file in (FILE_NAME, ATTENTION_FILE_NAME):
                places = (place / file for place in (folder, folder / "crosscoder"))  # its own, or its training run's
                yield from [path for path in places if os.path.isfile(path)][:1]


def _record(record: FeatureRecord, most: int, texts: dict[str, int], tokens: list[int]) -> dict[str, Any]:
    """A feature as the page reads it; texts become their numbers, and the tokens of its examples are added to `tokens`.

    `examples` are `[quantile or null, peak, n_tokens, [place, activation, place, activation, ...]]`, of tokens that are active.
    """

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    def example(entry: Example) -> list[Any]:
        tokens.extend(map(number, entry.tokens))
        active = ((place, _rounded(value)) for place, value in enumerate(entry.activations) if value)
        return [entry.quantile, entry.peak, len(entry.tokens), [part for pair in active for part in pair]]

    effects, edges = record.effects, record.histogram_edges
    lists = {name: getattr(effects, name) for name in ("promoted", "suppressed", "read", "read_through_heads")}
    labels = [_label(label) for label in (record.label, *record.other_labels) if label is not None]
    return {
        "labels": labels[: 1 + OTHER_LABELS],
        "density": _rounded(record.density),
        "max_activation": _rounded(record.max_activation),
        "bin_width": edges[1] if len(edges) > 1 else 0,
        "histogram": list(record.histogram_counts),
        "examples": [example(entry) for entry in _chosen(record, most)],
        "n_examples": len(record.top_examples) + len(record.quantile_examples),
        **{name: [[number(text), _rounded(weight)] for text, weight in pairs] for name, pairs in lists.items()},
        "head": effects.head,
    }


def _chosen(record: FeatureRecord, most: int) -> Sequence[Example]:
    """At most `most` examples: two of three from the top, and others spread evenly over the quantiles."""
    top, quantile = record.top_examples, record.quantile_examples
    n_quantile = min(len(quantile), max(most // 3, most - len(top)))
    places = np.linspace(0, len(quantile) - 1, n_quantile).round().astype(int)
    return [*top[: most - n_quantile], *(quantile[place] for place in places)]


def _label(label: Label) -> dict[str, Any]:
    return {name: value for name, value in asdict(label).items() if value not in (None, "")}


def _rounded(value: float) -> float:
    """Four significant digits; numbers that JSON lacks become 0."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
