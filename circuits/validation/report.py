"""The page for people of what `circuits validate` says; takes the facts of `circuits.validation.validate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable
from replacement import console

_ERRORS = {"keep": "error terms kept", "resample": "error terms resampled too"}
_TEXTS = ("patching", "patterns", "norms", "change", "kind")
_HEADS = {
    "distance": "layers",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "nmse": "NMSE",
    "cosine_added": "cosine of what layers add",
    "larger_half": "larger half",
    "all_features": "all of the layer",
}
"""Heads of columns that are not called as their key is."""
_SECTIONS = {
    "influence_against_ablation": (
        "Influence against the output's KL when a feature is ablated (Spearman)",
        "patching patterns spearman",
    ),
    "influence_among_features": (
        "Influence of features on features against the share of an activation that ablation moves (Spearman)",
        "patterns pairs spearman",
    ),
    "perturbations": (
        "Perturbed streams: local replacement model against the original",
        "kind patterns distance perturbations cosine nmse cosine_added",
    ),
    "one_layer_cosine": (
        "One layer downstream: cosine of predicted and measured changes",
        "change patterns norms features cosine median larger_half all_features",
    ),
    "effects": (
        "Features ablated: predicted against measured",
        "patching patterns distance pairs spearman pearson cosine nmse",
    ),
}
"""Title and columns of the sections that are tables, by their key in the facts."""


def page(facts: Mapping[str, Any]) -> Group:
    """Every figure but those of doubled features, which JSON holds too."""
    check = facts["self_check"]
    exact = f"{check['edges']:,} direct edges with everything frozen: off by {check['relative_error']:.1e} (relative)"
    shape = (
        f"average path length {facts['average_path_length']:.2f}; "
        f"hop fidelity {_number(facts['hop_fidelity'])} (share of the inputs' influence that passes through a feature)"
    )
    sampled = f"{facts['features']} features, {facts['sampling']}, seed {facts['seed']}; {facts['prediction']}"
    parts: list[RenderableType] = [Text(printable(facts["prompt"]), style="bold"), Text(sampled), Text()]
    if facts["is_pruned"]:
        removed = "This graph is pruned, and removed edges are predicted to do nothing: the full graph predicts better."
        parts += [Text(removed, style="bold red"), Text()]
    sections: list[tuple[str, RenderableType]] = [("Self-check, true by construction", Text(exact))]
    for key, (title, columns) in _SECTIONS.items():
        rows = [row for row in facts[key] if key != "effects" or row["change"] == "ablated"]
        sections.append((title, _rows(rows, columns)))
    for errors, circuit in (facts["circuit"] or {}).items():
        title = f"Circuit alone and model without it, {circuit['other_prompts']} prompts resampled, {_ERRORS[errors]}"
        sections.append((title, _circuit(circuit)))
    sections.append(("Paths", Text(shape)))
    return Group(*parts, *(console.section(title, body) for title, body in sections))


def _rows(rows: list[dict[str, Any]], keys: str) -> Table:
    """A table with one line per row and one column per key."""
    columns = keys.split()
    heads = (_HEADS.get(key, key) for key in columns)
    return console.table(*heads, rows=(_row(row, *columns) for row in rows), texts=_TEXTS)


def _circuit(circuit: dict[str, Any]) -> Group:
    heads = ("features", "faithfulness", "necessity")
    rows = [(f"{row['share']:g}", *_row(row, *heads)) for row in circuit["sizes"]]
    rows.append(("pruned", *_row(circuit["pruned"], *heads)))
    table = console.table("share", *heads, rows=rows)
    return Group(table, Text(f"CPR {_number(circuit['cpr'])}, CMD {_number(circuit['cmd'])}"))


def _row(row: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Cells of a row: texts as they are, counts with separators, figures with three decimals."""
    cells = (row[name] for name in names)
    return tuple(
        f"{cell:,}" if isinstance(cell, int) else cell if isinstance(cell, str) else _number(cell) for cell in cells
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
