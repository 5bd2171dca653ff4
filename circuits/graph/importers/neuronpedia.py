"""Graph JSON of Neuronpedia and circuit-tracer, schema version 1: what `circuits.export.neuronpedia` writes, and others.

Kind, layer and position of a node are those of its fields; its id only names it in links, so both forms of error ids are read
(`{layer}_-1_{position}`, and circuit-tracer's `0_{layer}_{position}`). A feature's index is in its id,
`{layer}_{index}_{position}`, or in `feature`, as it is or Cantor-paired with the layer; where both say it they must agree. An
id that begins with `A`, or the type `lorsa`, makes a node one of attention.

A file holds links, not where a row's inflow went. Without the `inflow` that our files have, the inflow of a node is
the sum of its links' magnitudes, so mass that was pruned away before the file was written is not counted as lost.
Influence is computed from the links: the file's `influence` is a rank in the graph before pruning, and is not kept. Output
weights are the file's `output_weight`, or the probabilities of the logits (`token_prob`, else the number in `clerp`) divided by
their sum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges
from circuits.graph.importers.assemble import facts, shares, table_order
from circuits.graph.neuronpedia_schema import (
    ATTENTION_ERROR,
    ATTENTION_FEATURE,
    EMBEDDING,
    ERROR,
    FEATURE,
    LOGIT,
    QK_RESULTS,
    REQUIRED,
    VERSION,
    cantor_pair,
    cantor_unpair,
)  # fmt: skip
from circuits.graph.nodes import COLUMNS, NodeKind, NodeTable, Part
from circuits.graph.storage import Parts
from circuits.graph.text import shorten
from replacement.files import read_text
from replacement.token_texts import visible

FORMAT = "Neuronpedia graph JSON"
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
_READ = {
    *REQUIRED["node"], "token_prob", "is_target_logit", "influence", "activation", "output_weight", "inflow",
    "run_idx", "reverse_ctx_idx", "token", "label", QK_RESULTS,
}  # fmt: skip
"""Keys of nodes that are read, or say nothing that is not said elsewhere; others are listed in the metadata as not read."""
_READ_OF_LINKS = {*REQUIRED["link"], "direct", "heads"}


def load(path: Path) -> Parts:
    """Nodes, edges, metadata and (where links have them) heads of a graph JSON file.

    Raises:
        ValueError: the file is damaged, lacks keys of the schema, is of a newer version, or contradicts itself.
    """
    try:
        data = json.loads(read_text(path, expected=FORMAT))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"damaged or cut off ({error})") from None
    metadata, given, links = _required_keys(data)
    tokens = metadata["prompt_tokens"]
    rows = [_row(node, tokens) for node in given]
    columns = _columns(rows)
    order = table_order(columns)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    number = {node["node_id"]: int(numbers[row]) for row, node in enumerate(given)}
    if len(number) < len(given):
        raise ValueError(_twice([node["node_id"] for node in given]))
    edges, heads = _edges(links, number)
    columns = {name: column[order] for name, column in columns.items()}
    nodes = _table(columns, [rows[row]["label"] for row in order.tolist()], edges)
    return nodes, edges, _facts(data, nodes, number), heads


def _required_keys(data: object) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Metadata, nodes and links, with all the keys that the schema requires."""
    if isinstance(data, dict) and "multigraph" in data:
        raise ValueError(
            "given node-link JSON, which is only written: expected the .neuronpedia.json or .safetensors beside it"
        )
    _require("the file", data, REQUIRED["graph"])
    assert isinstance(data, dict)
    metadata = data["metadata"]
    _require("metadata", metadata, REQUIRED["metadata"])
    version = metadata.get("schema_version")
    if version not in (None, VERSION):
        raise ValueError(
            f"expected schema version {VERSION}, given {version!r:.40}; a newer version of crosstrace is needed"
        )
    if not all(isinstance(metadata[key], str) for key in ("slug", "scan", "prompt")):
        raise ValueError("expected slug, scan and prompt in metadata to be texts")
    tokens = metadata["prompt_tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("expected metadata.prompt_tokens to be a list of texts")
    for key, kind in (("nodes", "node"), ("links", "link")):
        if not isinstance(data[key], list):
            raise ValueError(f"expected {key} to be a list, given {type(data[key]).__name__}")
        for place, item in enumerate(data[key]):
            _require(f"{kind} {place}", item, REQUIRED[kind])
    for place, node in enumerate(data["nodes"]):
        if not all(isinstance(node[key], str) for key in ("node_id", "feature_type")):
            raise ValueError(f"expected node_id and feature_type of node {place} to be texts")
    return metadata, data["nodes"], data["links"]


def _require(what: str, value: object, keys: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"expected {what} to be an object, given {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        given, lacking = shorten(", ".join(map(str, value)), 80) or "none", ", ".join(missing)
        raise ValueError(f"expected {what} to have {', '.join(keys)}, but there is no {lacking} among {given}")


def _row(node: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The columns of one node."""
    name, kind_word, clerp = node["node_id"], node["feature_type"], str(node["clerp"] or "")
    if kind_word not in _TYPES:
        raise ValueError(
            f"expected feature_type of node {name} to be one of {', '.join(_TYPES)}, given {kind_word!r:.60}"
        )
    kind, part = _TYPES[kind_word]
    row: dict[str, Any] = {"kind": kind, "part": part, "position": _whole(node, "ctx_idx"), "label": clerp}
    row |= {column: _number(node, column) for column in ("output_weight", "inflow", "activation")}
    row["expanded"] = "inflow" in node and kind in (NodeKind.FEATURE, NodeKind.LOGIT)
    if row["position"] >= len(tokens):
        raise ValueError(f"expected ctx_idx of node {name} below the {len(tokens)} tokens, given {row['position']}")
    if kind is NodeKind.TOKEN:
        match = _TOKEN_ID.fullmatch(name)
        return row | {"index": int(match[1]) if match else -1, "label": visible(tokens[row["position"]])}
    row["layer"] = _whole(node, "layer")
    if kind is NodeKind.LOGIT:
        match = _OUTPUT.fullmatch(clerp)
        probability = _number(node, "token_prob") if "token_prob" in node else float(match[2]) if match else 0.0
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


def _number(item: Mapping[str, Any], key: str) -> float:
    """A number that may be missing or null, then 0."""
    value = item.get(key)
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGEST:
        raise ValueError(
            f"expected {key} of {item.get('node_id') or 'a link'} to be a finite number, given {value!r:.40}"
        )
    return float(value)


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of the node table, with the number of layers as the layer of logits, and shares of the output."""
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


def _table(columns: Mapping[str, np.ndarray], labels: list[str], edges: Edges) -> NodeTable:
    has_rows = np.isin(columns["kind"], [NodeKind.FEATURE, NodeKind.LOGIT]) & (np.diff(edges.indptr) > 0)
    expanded = columns["expanded"] | has_rows
    inflow = np.where(columns["expanded"], columns["inflow"], edges.magnitudes)
    return NodeTable.build(**{**columns, "expanded": expanded, "inflow": inflow}, label=labels)


def _twice(ids: list[str]) -> str:
    name = next(name for place, name in enumerate(ids) if name in ids[:place])
    return (
        f"expected each node id once, given {name} twice (circuit-tracer's id of an error can be that of a feature of layer 0; "
        "its .pt file tells them apart)"
    )


def _edges(links: list[dict[str, Any]], number: Mapping[str, int]) -> tuple[Edges, EdgeHeads | None]:
    ends = {}
    for end in ("source", "target"):
        for place, link in enumerate(links):
            if not isinstance(link[end], str) or link[end] not in number:
                raise ValueError(
                    f"expected links between the nodes, but the {end} of link {place} is {link[end]!r:.60}"
                )
        ends[end] = np.array([number[link[end]] for link in links], dtype=np.int64)
    weight = np.array([_number(link, "weight") for link in links])
    edges = Edges.from_coo(ends["target"], ends["source"], weight, n_nodes=len(number))
    if not any("heads" in link for link in links):
        return edges, None
    order = np.lexsort((ends["source"], ends["target"])).tolist()
    return edges, _heads([links[place] for place in order], edges.weight)


def _heads(links: list[dict[str, Any]], weight: np.ndarray) -> EdgeHeads:
    """Heads of the links, in the order of the edges; the rest of each is what they leave of its weight."""
    listed = [link.get("heads", []) for link in links]
    heads = [head for of_link in listed for head in of_link]
    if not all(isinstance(head, list) and len(head) == 3 for head in heads):
        raise ValueError("expected heads of links to be lists of [layer, head, weight]")
    layer, head, contribution = np.array(heads, dtype=np.float64).reshape(-1, 3).T
    direct = np.array([_number(link, "direct") for link in links])
    counts = np.array(list(map(len, listed)), dtype=np.int64)
    carried = np.bincount(np.repeat(np.arange(len(links)), counts), contribution, minlength=len(links))
    return EdgeHeads(
        direct=direct.astype(np.float32),
        rest=(weight - direct - carried).astype(np.float32),
        indptr=np.concatenate([[0], np.cumsum(counts)]),
        layer=layer.astype(np.int16),
        head=head.astype(np.int16),
        weight=contribution.astype(np.float32),
    )


def _facts(data: Mapping[str, Any], nodes: NodeTable, number: Mapping[str, int]) -> dict[str, Any]:
    metadata, ids = data["metadata"], nodes.ids()
    names = {given: ids[row] for given, row in number.items()}
    token_ids = nodes.index[nodes.mask(NodeKind.TOKEN)].tolist()
    known = len(token_ids) == len(metadata["prompt_tokens"]) and min(token_ids, default=0) >= 0
    logits = nodes.mask(NodeKind.LOGIT)
    unread = sorted({key for node in data["nodes"] for key in node} - _READ)
    unread += sorted({f"link.{key}" for link in data["links"] for key in link.keys() - _READ_OF_LINKS})
    result = facts(
        source=FORMAT,
        prompt=metadata["prompt"],
        tokens=metadata["prompt_tokens"],
        token_ids=token_ids if known else None,
        model=metadata["scan"],
        n_layers=int(nodes.layer[logits][0] if logits.any() else nodes.layer.max() + 1),
        nodes=nodes,
        unknown=_unknown(data, nodes),
        metadata={key: fact for key, fact in metadata.items() if key not in ("prompt", "prompt_tokens", "unknown")},
        qParams=_view(data["qParams"], names),
        other_keys={key: value for key, value in data.items() if key not in REQUIRED["graph"]},
        **({"keys_not_read": unread} if unread else {}),
    )
    pruning = metadata.get("pruning_settings")
    thresholds = [pruning.get(f"{key}_threshold") for key in ("node", "edge")] if isinstance(pruning, dict) else [None]
    if all(isinstance(threshold, int | float) for threshold in thresholds):
        result["pruning"] = dict(zip(("nodes", "edges"), thresholds, strict=True))
    if any(QK_RESULTS in node for node in data["nodes"]):
        given = {node["node_id"]: node[QK_RESULTS] for node in data["nodes"] if node.get(QK_RESULTS)}
        result[QK_RESULTS] = {names[name]: _renamed(value, names) for name, value in given.items()}
    return result


def _unknown(data: Mapping[str, Any], nodes: NodeTable) -> list[str]:
    """What a graph that is traced here would say, and this one does not."""
    features, before = nodes.mask(NodeKind.FEATURE), data["metadata"].get("unknown")
    checks = {
        "biases": True,
        "identity error": True,
        "edges left out before the file was written": not any("inflow" in node for node in data["nodes"]),
        "activations": features.any() and not nodes.activation[features].any(),
    }
    unknown = [name for name, holds in checks.items() if holds]
    # We write the list of a graph that was imported itself.
    return unknown + [name for name in (before if isinstance(before, list) else []) if name not in unknown]


def _view(view: object, names: Mapping[str, str]) -> dict[str, Any]:
    """The viewer's state, with our ids of the nodes."""
    if not isinstance(view, dict):
        raise ValueError(f"expected qParams to be an object, given {type(view).__name__}")
    view = {key: value for key, value in view.items() if value is not None}
    pinned, groups = view.get("pinnedIds", []), view.get("supernodes", [])
    lists = [pinned, *groups] if isinstance(groups, list) else [None]
    if not all(isinstance(ids, list) and all(isinstance(name, str) for name in ids) for ids in lists):
        raise ValueError("expected qParams.pinnedIds to be a list of node ids, and supernodes a list of such lists")
    return view | {
        "pinnedIds": [names.get(name, name) for name in pinned],
        "supernodes": [[label, *(names.get(name, name) for name in members)] for label, *members in groups if groups],
        "clickedId": names.get(str(view.get("clickedId", "")), ""),
    }


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A JSON value with our ids of the nodes. Whether it has the right form is for its user to say."""
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    return names.get(value, value) if isinstance(value, str) else value
