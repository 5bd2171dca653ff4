"""The `.pt` graphs of circuit-tracer (written by `Graph.to_pt`, versions 0.1 to 0.5).

A dictionary with an adjacency matrix whose rows are targets. Its nodes are, in this order: the selected features (rows of
`active_features`: layer, position, index), errors (layer by layer, all positions of a layer), tokens, and logits. Every feature
and logit has its row, so all are expanded. Effects of active features that were not selected are not in the file, and a row's
inflow is the sum of the magnitudes that are. Output weights are the logits' probabilities divided by their sum. Token texts are
not in the file either: tokens are named by their ids, as `#464`. Pruning follows circuit-tracer's conventions (see
`circuits.graph.conventions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from circuits.graph.conventions import CIRCUIT_TRACER
from circuits.graph.edges import Edges, RowBlock
from circuits.graph.importers.assemble import facts, shares, table_order
from circuits.graph.importers.tensor_pickle import TensorFile
from circuits.graph.nodes import NodeKind, NodeTable
from circuits.graph.storage import Parts

FORMAT = "circuit-tracer .pt file"
_KEYS = (
    "input_string", "adjacency_matrix", "cfg", "active_features", "logit_probabilities", "input_tokens",
    "selected_features", "activation_values",
)  # fmt: skip
_NUMBERS_AT_ONCE = 2**22
"""Entries of the matrix that are reordered together."""


def load(path: Path) -> Parts:
    """Nodes, edges and metadata of a `.pt` graph; it has no heads.

    Raises:
        ValueError: the file is damaged, tries to run code, or is no such graph.
    """
    file = TensorFile(path)
    value = file.value
    if not isinstance(value, dict) or (missing := [key for key in _KEYS if key not in value]):
        given = ", ".join(map(str, value))[:80] if isinstance(value, dict) else type(value).__name__
        lacking = (
            f"there is no {', '.join(missing)} among {given}" if isinstance(value, dict) else f"it holds a {given}"
        )
        raise ValueError(f"expected a dictionary with the keys of a graph, but {lacking}")
    tensors = {name: file.array(value[name], name) for name in _KEYS if name not in ("input_string", "cfg")}
    n_layers, vocabulary = _size(value["cfg"], "n_layers"), value.get("vocab_size") or _size(value["cfg"], "d_vocab")
    names, logit_ids = _logits(file, value)
    _check_shapes(tensors, n_layers=n_layers, n_logits=len(names))
    columns = _columns(tensors, n_layers, [index if index < vocabulary else -1 for index in logit_ids])
    order = table_order(columns)
    edges = _edges(tensors["adjacency_matrix"], order)
    is_logit, given_labels = columns["kind"] == NodeKind.LOGIT, iter(names)
    labels = [next(given_labels) if logit else "" for logit in is_logit[order].tolist()]
    columns = {name: column[order] for name, column in columns.items()}
    nodes = NodeTable.build(**columns, label=labels, inflow=edges.magnitudes)
    return nodes, edges, _facts(value, tensors, nodes, n_layers), None


def _size(config: object, name: str) -> int:
    size = config.get(name) if isinstance(config, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"expected cfg to say {name}, a whole number of at least 1, given {size!r:.40}")
    return size


def _logits(file: TensorFile, value: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and vocabulary ids of the logits. Earlier versions hold a tensor of ids."""
    given = value.get("logit_targets", value.get("logit_tokens"))
    if not isinstance(given, list):
        ids = file.array(given, "logit_targets").ravel().tolist()
        return [""] * len(ids), ids
    if not all(isinstance(item, tuple) and list(map(type, item)) == [str, int] for item in given):
        raise ValueError("expected logit_targets to be a list of a text and a vocabulary id each")
    return [text for text, _ in given], [index for _, index in given]


def _check_shapes(tensors: Mapping[str, np.ndarray], *, n_layers: int, n_logits: int) -> None:
    n_tokens, n_selected = tensors["input_tokens"].size, tensors["selected_features"].size
    n_active = len(tensors["active_features"]) if tensors["active_features"].ndim else 0
    n_nodes = n_selected + (n_layers + 1) * n_tokens + n_logits
    expected = {
        "input_tokens": ((n_tokens,), "i"),
        "selected_features": ((n_selected,), "i"),
        "active_features": ((n_active, 3), "i"),
        "activation_values": ((n_active,), "f"),
        "logit_probabilities": ((n_logits,), "f"),
        "adjacency_matrix": ((n_nodes, n_nodes), "f"),
    }
    for name, (shape, kind) in expected.items():
        if tensors[name].shape != shape or tensors[name].dtype.kind != kind:
            words = {"i": "whole numbers", "f": "floating-point numbers"}[kind]
            given = f"{tensors[name].dtype}{list(tensors[name].shape)}"
            counts = f"{n_selected} selected features, {n_layers} layers, {n_tokens} tokens and {n_logits} logits"
            raise ValueError(f"expected {name} to be {words} of shape {list(shape)} ({counts}), given {given}")
    selected = tensors["selected_features"]
    if n_selected and not 0 <= selected.min() <= selected.max() < n_active:
        raise ValueError(f"expected selected_features among the {n_active} active ones, given {selected.max()}")


def _columns(tensors: Mapping[str, np.ndarray], n_layers: int, logit_ids: list[int]) -> dict[str, np.ndarray]:
    """The columns of the node table, in the order of the file."""
    tokens, selected = tensors["input_tokens"], tensors["selected_features"]
    layer, position, index = tensors["active_features"][selected].T
    n_features, n_tokens, n_logits = len(selected), len(tokens), len(logit_ids)
    counts = (n_features, n_layers * n_tokens, n_tokens, n_logits)
    logit = np.arange(sum(counts)) >= sum(counts) - n_logits
    padding = {name: np.zeros(sum(counts)) for name in ("activation", "probability", "output_weight")}
    padding["activation"][:n_features] = tensors["activation_values"][selected]
    padding["probability"][logit] = tensors["logit_probabilities"]
    padding["output_weight"][logit] = shares(tensors["logit_probabilities"])
    places, layers = np.arange(n_tokens), np.arange(n_layers)
    kinds = np.repeat([NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN, NodeKind.LOGIT], counts)
    last = np.full(n_logits, n_tokens - 1)
    return {
        "kind": kinds,
        "part": np.zeros(sum(counts), dtype=np.int8),
        "layer": np.concatenate(
            [layer, np.repeat(layers, n_tokens), np.full(n_tokens, -1), np.full(n_logits, n_layers)]
        ),
        "position": np.concatenate([position, np.tile(places, n_layers), places, last]),
        "index": np.concatenate([index, np.full(n_layers * n_tokens, -1), tokens, np.array(logit_ids, dtype=np.int64)]),
        "expanded": np.isin(kinds, [NodeKind.FEATURE, NodeKind.LOGIT]),
        **padding,
    }


def _edges(adjacency: np.ndarray, order: np.ndarray) -> Edges:
    """The entries that are not zero, rows and columns in a new order."""
    n_nodes, blocks = len(order), []
    step = max(1, _NUMBERS_AT_ONCE // n_nodes)
    for begin in range(0, n_nodes, step):
        node = np.arange(begin, min(begin + step, n_nodes))
        rows = adjacency[order[node]][:, order]
        target, source = np.nonzero(rows)
        counts = np.bincount(target, minlength=len(node))
        blocks.append(RowBlock(node, counts, source.astype(np.int32), rows[target, source]))
    return Edges.from_blocks(blocks, n_nodes=n_nodes)


def _facts(
    value: Mapping[str, Any], tensors: Mapping[str, np.ndarray], nodes: NodeTable, n_layers: int
) -> dict[str, Any]:
    tokens, scan, model = tensors["input_tokens"].tolist(), value.get("scan"), value["cfg"].get("model_name")
    n_active, n_selected = len(tensors["active_features"]), len(tensors["selected_features"])
    others = [] if n_active == n_selected else [f"what {n_active - n_selected} active features of {n_active} cause"]
    known = facts(
        source=FORMAT,
        prompt=str(value["input_string"]),
        tokens=[f"#{token}" for token in tokens],
        token_ids=tokens,
        model=str(model or scan or "unknown"),
        n_layers=n_layers,
        nodes=nodes,
        unknown=["texts of tokens", "biases", "identity error", *others],
        metadata={"scan": "-".join(scan)} if isinstance(scan, list) else {"scan": str(scan)} if scan else {},
        config={name: fact for name, fact in value["cfg"].items() if isinstance(fact, str | int | float | bool)},
    )
    return known | {"conventions": CIRCUIT_TRACER.name}
