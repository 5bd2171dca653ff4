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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.edge_heads import EdgeHeads
from circuits.graph.edges import Edges
from circuits.graph.importers.assemble import table_order
from circuits.graph.importers.neuronpedia_metadata import FORMAT, metadata_of
from circuits.graph.importers.neuronpedia_nodes import columns_of, number_of, row_of
from circuits.graph.neuronpedia_schema import REQUIRED, VERSION
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.storage import Parts
from circuits.graph.text import shorten
from replacement.files import read_text


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
    rows = [row_of(node, tokens) for node in given]
    columns = columns_of(rows)
    order = table_order(columns)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    number = {node["node_id"]: int(numbers[row]) for row, node in enumerate(given)}
    if len(number) < len(given):
        raise ValueError(_twice([node["node_id"] for node in given]))
    edges, heads = _edges(links, number)
    columns = {name: column[order] for name, column in columns.items()}
    nodes = _table(columns, [rows[row]["label"] for row in order.tolist()], edges)
    return nodes, edges, metadata_of(data, nodes, number), heads


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
    weight = np.array([number_of(link, "weight") for link in links])
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
    direct = np.array([number_of(link, "direct") for link in links])
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
