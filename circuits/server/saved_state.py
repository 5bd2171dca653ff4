"""Labels, supernodes, pinned nodes and moved boxes of a graph, saved beside it in the form that the viewer saves and loads.

What a page sends is merged: each label and each supernode by itself, so that of several pages that save at once none undoes
what another one saved. What is one reader's view (selection, search, sizes of panes) is not saved.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from circuits.graph.text import shorten
from circuits.server.folder import GraphFile
from replacement.files import read_json, write_atomic

VERSION = 1
"""Of the viewer's saved states."""
IDS, GROUPS, LABELS = 20_000, 1_000, 20_000
"""Most pinned nodes, places or members of a supernode, supernodes, and labels."""
ID, NAME, LABEL, PROMPT = 80, 200, 500, 100_000
"""Most characters of an id, a supernode's name, a label and a prompt."""
VIEW = ("direction", "topLinks", "minInfluence", "query", "theme", "panes", "selected", "path")
"""Entries of the viewer's states that are not saved."""
Check = Callable[[Any], bool]


class SavedStates:
    """The saved states of a folder's graphs. Saves of one graph wait for each other."""

    def __init__(self) -> None:
        """Start without any lock held."""
        self._locks: dict[str, threading.Lock] = {}
        self._counted: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def load(self, graph: GraphFile) -> dict[str, Any]:
        """What is saved for a graph; empty where nothing is.

        Raises:
            ValueError: the file holds something else.
        """
        path = graph.state
        if path.is_symlink():
            raise ValueError(f"{path.name} is a symbolic link, which is never followed")
        nothing: dict[str, Any] = {"version": VERSION, "pinned": [], "places": {}, "groups": [], "labels": {}}
        if not path.exists():
            return nothing
        try:
            return {**nothing, **checked(read_json(path))}
        except ValueError as error:
            raise ValueError(f"{path.name}: {str(error).replace(str(path), 'the file')}") from None

    def save(self, graph: GraphFile, given: Any) -> dict[str, Any]:
        """Merge what a page sends into what is saved, and write it atomically. Returns the result.

        Args:
            given: labels and supernodes that changed; a label that is null, or a supernode without members, is removed.
                Pinned nodes and places, where they are given, replace those saved.

        Raises:
            ValueError: another form, more than the limits, a saved file that is damaged, or a folder that takes no files.
        """
        change = checked(given)
        with self._locks.setdefault(graph.name, threading.Lock()):
            state = self.load(graph)
            groups = {group["id"]: group for group in [*state["groups"], *change.get("groups", [])]}
            merged = {
                **state,
                **change,
                "groups": [group for group in groups.values() if group["members"]],
                "labels": {
                    node: text
                    for node, text in {**state["labels"], **change.get("labels", {})}.items()
                    if text is not None
                },
            }
            write_atomic(graph.state, json.dumps(checked(merged), indent=1) + "\n")
        return merged

    def counts(self, graph: GraphFile) -> dict[str, Any]:
        """Numbers of `labels` and `supernodes` that are saved; for a damaged file None, and what is wrong as `savedError`."""
        try:
            facts = graph.state.stat()
        except OSError:
            return {"labels": 0, "supernodes": 0}
        version = facts.st_mtime_ns, facts.st_size
        known = self._counted.get(graph.name)
        if known is not None and known[0] == version:
            return known[1]
        counts: dict[str, Any]
        try:
            state = self.load(graph)
            counts = {"labels": len(state["labels"]), "supernodes": len(state["groups"])}
        except ValueError as error:
            counts = {"labels": None, "supernodes": None, "savedError": str(error)}
        self._counted[graph.name] = version, counts
        return counts


def checked(state: Any) -> dict[str, Any]:
    """The entries of a state that are saved.

    Raises:
        ValueError: names the entry that is not as expected.
    """
    if not isinstance(state, dict):
        raise ValueError(f"state: expected an object, given {type(state).__name__}")
    if unknown := sorted(state.keys() - _ENTRIES.keys() - set(VIEW)):
        raise ValueError(f"state: expected {', '.join(_ENTRIES)}, given {shorten(unknown[0], 40)!r}")
    state = {"version": None, **state}
    for name, (expected, fits) in _ENTRIES.items():
        if name in state and not fits(state[name]):
            raise ValueError(f"{name}: expected {expected}, given {shorten(json.dumps(state[name]), 60)}")
    return {name: value for name, value in state.items() if name in _ENTRIES}


def _text(most: int, least: int = 0) -> Check:
    return lambda value: isinstance(value, str) and least <= len(value) <= most


_is_id = _text(ID, least=1)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and len(value) <= IDS and all(map(_is_id, value))


def _is_group(value: object) -> bool:
    kinds: Mapping[str, Check] = {"id": _is_id, "name": _text(NAME), "members": _are_ids}
    return isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[key](value[key]) for key in kinds)


def _are_groups(value: object) -> bool:
    if not isinstance(value, list) or len(value) > GROUPS or not all(map(_is_group, value)):
        return False
    return len({group["id"] for group in value}) == len(value)


def _are_labels(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > LABELS:
        return False
    fits = _text(LABEL)
    return all(_is_id(node) and (text is None or fits(text)) for node, text in value.items())


def _are_places(value: object) -> bool:
    def is_place(place: object) -> bool:
        return (
            isinstance(place, list)
            and len(place) == 2
            and all(isinstance(x, int | float) and abs(x) < 1e9 for x in place)
        )

    return (
        isinstance(value, dict) and len(value) <= IDS and all(map(_is_id, value)) and all(map(is_place, value.values()))
    )


_ENTRIES: dict[str, tuple[str, Check]] = {
    "version": (str(VERSION), lambda value: value == VERSION and not isinstance(value, bool)),
    "prompt": (f"a text of at most {PROMPT:,} characters", _text(PROMPT)),
    "pinned": (f"a list of at most {IDS:,} ids of at most {ID} characters", _are_ids),
    "places": (f"an object of at most {IDS:,} pairs of numbers, each by the id of a node or supernode", _are_places),
    "groups": (
        f"a list of at most {GROUPS:,} objects, each with another id, a name of at most {NAME} characters and members, at most "
        f"{IDS:,} ids",
        _are_groups,
    ),
    "labels": (
        f"an object of at most {LABELS:,} texts of at most {LABEL} characters, each by the id of a node",
        _are_labels,
    ),
}
