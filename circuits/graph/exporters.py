"""The exporters by name. Modules of `circuits.export` register theirs on import, so that graphs need not know them."""

from __future__ import annotations

import gc
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from circuits.graph.edges import GraphData
from replacement.files import check_file, write_atomic

Convert = TypeVar("Convert", bound=Callable[..., Any])


class MissingProgramError(ValueError):
    """An exporter needs a program that is not installed."""


@dataclass(frozen=True)
class Exporter:
    """One way to turn a graph into something else."""

    name: str
    convert: Callable[..., Any]
    """Called with a graph, and with options by keyword; gives text, bytes, pieces of text, an object for JSON, or any other
    value. Lists in the object may be iterators: they are written as they come."""
    suffix: str | None
    """How its files end; None for values that are no files, such as a networkx graph."""
    description: str
    fallback: str | None = None
    """Exporter whose file is written instead where a program is missing."""


_ITEMS_AT_ONCE = 4096
"""Entries of a list whose JSON is made together."""

_EXPORTERS: dict[str, Exporter] = {}


def register(
    name: str, *, suffix: str | None, description: str, fallback: str | None = None
) -> Callable[[Convert], Convert]:
    """Decorator that registers a conversion of graphs under a name; see `Exporter`."""

    def add(convert: Convert) -> Convert:
        _EXPORTERS[name] = Exporter(name, convert, suffix, description, fallback)
        return convert

    return add


def file_formats() -> dict[str, Exporter]:
    """The exporters that write files, by name, in alphabetical order."""
    return {name: exporter for name, exporter in sorted(_EXPORTERS.items()) if exporter.suffix is not None}


def exporter(name: str, *, writes_files: bool = False) -> Exporter:
    """The exporter of that name; if `writes_files`, one of `file_formats`. Raises `ValueError` where there is none."""
    known = file_formats() if writes_files else _EXPORTERS
    if isinstance(name, str) and name in known:
        return known[name]
    hint = "" if "svg" in _EXPORTERS else "; `import circuits.export` registers the others"
    raise ValueError(f"format: expected one of {', '.join(known)}, given {name!r}{hint}")


def export(graph: GraphData, name: str, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write a graph to `path` in the format `name`, with options of its conversion, atomically, and return the path.

    Raises `ValueError` for an unknown format or a place that cannot be written, before anything is computed, and
    `MissingProgramError` where a program is missing; the fallback's file is then written beside `path`.
    """
    chosen, path = exporter(name, writes_files=True), check_file(path)
    try:
        with _without_garbage_collection():
            return write_atomic(path, content(graph, chosen, **options))
    except MissingProgramError as error:
        if chosen.fallback is None:
            raise
        instead = exporter(chosen.fallback)
        written = write_atomic(path.with_suffix(str(instead.suffix)), content(graph, instead))
        raise MissingProgramError(f"{error}; the graph was written as {instead.name} to {written}") from error


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Exports make millions of small values without cycles; looking for cycles among them takes a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def content(graph: GraphData, chosen: Exporter, **options: Any) -> str | bytes | Iterable[str]:
    """What is written to a file: text, bytes or pieces of text as converted, and objects as JSON, in pieces."""
    converted = chosen.convert(graph, **options)
    return json_pieces(converted) if isinstance(converted, dict) else converted


def json_pieces(value: dict[str, Any]) -> Iterator[str]:
    """JSON text of an object, whose entries may be iterators in the place of lists: a large list never exists as a whole."""
    before = "{"
    for name, entry in value.items():
        yield f"{before}{json.dumps(name)}: "
        before = ", "
        if isinstance(entry, Iterator):
            begin = "["
            while items := list(itertools.islice(entry, _ITEMS_AT_ONCE)):
                yield begin + json.dumps(items, allow_nan=False)[1:-1]
                begin = ", "
            yield "[]" if begin == "[" else "]"
        else:
            yield json.dumps(entry, allow_nan=False)
    yield "{}" if before == "{" else "}"


def whole(value: dict[str, Any]) -> dict[str, Any]:
    """The same object with lists in the place of iterators."""
    return {name: list(entry) if isinstance(entry, Iterator) else entry for name, entry in value.items()}
