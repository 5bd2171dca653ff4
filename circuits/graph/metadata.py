"""What a graph says about its prompt, model and run: which facts there are, and of which kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from circuits.graph.conventions import CONVENTIONS
from circuits.graph.feature_labels import FEATURE_LABELS, are_label_facts
from circuits.graph.groups import GROUPS, are_groups
from circuits.graph.inclusion import INCLUSION, are_inclusion_facts
from circuits.graph.neuronpedia_schema import QK_LISTS, QK_RESULTS
from circuits.graph.text import shorten

Check = Callable[[Any], bool]
REQUIRED = ("prompt", "tokens", "n_layers", "identity_error")
CONSENSUS = "consensus"
"""Key of the mean graph of many prompts: an object with the number of `prompts`, the least `frequency` of its nodes and edges,
and `nodes`: frequency, and means and spreads of activation and influence, by id."""


def as_stored(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy that equals what a file would give back (tuples become lists).

    Raises `ValueError` for facts that are missing, of a wrong kind, or cannot be written as JSON.
    """
    if not isinstance(metadata, Mapping):
        raise ValueError(f"CircuitGraph.metadata: expected a mapping, given {metadata!r:.50}")
    missing = [name for name in REQUIRED if name not in metadata]
    if missing:
        raise ValueError(f"CircuitGraph.metadata: expected {', '.join(REQUIRED)}, but there is no {', '.join(missing)}")
    try:
        facts: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"CircuitGraph.metadata: expected facts that can be written as JSON ({error})") from error
    for name, (expected, fits) in _KINDS.items():
        if name in facts and not fits(facts[name]):
            raise ValueError(
                f"CircuitGraph.metadata: expected {name} to be {expected}, given {shorten(json.dumps(facts[name]), 60)}"
            )
    if len(facts.get("token_ids", facts["tokens"])) != len(facts["tokens"]):
        raise ValueError(
            f"CircuitGraph.metadata: expected one id for each of {len(facts['tokens'])} tokens, "
            f"given {len(facts['token_ids'])}"
        )
    return facts


def check_traced_here(metadata: Mapping[str, Any]) -> None:
    """Refuse a graph of another tool, and one of many prompts, where its model is needed.

    Raises:
        ValueError: the graph was imported, or is a consensus.
    """
    if CONSENSUS in metadata:
        raise ValueError(f"expected the graph of one prompt, given the consensus of {metadata[CONSENSUS]['prompts']}")
    if imported := metadata.get("imported"):
        raise ValueError(
            f"expected a graph that was traced here: this one was read from a {imported['format']}, which does not say with "
            "which weights it was traced; trace its prompt with `circuits trace` to ask its model"
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """A finite number; JSON writes whole numbers of any size, which must fit a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(fits(item) for item in value)


def _is_token_fact(value: object) -> bool:
    """A target or a likely token."""
    kinds: dict[str, Check] = {"token": _is_text, "probability": _is_number, "position": _is_count}
    return isinstance(value, dict) and all(value.get(name) is None or fits(value[name]) for name, fits in kinds.items())


def _is_qk_result(value: object) -> bool:
    """Lists of node ids followed by a number."""

    def fits(item: object, length: int) -> bool:
        return isinstance(item, list) and len(item) == length and all(map(_is_text, item[:-1])) and _is_number(item[-1])

    return isinstance(value, dict) and all(
        isinstance(value.get(name), list) and all(fits(item, length) for item in value[name])
        for name, length in QK_LISTS.items()
    )


_TOKEN_FACTS = ("a list of objects with a token, a probability and a position", _list_of(_is_token_fact))
_TEXTS = ("prompt", "model", "model_fingerprint", "crosscoder_fingerprint", "attention", "stopped_by")
_KINDS: dict[str, tuple[str, Check]] = {
    **{name: ("text", _is_text) for name in _TEXTS},
    **{name: ("a number", _is_number) for name in ("coverage", "unexpanded_share", "seconds")},
    **{name: ("a number", _is_number) for name in ("dropped_below", "weight_error", "left_out_share")},
    "conventions": (" or ".join(CONVENTIONS), lambda value: _is_text(value) and value in CONVENTIONS),
    "tokens": ("a list of texts", _list_of(_is_text)),
    "token_ids": ("a list of whole numbers", _list_of(_is_count)),
    "n_layers": ("a whole number of at least 1", lambda value: _is_count(value) and value >= 1),
    "identity_error": (
        "a number of at least 0",
        lambda value: value is None or (_is_number(value) and value >= 0),
    ),
    "imported": (
        "an object with a format and a list of what is unknown",
        lambda value: (
            isinstance(value, dict) and _is_text(value.get("format")) and _list_of(_is_text)(value.get("unknown"))
        ),
    ),
    "loaded_from": ("an object of texts", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "targets": _TOKEN_FACTS,
    "top_tokens": _TOKEN_FACTS,
    CONSENSUS: (
        "an object with a number of prompts",
        lambda value: isinstance(value, dict) and _is_count(value.get("prompts")),
    ),
    FEATURE_LABELS: ("an object of objects with a source and scores from 0 to 1", are_label_facts),
    INCLUSION: ("an object with lists of shares nodes and edges, and shares by node id", are_inclusion_facts),
    GROUPS: ("a list of objects with a name, ids of members and an f1 from 0 to 1 or null", are_groups),
    QK_RESULTS: (
        f"an object of objects with the lists {', '.join(QK_LISTS)}",
        lambda value: isinstance(value, dict) and all(map(_is_qk_result, value.values())),
    ),
    "pruning": (
        "an object with the numbers nodes and edges",
        lambda value: isinstance(value, dict) and all(_is_number(value.get(name)) for name in ("nodes", "edges")),
    ),
}
"""Fact -> what it is in words, and whether a value is that; facts of other names may be anything."""
