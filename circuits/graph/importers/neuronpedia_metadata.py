"""The metadata of a graph from what a Neuronpedia graph JSON file says besides nodes and links, and what it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from circuits.graph.importers.assemble import facts
from circuits.graph.neuronpedia_schema import QK_RESULTS, REQUIRED
from circuits.graph.nodes import NodeKind, NodeTable

FORMAT = "Neuronpedia graph JSON"
_READ = {
    *REQUIRED["node"], "token_prob", "is_target_logit", "influence", "activation", "output_weight", "inflow",
    "run_idx", "reverse_ctx_idx", "token", "label", QK_RESULTS,
}  # fmt: skip
"""Keys of nodes that are read, or say nothing that is not said elsewhere; others are listed in the metadata as not read."""
_READ_OF_LINKS = {*REQUIRED["link"], "direct", "heads"}


def metadata_of(data: Mapping[str, Any], nodes: NodeTable, number: Mapping[str, int]) -> dict[str, Any]:
    """The metadata of a graph.

    Args:
        data: the file, with the keys that the schema requires.
        number: place of every node in the table, by its id in the file.

    Raises:
        ValueError: a state of the viewer that is no such thing.
    """
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
