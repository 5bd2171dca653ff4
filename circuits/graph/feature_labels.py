"""What a graph knows of the labels of its features beside their text."""

from __future__ import annotations

from typing import Any

from circuits.graph.edges import GraphData
from circuits.graph.nodes import NodeKind

HINT = "~ "
"""What a label begins with that is a guess from weights."""
FEATURE_LABELS = "feature_labels"
"""Key of the metadata: an object for every labelled feature, by its name at any position (`2/345`, `attention:2/345`), with
the `source` of its label (`rule`, `person`, `language model` or `hint`), `precision`, `recall` and `f1` where it was scored,
and the whole `text` where the label was too long."""
_OF_CLAIMS = ("|", "→", '"', "~", ",")
"""Signs of what follows a name: a colon behind one of them is a token."""
_SCORES = ("precision", "recall", "f1")
_NOTES = {"hint": "a guess from weights", "person": "by a person", "language model": "by a language model"}


def feature_key(part: str, layer: int, index: int) -> str:
    """Name of a feature at any position: `2/345`, or `attention:2/345`."""
    return f"{'attention:' if part == 'attention' else ''}{layer}/{index}"


def label_facts(graph: GraphData, row: int) -> dict[str, Any]:
    """What is known of the label of one node; empty where nothing is."""
    nodes = graph.nodes
    if nodes.kind[row] != NodeKind.FEATURE or not nodes.label[row]:
        return {}
    part = "attention" if nodes.of_attention[row] else "mlp"
    facts: dict[str, Any] = graph.metadata.get(FEATURE_LABELS, {}).get(
        feature_key(part, int(nodes.layer[row]), int(nodes.index[row])), {}
    )
    return facts


def label_note(graph: GraphData, row: int) -> str:
    """The same in words: `F1 0.97`, `by a person`, `a guess from weights`; empty where nothing is known."""
    facts = label_facts(graph, row)
    score = [f"F1 {facts['f1']:.2f}"] if "f1" in facts else []
    return ", ".join([*score, *([_NOTES[facts["source"]]] if facts.get("source") in _NOTES else [])])


def split_heading(label: str) -> tuple[str, str]:
    """The name that a label begins with, `Texas` of `Texas: El Paso | Houston`, and the rest; empty where it has none."""
    name, colon, rest = label.partition(": ")
    has_name = colon and rest.strip() and not any(sign in name for sign in _OF_CLAIMS)
    return (name.strip(), rest) if has_name else ("", label)


def are_label_facts(value: object) -> bool:
    """Whether this may be metadata of the key `FEATURE_LABELS`."""
    return isinstance(value, dict) and all(map(_are_facts, value.values()))


def _are_facts(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ""), str) for key in ("source", "text")):
        return False
    scores = [value[key] for key in _SCORES if key in value]
    return all(isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1 for score in scores)
