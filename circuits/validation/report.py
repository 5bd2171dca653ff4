"""The page for people of what `circuits validate` says; takes the facts of `circuits.validation.validate`."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable
from replacement import console

_ERRORS = {"keep": "error terms kept", "resample": "error terms resampled too"}
_TEXTS = ("patching", "patterns", "norms", "change", "kind")
_ABLATION = {"patching": "patching", "patterns": "patterns", "spearman": "Spearman"}
_AMONG_FEATURES = {"patterns": "patterns", "pairs": "pairs", "spearman": "Spearman"}
_STREAMS = {"kind": "kind", "patterns": "patterns", "distance": "layers", "perturbations": "perturbations"}
_STREAMS |= {"cosine": "cosine", "nmse": "NMSE", "cosine_added": "cosine of what layers add"}
_ONE_LAYER = {"change": "change", "patterns": "patterns", "norms": "norms", "features": "features", "cosine": "cosine"}
_ONE_LAYER |= {"median": "median", "larger_half": "larger half", "all_features": "all of the layer"}
_EFFECTS = {"patching": "patching", "patterns": "patterns", "distance": "layers", "pairs": "pairs"}
_EFFECTS |= {"spearman": "Spearman", "pearson": "Pearson", "cosine": "cosine", "nmse": "NMSE"}


def page(facts: dict[str, Any]) -> Group:
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
    ablated = [row for row in facts["effects"] if row["change"] == "ablated"]
    sections: list[tuple[str, RenderableType]] = [
        ("Self-check, true by construction", Text(exact)),
        (
            "Influence against the output's KL when a feature is ablated (Spearman)",
            _rows(facts["influence_against_ablation"], _ABLATION),
        ),
        (
            "Influence of features on features against the share of an activation that ablation moves (Spearman)",
            _rows(facts["influence_among_features"], _AMONG_FEATURES),
        ),
        (
            "Perturbed streams: local replacement model against the original",
            _rows(facts["perturbations"], _STREAMS),
        ),
        (
            "One layer downstream: cosine of predicted and measured changes",
            _rows(facts["one_layer_cosine"], _ONE_LAYER),
        ),
        ("Features ablated: predicted against measured", _rows(ablated, _EFFECTS)),
    ]
    for errors, circuit in (facts["circuit"] or {}).items():
        title = f"Circuit alone and model without it, {circuit['other_prompts']} prompts resampled, {_ERRORS[errors]}"
        sections.append((title, _circuit(circuit)))
    sections.append(("Paths", Text(shape)))
    return Group(*parts, *(console.section(title, body) for title, body in sections))


def _rows(rows: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    """A table with one line per row; `columns` maps keys to heads."""
    table = console.table(*columns.values(), texts=_TEXTS)
    for row in rows:
        console.add_row(table, *_row(row, *columns))
    return table


def _circuit(circuit: dict[str, Any]) -> Group:
    table = console.table("share", "features", "faithfulness", "necessity")
    for row in [*circuit["sizes"], {**circuit["pruned"], "share": "pruned"}]:
        share = row["share"] if isinstance(row["share"], str) else f"{row['share']:g}"
        console.add_row(table, share, *_row(row, "features", "faithfulness", "necessity"))
    return Group(table, Text(f"CPR {_number(circuit['cpr'])}, CMD {_number(circuit['cmd'])}"))


def _row(row: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Cells of a row: texts as they are, counts with separators, figures with three decimals."""
    cells = (row[name] for name in names)
    return tuple(
        f"{cell:,}" if isinstance(cell, int) else cell if isinstance(cell, str) else _number(cell) for cell in cells
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
