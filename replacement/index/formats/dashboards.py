"""Features as JSON for dashboards: the two layouts share most of their keys.

| layout | files | a feature is |
|---|---|---|
| `neuronpedia` | `{layer}-{name}.jsonl`, one feature a line | what `/api/feature/{model}/{layer}-{name}/{index}` gives |
| `saedashboard` | `{layer}-{name}/batch-{n}.json` | an entry of `features`, as Neuronpedia's converter imports it |

Facts of the layouts, and where they are from:

- Keys of a batch, its features and its activations: `to_dict` in SAEDashboard's `neuronpedia_dashboard.py`. Keys that
  Neuronpedia needs, empty lists included: `convert-saedashboard-to-neuronpedia-export.py` in hijohnnylin/neuronpedia.
- `bin_min` -1 and `bin_contains` -1 mark the top activations, the largest of which is `bin_max`. For the others these are the
  bounds of an interval of activations and the share of them in it: `_parse_sequence_group_title` in SAEDashboard's
  `neuronpedia_converter.py`.
- Histograms are counts, with the centres of equal bins as values: `HistogramData.from_data` in SAEDashboard.
- Names of the API: models `Neuron`, `Activation`, `Explanation` and `ExplanationScore` in Neuronpedia's `prisma/schema.prisma`.
  There `layer` is a text that begins with the layer's number, and `index` a text.

Quantile examples become intervals; two of the same bounds and share are read back as one.

What is kept of a label: its text, claim (`notes`), source (`typeName`) and scores. Scores of other tools are no F1: they are
left out.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from replacement.index.formats.fields import Fields
from replacement.index.records import Example, FeatureRecord, Label, TokenEffects

LAYOUTS = ("neuronpedia", "saedashboard")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz")
ACTIVATION = {  # key of a batch -> key of the API
    "bin_min": "binMin",
    "bin_max": "binMax",
    "bin_contains": "binContains",
    "qualifying_token_index": "qualifyingTokenIndex",
}
"""Names of the keys of an activation in the two layouts."""
SCORES = ("precision", "recall", "f1")


def by_number(path: Path) -> tuple[object, ...]:
    """Sorts `batch-10.json` behind `batch-9.json`."""
    return tuple((int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", str(path)))


def read_file(path: Path) -> Iterator[FeatureRecord]:
    """Features of one file.

    Raises:
        ValueError: names the file, the feature and the fact that is missing or of another kind.
    """
    for place, value in _values(path):
        fields = Fields.of(value, place)
        if "features" in fields.values:
            layer = fields.whole("layer")
            for entry in fields.objects("features"):
                yield _record(entry, layer, entry.whole("feature_index"), {key: key for key in ACTIVATION})
        elif "index" in fields.values:
            layer_text = fields.text("layer").partition("-")[0]
            if not layer_text.isdecimal() or len(layer_text) > 9:
                raise fields.error(
                    "layer", "a layer's number and the name of a set, such as 6-res-jb", fields.get("layer")
                )
            yield _record(fields, int(layer_text), fields.whole("index"), ACTIVATION)
        else:
            raise ValueError(
                f"{place}: expected a feature with an index, or a batch of features, given {list(fields.values)!r:.60}"
            )


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON values of a file, and where they are."""
    try:
        if path.suffix == ".json":
            value = json.loads(path.read_text(encoding="utf-8"))
            values = enumerate(value) if isinstance(value, list) else [(None, value)]
            yield from ((str(path) if place is None else f"{path}[{place}]", value) for place, value in values)
            return
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not feature JSON: {error}") from None


def _record(fields: Fields, layer: int, index: int, names: Mapping[str, str]) -> FeatureRecord:
    """A feature of either layout.

    Args:
        names: the layout's names of the keys of an activation.
    """
    fields = Fields(fields.values, f"{fields.where}, feature {layer}/{index}")
    density = fields.number("frac_nonzero", least=0.0, most=1.0) if fields.has("frac_nonzero") else 0.0
    counts, centres = (
        fields.numbers("freq_hist_data_bar_heights", least=0.0),
        fields.numbers("freq_hist_data_bar_values"),
    )
    if len(counts) != len(centres):
        raise ValueError(
            f"{fields.where}: freq_hist_data_bar_heights has {len(counts)} entries, freq_hist_data_bar_values {len(centres)}"
        )
    top, quantile = _examples(fields, names)
    peaks = [max(example.activations, default=0.0) for example in (*top, *quantile)]
    largest = fields.number("maxActApprox") if fields.has("maxActApprox") else max(peaks, default=0.0)
    labels = [_label(entry) for entry in fields.objects("explanations")] if fields.has("explanations") else []
    return FeatureRecord(
        layer=layer,
        index=index,
        density=density,
        max_activation=largest,
        histogram_edges=_edges(centres),
        histogram_counts=tuple(round(count) for count in counts),
        top_examples=top,
        quantile_examples=quantile,
        effects=TokenEffects(
            promoted=fields.pairs("pos_str", "pos_values"), suppressed=fields.pairs("neg_str", "neg_values")
        ),
        label=labels[0] if labels else None,
        other_labels=tuple(labels[1:]),
    )


def _edges(centres: list[float]) -> tuple[float, ...]:
    """Bounds of equal bins from their centres; a single one begins at 0."""
    if not centres:
        return ()
    width = (centres[-1] - centres[0]) / (len(centres) - 1) if len(centres) > 1 else 2 * centres[0]
    return tuple(centres[0] + width * (place - 0.5) for place in range(len(centres) + 1))


def _examples(fields: Fields, names: Mapping[str, str]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Top examples, and those of intervals, both by activation."""
    top: list[Example] = []
    intervals: dict[tuple[float, ...], list[Example]] = {}
    for entry in fields.objects("activations"):
        pairs = entry.pairs("tokens", "values")
        if not pairs:
            continue
        tokens, values = zip(*pairs, strict=True)
        peak = max(range(len(values)), key=values.__getitem__)
        if entry.has(names["qualifying_token_index"]):
            named = int(entry.number(names["qualifying_token_index"]))  # -1 where there is none
            peak = named if 0 <= named < len(values) and values[named] > 0 else peak
        keys = (names[key] for key in ("bin_min", "bin_max", "bin_contains"))
        bounds = tuple(entry.number(key) if entry.has(key) else -1.0 for key in keys)
        examples = top if min(bounds[0], bounds[2]) < 0 else intervals.setdefault(bounds, [])
        examples.append(Example(tokens, values, peak, row=-1, position=-1))
    quantile: list[Example] = []
    upper = (
        1.0  # shares add up from the strongest interval downwards; where two are as strong, in the order of the file
    )
    for bounds in sorted(intervals, key=lambda bounds: bounds[0], reverse=True):
        upper = max(0.0, round(upper - bounds[2], 6))
        examples = sorted(intervals[bounds], key=_peak, reverse=True)
        quantile += [replace(example, quantile=upper) for example in examples]
    return tuple(sorted(top, key=_peak, reverse=True)), tuple(quantile)


def _peak(example: Example) -> float:
    return example.activations[example.peak]


def _label(fields: Fields) -> Label:
    scores: dict[str, float] = {}
    for score in fields.objects("scores") if fields.has("scores") else ():
        if score.has("explanationScoreTypeName") and (kind := score.text("explanationScoreTypeName")) in SCORES:
            scores[kind] = score.number("value", least=0.0, most=1.0)
    source: Literal["rule", "person", "language model"]
    match fields.values.get("typeName"):
        case "rule" | "person" | "language model" as source:
            pass
        case _:
            source = "language model" if fields.has("explanationModelName") else "person"
    return Label(fields.text("description"), source, fields.text("notes") if fields.has("notes") else "", **scores)
