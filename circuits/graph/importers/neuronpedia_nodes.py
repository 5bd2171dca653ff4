"""The nodes of a Neuronpedia graph JSON file: one row each, then the columns of the node table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from circuits.graph.importers.assemble import shares
from circuits.graph.neuronpedia_schema import (
    ATTENTION_ERROR,
    ATTENTION_FEATURE,
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    cantor_pair,
    cantor_unpair,
)  # fmt: skip
from circuits.graph.nodes import COLUMNS, NodeKind, Part
from replacement.token_texts import visible

_TYPES = {
    EMBEDDING: (NodeKind.TOKEN, Part.MLP), ERROR: (NodeKind.ERROR, Part.MLP), FEATURE: (NodeKind.FEATURE, Part.MLP),
    ATTENTION_ERROR: (NodeKind.ERROR, Part.ATTENTION), ATTENTION_FEATURE: (NodeKind.FEATURE, Part.ATTENTION),
    LOGIT: (NodeKind.LOGIT, Part.MLP),
}  # fmt: skip
_FEATURE_ID = re.compile(r"A?(\d{1,9})_(\d{1,18})_\d{1,9}")
_TOKEN_ID = re.compile(r"E_(\d{1,18})_\d{1,9}")
_OUTPUT = re.compile(r'(?:Output|Logit) "(.*)" \(p=(\d*\.?\d+)\)', re.DOTALL)
LARGEST = 3.4e38
"""Numbers must be smaller, so that they fit in 32 bits."""


def row_of(node: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What the columns hold of one node; what a kind of node does not have is left out.

    Raises:
        ValueError: a type that does not exist, or fields that contradict each other or are no numbers.
    """
    name, kind_word, clerp = node["node_id"], node["feature_type"], str(node["clerp"] or "")
    if kind_word not in _TYPES:
        raise ValueError(
            f"expected feature_type of node {name} to be one of {', '.join(_TYPES)}, given {kind_word!r:.60}"
        )
    kind, part = _TYPES[kind_word]
    row: dict[str, Any] = {"kind": kind, "part": part, "position": _whole(node, "ctx_idx"), "label": clerp}
    row |= {column: number_of(node, column) for column in ("output_weight", "inflow", "activation")}
    row["expanded"] = "inflow" in node and kind in (NodeKind.FEATURE, NodeKind.LOGIT)
    if row["position"] >= len(tokens):
        raise ValueError(f"expected ctx_idx of node {name} below the {len(tokens)} tokens, given {row['position']}")
    if kind is NodeKind.TOKEN:
        match = _TOKEN_ID.fullmatch(name)
        return row | {"index": int(match[1]) if match else -1, "label": visible(tokens[row["position"]])}
    row["layer"] = _whole(node, "layer")
    if kind is NodeKind.LOGIT:
        match = _OUTPUT.fullmatch(clerp)
        probability = number_of(node, "token_prob") if "token_prob" in node else float(match[2]) if match else 0.0
        return row | {
            "index": max(_whole(node, "feature", least=-(2**62)), -1),
            "probability": probability,
            "label": match[1] if match else clerp,
        }
    if name.startswith("A"):  # ours: the type does not say it
        row |= {"part": Part.ATTENTION, "label": clerp.removeprefix("attention: ")}
    if isinstance(node.get("label"), str):  # ours: the clerp says how good the label is too
        row["label"] = node["label"]
    if kind is NodeKind.ERROR:
        return row | {"label": ""}
    return row | {"index": _feature_index(node, row["layer"]), "is_target": node.get("is_target_logit") is True}


def columns_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of the node table, with the number of layers as the layer of logits, and shares of the output.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("expected nodes, given none")
    columns = {
        name: np.array([row.get(name, -1 if name in ("layer", "index") else 0) for row in rows], dtype=dtype)
        for name, dtype in COLUMNS.items()
    }
    logits = columns["kind"] == NodeKind.LOGIT
    below = max(int(columns["layer"][~logits].max(initial=-1)) + 1, 1)
    columns["layer"][logits] = max(below, int(columns["layer"][logits].max(initial=0)) - 1)
    if not columns["output_weight"].any():
        targets = np.array([bool(row.get("is_target")) for row in rows])
        alone = (logits | targets).sum() == 1
        columns["output_weight"] = shares((logits | targets).astype(np.float64) if alone else columns["probability"])
    return columns


def _feature_index(node: Mapping[str, Any], layer: int) -> int:
    name, number = node["node_id"], _whole(node, "feature")
    paired_layer, index = cantor_unpair(number)
    if match := _FEATURE_ID.fullmatch(name):
        id_layer, index = int(match[1]), int(match[2])
        if id_layer == layer and number in (index, cantor_pair(layer, index)):
            return index
    elif paired_layer == layer:
        return index
    raise ValueError(
        f"node {name}: expected its id, its layer {layer} and its feature {number} to say the same; the last is an index, or a "
        "Cantor pair of layer and index"
    )


def _whole(node: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    value = node[key]
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        value = int(value)
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not least <= value < (2**62 if key == "feature" else 2**31)
    ):
        raise ValueError(f"expected {key} of node {node['node_id']} to be a whole number, given {value!r:.40}")
    return value


def number_of(item: Mapping[str, Any], key: str) -> float:
    """A number of a node or link; 0 where it is missing or null.

    Raises:
        ValueError: something else than a finite number.
    """
    value = item.get(key)
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGEST:
        raise ValueError(
            f"expected {key} of {item.get('node_id') or 'a link'} to be a finite number, given {value!r:.40}"
        )
    return float(value)
