"""Trace a file of prompts, each into a folder of its own: resumable, and split over processes.

A prompt is finished when its folder is there, with a record of what made it: folders appear whole or not at all, so a killed
process leaves nothing that would be taken for a result. Processes share nothing but the folder: each takes every n-th prompt,
then helps with what the others have not finished, from the end. So none waits for another, a killed one's prompts are picked
up, and which process made a folder shows nowhere in it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.graph.circuit_graph import CircuitGraph
from circuits.trace_options import TraceOptions, check_formats, facts_of, files_of, write_files
from replacement.files import atomic_folder, check_folder, checked_path, read_json, write_atomic

if TYPE_CHECKING:
    from replacement import ReplacementModel

RECORD_FILE = "record.json"
SUMMARY_FILE = "summary.csv"
FORMATS = ("safetensors", "neuronpedia")
"""Of the pruned circuits, where nothing else is asked for."""
COLUMNS = (
    *("id", "status", "prompt", "nodes", "edges", "replacement", "completeness", "circuit_nodes", "circuit_edges"),
    *("circuit_replacement", "circuit_completeness", "identity_error", "stopped_by", "folder", "error"),
)
"""Of the summary table."""
_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """One line of the file."""

    id: str
    """Name of its folder; the number of its line where the line names none."""
    prompt: str
    targets: tuple[str, ...] = ()
    """What to explain instead of the top tokens, as `circuits.trace` reads it."""


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Read a file with one JSON object per line: `prompt`, optionally `id` and `target` (a text or a list of texts).

    Raises:
        ValueError: names the line that is no such object, has other entries or an id twice; or no file, or no prompts.
    """
    path = checked_path(path)
    lines: list[PromptLine] = []
    numbers: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    parsed = _parsed(line, number, path)
                    before = numbers.setdefault(parsed.id.lower(), number)  # some file systems do not know the case
                    if before != number:
                        raise ValueError(f"{path} line {number}: line {before} has the id {parsed.id!r} too")
                    lines.append(parsed)
    except OSError as error:
        raise ValueError(f"{path}: expected a file of prompts, but it cannot be read ({error.strerror})") from error
    if not lines:
        raise ValueError(f"{path} holds no prompts: expected one JSON object per line")
    return lines


def _parsed(line: bytes, number: int, path: Path) -> PromptLine:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{path} line {number}: {what}")

    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise wrong(f"no JSON ({error})") from None
    if not isinstance(value, dict):
        raise wrong(f"expected an object with a prompt, got {type(value).__name__}")
    if unknown := sorted(value.keys() - {"prompt", "id", "target"}):
        raise wrong(f"unknown entry {unknown[0]!r}: expected prompt, id and target")
    prompt, name, target = value.get("prompt"), value.get("id", str(number)), value.get("target", [])
    if not isinstance(prompt, str) or not prompt.strip():
        raise wrong(f"prompt: expected some text, got {prompt!r:.50}")
    if not isinstance(name, str) or not _ID.fullmatch(name) or name.lower() == SUMMARY_FILE:
        raise wrong(f"id: expected up to 100 letters, digits, dots, dashes and underscores, got {name!r:.50}")
    targets = [target] if isinstance(target, str) else target
    if not isinstance(targets, list) or not all(isinstance(text, str) for text in targets):
        raise wrong(f"target: expected a text or a list of texts, got {target!r:.50}")
    return PromptLine(id=name, prompt=prompt, targets=tuple(targets))


def trace_many(
    model: ReplacementModel,
    prompts: Sequence[PromptLine],
    out: str | Path,
    *,
    options: TraceOptions | None = None,
    formats: Sequence[str] = FORMATS,
    part: int = 0,
    n_parts: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Trace prompts into `out/ID/`, those apart that were traced before, and write `out/summary.csv`.

    Args:
        options: of every trace.
        formats: of the pruned circuits; the full graphs are kept as `graph.safetensors`.
        part: number of this process, out of `n_parts` that work on the same folder.
        progress: called with the number of prompts that are finished, after each one.

    Returns:
        The rows of the summary (see `COLUMNS`), in the order of the prompts. A prompt that could not be traced has `failed` as
        its status and an error; the others do not stop for it, and the next call tries it again. Every process ends when all
        are finished.

    Raises:
        ValueError: the folder holds a prompt of that id that was made with other options, or cannot be written.
        KeyboardInterrupt: finished prompts stay.
    """
    options, folder = options or TraceOptions(), check_folder(out)
    formats = check_formats(formats)
    with options.indexes(model):
        pass  # an index that cannot be used is refused once, not for every prompt
    made_by = {line.id: _made_by(line, model, options, formats) for line in prompts}
    finished: dict[str, dict[str, Any]] = {}
    for line in prompts:  # all of them first: other options are refused before any work
        record = _record(folder / line.id, made_by[line.id])
        if record is not None and "error" not in record:
            finished[line.id] = record
    if progress is not None:
        progress(len(finished))
    for line, is_own in _order(prompts, part, n_parts):
        if line.id in finished:
            continue
        record = _record(folder / line.id, made_by[line.id])  # another process may have finished it meanwhile
        if record is None or ("error" in record and is_own):
            record = _trace_one(model, line, folder / line.id, options, formats, made_by[line.id])
        finished[line.id] = record
        if progress is not None:
            progress(len(finished))
    rows = [_row(line, _record(folder / line.id, made_by[line.id]) or finished[line.id]) for line in prompts]
    write_atomic(folder / SUMMARY_FILE, _table(rows))
    return rows


def _order(prompts: Sequence[PromptLine], part: int, n_parts: int) -> Iterator[tuple[PromptLine, bool]]:
    """This process's share, with True, then those of the others from the end: where they will come last themselves."""
    yield from ((line, True) for line in prompts[part::n_parts])
    yield from ((line, False) for number, line in reversed(list(enumerate(prompts))) if number % n_parts != part)


def _made_by(
    line: PromptLine, model: ReplacementModel, options: TraceOptions, formats: Sequence[str]
) -> dict[str, Any]:
    """All that decides a result. Memory does not: it refuses or allows."""
    lm = model.language_model
    return {
        "prompt": line.prompt,
        "target": list(line.targets),
        **_settings(options),
        "formats": list(formats),
        "model": lm.fingerprint,
        "crosscoder": "+".join(crosscoder.fingerprint for crosscoder in model.crosscoders.values()),
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def _settings(options: TraceOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "memory"}


def _record(folder: Path, made_by: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished prompt; None for one that is not finished, or failed when something else was asked for.

    Raises:
        ValueError: something else made it.
    """
    if not folder.is_dir():
        return None
    record = read_json(folder / RECORD_FILE)
    known = record.get("made_by") if isinstance(record, dict) else None
    if not isinstance(known, dict):
        raise ValueError(f"{folder / RECORD_FILE} is no record of a traced prompt: choose another folder")
    known = _settings(TraceOptions()) | known  # options that earlier versions did not have
    if "error" in record and known != made_by:
        return None
    for name in made_by:
        if known.get(name) != made_by[name]:
            raise ValueError(
                f"{folder} was made with another {name} ({known.get(name)!r:.60}, now {made_by[name]!r:.60}): "
                "choose another folder, or remove this one"
            )
    return record


def _trace_one(
    model: ReplacementModel,
    line: PromptLine,
    folder: Path,
    options: TraceOptions,
    formats: Sequence[str],
    made_by: Mapping[str, Any],
) -> dict[str, Any]:
    import torch

    record: dict[str, Any] = {"made_by": made_by}
    try:
        graph, circuit = (_timeless(graph) for graph in options.trace(model, line.prompt, line.targets))
    except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
        record["error"] = " ".join(str(error).split()) or type(error).__name__
    else:
        if graph.metadata["stopped_by"] == "interrupt":
            raise KeyboardInterrupt
        record["result"] = facts_of(graph, circuit)
    before = _record(folder, made_by)  # a folder is replaced only where that changes something
    if before is not None and ("error" not in before or before == record):
        return before
    with atomic_folder(folder, replaces=(RECORD_FILE, *files_of(formats).values())) as scratch:
        if "result" in record:
            write_files(graph, circuit, scratch, formats, index=options.page_index)
        (scratch / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _timeless(graph: CircuitGraph) -> CircuitGraph:
    """Without what differs from run to run."""
    return replace(graph, metadata={name: value for name, value in graph.metadata.items() if name != "seconds"})


def _row(line: PromptLine, record: Mapping[str, Any]) -> dict[str, Any]:
    given = {"id": line.id, "prompt": line.prompt, "folder": line.id, "error": record.get("error", "")}
    row = {"status": "failed" if "error" in record else "traced", **given, **record.get("result", {})}
    return {name: row.get(name, "") for name in COLUMNS}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
