"""What the command line says about a circuit: one JSON object, or a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from circuits.graph.circuit_graph import CircuitGraph
from circuits.graph.paths import average_path_length, path_facts, strongest_paths
from circuits.graph.text import printable
from replacement.console import pairs, section, table
from replacement.token_texts import visible


def summary(graph: CircuitGraph, circuit: CircuitGraph, files: Mapping[str, Path]) -> dict[str, Any]:
    """The facts of a full graph and its pruned circuit as one JSON object."""
    counts = graph.counts()
    edges = counts.pop("edges")
    facts = graph.metadata
    return {
        "prompt": facts["prompt"],
        "tokens": facts["tokens"],
        "targets": [
            {"token": target.get("token"), "probability": target.get("probability")}
            for target in facts.get("targets", [])
        ],
        "nodes": counts,
        "edges": edges,
        "pruned": {"nodes": len(circuit.nodes), "edges": len(circuit.edges)},
        "scores": asdict(graph.scores()),
        "pruned_scores": asdict(circuit.scores()),
        "identity_error": graph.identity_error,
        "average_path_length": average_path_length(graph),
        "logit_gap_16bit": facts.get("logit_gap_16bit"),
        "stopped_by": facts.get("stopped_by"),
        "seconds": facts.get("seconds"),
        "paths": path_facts(circuit, strongest_paths(circuit)),
        "files": {name: str(path) for name, path in files.items()},
    }


def page(graphs: Mapping[str, CircuitGraph], files: Mapping[str, Path]) -> Group:
    """A readable account of one prompt's graphs by name (`full` and `pruned`, or just one), and the files written."""
    first = next(iter(graphs.values()))
    last = list(graphs.values())[-1]
    parts: list[RenderableType] = [Text(printable(first.metadata["prompt"]), style="bold"), Text()]
    parts += _tokens(first.metadata)
    parts += [
        section("Strongest paths from different tokens, with their share of influence", _paths(last)),
        section("Graph", Group(_comparison(graphs), *_budget(last))),
        section("Run", Text(_run(first.metadata))),
    ]
    if files:
        parts += [section("Files", pairs(files.items(), width=14))]
    return Group(*parts)


def _tokens(facts: Mapping[str, Any]) -> list[RenderableType]:
    """What the model says at the targets' position, and the targets themselves where they are something else."""
    likely, targets, tokens = facts.get("top_tokens", []), facts.get("targets", []), facts.get("tokens", [])
    parts: list[RenderableType] = []
    if likely:
        position = targets[0].get("position") if targets else None
        inside = position is not None and position + 1 < len(tokens)
        title = f"Token after position {position} ({visible(tokens[position])})" if inside else "Next token"
        parts.append(section(title, _likely(likely)))
    if targets and not {target.get("token") for target in targets} <= {token.get("token") for token in likely}:
        parts.append(section("Targets", _likely(targets)))
    return parts


def _likely(tokens: list[dict[str, Any]]) -> Table:
    chances = ((visible(fact.get("token") or ""), fact.get("probability")) for fact in tokens)
    return pairs([(token, f"{100 * chance:5.1f} %" if chance else "") for token, chance in chances], width=12)


def _paths(graph: CircuitGraph) -> Table:
    """A line for the token of each path, and one for every node behind it, with the sign of the edge that leads there."""
    rows: list[tuple[str, str, str]] = []
    for path in path_facts(graph, strongest_paths(graph)):
        total, direct = 100 * path["token_share"], 100 * path["direct_share"]
        place = f"at {path['position']}: {total:.1f} % in all, {direct:.1f} % direct"
        rows.append((f"{100 * path['share']:.1f} %", path["token"], place))
        rows += [
            (f"{'+' if weight > 0 else '−'} →", node["label"], node["name"])
            for node, weight in zip(path["nodes"][1:], path["weights"], strict=True)
        ]
    if not rows:
        return table("", rows=[("no path from a token to the output",)], header=False)
    return table("", "", "", rows=rows, texts=("",), header=False)


def _budget(graph: CircuitGraph) -> list[Text]:
    """What the budget of nodes and edges took away."""
    pruning = graph.metadata.get("pruning", {})
    if faithful := pruning.get("faithful"):
        measured = f"{faithful['faithfulness']:.2f}, measured on the {faithful['other_prompts']} prompts of the search"
        return [Text(f"faithfulness of the features alone {measured}; target {faithful['target']:g}")]
    if not (before := pruning.get("before_budget")):
        return []
    counts = f"{before['nodes']:,} -> {len(graph.nodes):,} nodes, {before['edges']:,} -> {len(graph.edges):,} edges"
    scores = graph.scores()
    return [
        Text(
            f"by the budget: {counts}, replacement {before['replacement']:.2f} -> {scores.replacement:.2f}, "
            f"completeness {before['completeness']:.2f} -> {scores.completeness:.2f}"
        )
    ]


def _comparison(graphs: Mapping[str, CircuitGraph]) -> Table:
    names = ("nodes", "features", "errors", "edges", "replacement", "completeness", "path length")
    return table("", *graphs, rows=zip(names, *map(_figures, graphs.values()), strict=True))


def _figures(graph: CircuitGraph) -> list[str]:
    counts, scores = graph.counts(), graph.scores()
    numbers = [f"{counts[key]:,}" for key in ("total", "features", "errors", "edges")]
    return [*numbers, f"{scores.replacement:.3f}", f"{scores.completeness:.3f}", f"{average_path_length(graph):.2f}"]


def _run(facts: Mapping[str, Any]) -> str:
    parts = [] if facts["identity_error"] is None else [f"identity error {float(facts['identity_error']):.1e}"]
    if imported := facts.get("imported"):
        parts.append(f"read from a {imported['format']}; not known: {', '.join(imported['unknown'])}")
    if "logit_gap_16bit" in facts:
        parts.append(f"logits of the model's own 16-bit arithmetic up to {facts['logit_gap_16bit']:.2g} away")
    if "stopped_by" in facts:
        parts.append(f"stopped by {facts['stopped_by']}")
    if "unexpanded_share" in facts:
        parts.append(f"{100 * facts['unexpanded_share']:.2g} % not expanded")
    if "left_out_share" in facts:
        parts.append(f"{100 * facts['left_out_share']:.2g} % left out by the graph's conventions")
    if "seconds" in facts:
        parts.append(f"{facts['seconds']:.2f} s")
    return ", ".join(parts)
