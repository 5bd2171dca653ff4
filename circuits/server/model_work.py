"""What the server does with a model: trace a prompt into the folder, and change features of a graph's prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.rows import node_number, node_rows
from circuits.graph.text import shorten, slug
from circuits.progress import ProgressText
from circuits.server.folder import Folder
from circuits.server.jobs import Job
from circuits.trace_options import TraceOptions, write_files
from replacement.files import atomic_folder
from replacement.token_texts import visible

if TYPE_CHECKING:
    from replacement import Intervention, ReplacementModel

PROMPT = 20_000
"""Most characters of a prompt."""
CHANGES = 100
"""Most features that are changed at once."""
WAYS = ("scale", "activation", "add")
TOP = 8
"""Likeliest tokens that are named, before and after."""


class ModelWork:
    """A model, and how prompts are traced in it."""

    def __init__(self, model: ReplacementModel, options: TraceOptions, folder: Folder) -> None:
        """Traces go into the folder."""
        self.model, self.options, self._folder = model, options, folder

    def trace(self, request: Mapping[str, Any]) -> tuple[str, Callable[[Job], dict[str, Any]]]:
        """Title and work of a trace.

        Args:
            request: `prompt`, a text, and `targets`, a list of texts as `circuits.trace` reads them, by default none.

        Raises:
            ValueError: another form.
        """
        if unknown := sorted(request.keys() - {"prompt", "targets"}):
            raise ValueError(f"expected prompt and targets, given {unknown[0]!r:.60}")
        prompt, targets = request.get("prompt"), request.get("targets", [])
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > PROMPT:
            raise ValueError(f"prompt: expected a text of 1 to {PROMPT:,} characters")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError("prompt: expected text, given half of a surrogate pair")
        if not isinstance(targets, list) or not all(isinstance(text, str) and len(text) <= 200 for text in targets):
            raise ValueError("targets: expected a list of texts of at most 200 characters")

        def work(job: Job) -> dict[str, Any]:
            progress_text = ProgressText(self.options.max_nodes)
            job.say("running the model")
            graph, circuit = self.options.trace(
                self.model,
                prompt,
                [text for text in targets if text.strip()],
                announce=lambda cost: job.say(f"estimate: {cost}"),
                progress=lambda expanded, share: job.say(progress_text(expanded, share)),
            )
            job.say("writing the graph")
            name = self._folder.free_name(slug(prompt))
            with atomic_folder(self._folder.path / name) as scratch:
                write_files(graph, circuit, scratch, ["safetensors"])
            return {"graph": name}

        return shorten(" ".join(prompt.split()), 120), work

    def intervene(self, request: Mapping[str, Any], file: Path) -> tuple[str, Callable[[Job], dict[str, Any]]]:
        """Title and work of a run of a graph's prompt with features changed.

        Args:
            request: `changes`, a list of objects: `node`, the id or name of a feature of the graph, a number as one of `scale`,
                `activation` and `add`, and `everywhere`, whether it is changed at all positions.
            file: of the graph.

        Raises:
            ValueError: another form.
        """
        changes = request.get("changes")
        if not isinstance(changes, list) or not 1 <= len(changes) <= CHANGES:
            raise ValueError(f"changes: expected a list of 1 to {CHANGES} changes")
        for change in changes:
            _check_change(change)

        def work(job: Job) -> dict[str, Any]:
            job.say("running the model")
            graph = CircuitGraph.load(file)
            return intervened(self.model, graph, _interventions(graph, changes))

        return f"{len(changes)} feature{'s' * (len(changes) > 1)} changed", work


def intervened(model: ReplacementModel, graph: CircuitGraph, interventions: Sequence[Intervention]) -> dict[str, Any]:
    """The likeliest tokens at the position of a graph's targets, with features changed and without.

    The run is `model.intervene` with its defaults: errors of the original run are kept, attention and norms follow.

    Returns:
        `position`, and `tokens`: for the likeliest tokens of both runs a `token` and its probability `before` and `after`.

    Raises:
        ValueError: the graph was traced in another model, or a feature cannot be changed.
    """
    from circuits.attribution.grounding import traced_tokens

    tokens_T = traced_tokens(model, graph)
    run = model.intervene(tokens_T, interventions)
    targets = graph.metadata.get("targets") or [{}]
    position = int(targets[0].get("position", len(tokens_T) - 1))
    before_V, after_V = (logits[position].float().softmax(-1) for logits in (run.clean_logits, run.logits))
    chosen = dict.fromkeys(after_V.topk(TOP).indices.tolist() + before_V.topk(TOP).indices.tolist())
    texts = model.language_model.token_strings(list(chosen))
    rows = [
        {"token": visible(text), "before": float(before_V[token]), "after": float(after_V[token])}
        for token, text in zip(chosen, texts, strict=True)
    ]
    return {"position": position, "tokens": sorted(rows, key=lambda row: -max(row["before"], row["after"]))}


def _interventions(graph: CircuitGraph, changes: Sequence[Mapping[str, Any]]) -> list[Intervention]:
    numbers = np.array([node_number(graph, change["node"]) for change in changes])
    interventions = []
    for row, change in zip(node_rows(graph, numbers, np.zeros(len(graph.nodes))), changes, strict=True):
        way = next(way for way in WAYS if way in change)
        intervention = row.intervention(**{way: float(change[way])})
        interventions.append(replace(intervention, position=None) if change.get("everywhere") else intervention)
    return interventions


def _check_change(change: Any) -> None:
    if not isinstance(change, dict) or not isinstance(change.get("node"), str):
        raise ValueError("changes: expected objects with the id of a node")
    ways = [way for way in WAYS if way in change]
    number = change[ways[0]] if len(ways) == 1 else None
    if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) <= 1e18:
        raise ValueError(
            f"changes: expected one number, {', '.join(WAYS[:-1])} or {WAYS[-1]}, for {change['node']!r:.60}"
        )
    if not isinstance(change.get("everywhere", False), bool) or change.keys() - {"node", "everywhere", *WAYS}:
        raise ValueError(
            f"changes: expected node, everywhere and one of {', '.join(WAYS)}, given {sorted(change)!r:.80}"
        )
