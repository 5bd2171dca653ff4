"""Features written as JSON for dashboards; `dashboards.py` reads them, and says what the layouts are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from replacement.files import atomic_folder
from replacement.index.formats.dashboards import ACTIVATION, LAYOUTS, SCORES
from replacement.index.records import FeatureRecord, Label

FEATURES_PER_BATCH = 256
_UNUSED = (
    *(f"neuron_alignment_{column}" for column in ("indices", "values", "l1")),
    *(f"correlated_{kind}_{column}" for kind in ("neurons", "features") for column in ("indices", "l1", "pearson")),
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def write(
    records: Iterable[FeatureRecord],
    folder: str | Path,
    *,
    layout: str,
    model_id: str,
    name: str,
) -> None:
    """Write features, layer by layer; a few hundred are in memory at a time. The folder appears whole or not at all.

    Args:
        records: features in the order of their layers, such as a `FeatureIndex`.
        folder: a new or empty one.
        layout: one of `LAYOUTS`.
        model_id: Neuronpedia's name of the language model.
        name: of the set of features (`sae_set`), without the layer.

    Raises:
        ValueError: an unknown layout, a name with other characters than letters, digits, dots, dashes and underscores, or a
            folder that cannot be written.
    """
    check_layout(layout)
    for what, text in (("model_id", model_id), ("name", name)):
        if not isinstance(text, str) or _NAME.fullmatch(text) is None:
            raise ValueError(f"{what}: expected letters, digits, dots, dashes and underscores, got {text!r:.50}")
    with atomic_folder(folder) as scratch:
        for layer, of_layer in itertools.groupby(records, key=lambda record: record.layer):
            source = f"{layer}-{name}"
            if layout == "neuronpedia":
                with (scratch / f"{source}.jsonl").open("x", encoding="utf-8") as file:
                    file.writelines(json.dumps(_api_feature(record, model_id, source)) + "\n" for record in of_layer)
                continue
            (scratch / source).mkdir()
            for number in itertools.count():
                if not (
                    features := [_batch_feature(record) for record in itertools.islice(of_layer, FEATURES_PER_BATCH)]
                ):
                    break
                names = {"model_id": model_id, "layer": layer, "sae_set": name, "sae_id_suffix": None}
                text = json.dumps({**names, "features": features})
                (scratch / source / f"batch-{number}.json").write_text(text, encoding="utf-8")


def check_layout(layout: str) -> None:
    """Refuse a name that is none of `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r:.50}")


def _shared(record: FeatureRecord) -> dict[str, Any]:
    """What both layouts say of a feature in the same words."""
    edges, effects = record.histogram_edges, record.effects
    return {
        **{key: [] for key in _UNUSED},
        "neg_str": [token for token, _ in effects.suppressed],
        "neg_values": [weight for _, weight in effects.suppressed],
        "pos_str": [token for token, _ in effects.promoted],
        "pos_values": [weight for _, weight in effects.promoted],
        "frac_nonzero": record.density,
        "freq_hist_data_bar_heights": list(record.histogram_counts),
        "freq_hist_data_bar_values": [(low + high) / 2 for low, high in itertools.pairwise(edges)],
    }


def _batch_feature(record: FeatureRecord) -> dict[str, Any]:
    return {"feature_index": record.index, **_shared(record), "activations": _activations(record)}


def _api_feature(record: FeatureRecord, model_id: str, source: str) -> dict[str, Any]:
    names = {"modelId": model_id, "layer": source, "index": str(record.index)}
    activations = []
    for activation in _activations(record):
        values = activation["values"]
        peak = max(range(len(values)), key=values.__getitem__)
        extremes = {"maxValue": values[peak], "maxValueTokenIndex": peak, "minValue": min(values)}
        activations.append(
            {**names, **{ACTIVATION.get(key, key): value for key, value in activation.items()}, **extremes}
        )
    labels = [label for label in (record.label, *record.other_labels) if label is not None]
    return {
        **names,
        "sourceSetName": source.partition("-")[2],
        "maxActApprox": record.max_activation,
        **_shared(record),
        "activations": activations,
        "explanations": [{**names, **_explanation(label)} for label in labels],
    }


def _activations(record: FeatureRecord) -> list[dict[str, Any]]:
    bins = [(example, (-1.0, record.max_activation, -1.0)) for example in record.top_examples]
    upper, above = 1.0, itertools.groupby(record.quantile_examples, key=lambda example: example.quantile)
    for quantile, group in above:
        examples = list(group)
        peaks = [example.activations[example.peak] for example in examples]
        bins += [(example, (min(peaks), max(peaks), upper - (quantile or 0.0))) for example in examples]
        upper = quantile or 0.0
    return [
        {
            **dict(zip(ACTIVATION, (*bounds, example.peak), strict=True)),
            "tokens": list(example.tokens),
            "values": list(example.activations),
        }
        for example, bounds in bins
    ]


def _explanation(label: Label) -> dict[str, Any]:
    scores = {kind: value for kind in SCORES if (value := getattr(label, kind)) is not None}
    return {
        "description": label.text,
        "notes": label.claim,
        "typeName": label.source,
        "explanationModelName": None,
        "scores": [
            {"value": value, "explanationScoreTypeName": kind, "explanationScoreModelName": "crosstrace"}
            for kind, value in scores.items()
        ],
    }
