"""What a graph says about its prompt, model and run: which facts there are, and of which kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = ("prompt", "tokens", "n_layers", "identity_error")


def as_stored(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy that equals what a file would give back (tuples become lists).

    Raises `ValueError` for facts that are missing, of a wrong kind, or cannot be written as JSON.
    """
    missing = [name for name in REQUIRED if name not in metadata]
    if missing:
        raise ValueError(f"CircuitGraph.metadata: expected {', '.join(REQUIRED)}, but there is no {', '.join(missing)}")
    try:
        facts: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"CircuitGraph.metadata: expected facts that can be written as JSON ({error})") from error
    for name, (expected, fits) in _KINDS.items():
        if name in facts and not fits(facts[name]):
            raise ValueError(f"CircuitGraph.metadata: expected {name} to be {expected}, given {_shown(facts[name])}")
    if len(facts.get("token_ids", facts["tokens"])) != len(facts["tokens"]):
        raise ValueError(
            f"CircuitGraph.metadata: expected one id for each of {len(facts['tokens'])} tokens, "
            f"given {len(facts['token_ids'])}"
        )
    return facts


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    """A finite number; JSON writes whole numbers of any size, which must fit a float."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e300 and math.isfinite(value)
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_list(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(fits(item) for item in value)


def _is_token_fact(value: object) -> bool:
    """A target or a likely token."""
    return (
        isinstance(value, dict)
        and (value.get("token") is None or _is_text(value["token"]))
        and (value.get("probability") is None or _is_number(value["probability"]))
        and (value.get("position") is None or _is_count(value["position"]))
    )


def _is_pruning(value: object) -> bool:
    return isinstance(value, dict) and all(_is_number(value.get(name)) for name in ("nodes", "edges"))


def _is_source(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


_TOKEN_FACTS = "a list of objects with a token, a probability and a position"
_NUMBER: tuple[str, Callable[[object], bool]] = ("a number", _is_number)
_TEXT: tuple[str, Callable[[object], bool]] = ("text", _is_text)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": _TEXT,
    "tokens": ("a list of texts", lambda value: _is_list(value, _is_text)),
    "token_ids": ("a list of whole numbers", lambda value: _is_list(value, _is_count)),
    "n_layers": ("a whole number of at least 1", lambda value: _is_count(value) and value >= 1),
    "identity_error": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "model": _TEXT,
    "model_fingerprint": _TEXT,
    "crosscoder_fingerprint": _TEXT,
    "attention": _TEXT,
    "loaded_from": ("an object of texts", _is_source),
    "targets": (_TOKEN_FACTS, lambda value: _is_list(value, _is_token_fact)),
    "top_tokens": (_TOKEN_FACTS, lambda value: _is_list(value, _is_token_fact)),
    "stopped_by": _TEXT,
    "coverage": _NUMBER,
    "unexpanded_share": _NUMBER,
    "seconds": _NUMBER,
    "pruning": ("an object with the numbers nodes and edges", _is_pruning),
}
"""Fact -> what it is in words, and whether a value is that; facts of other names may be anything."""
