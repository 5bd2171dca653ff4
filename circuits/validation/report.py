"""The page for people of what `circuits validate` says; takes the facts of `circuits.validation.validate`."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable

_ERRORS = {"keep": "error terms kept", "resample": "error terms resampled too"}


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
        removed = (
            "This graph is pruned, and what was removed is predicted to do nothing: the full graph predicts better."
        )
        parts += [Text(removed, style="bold red"), Text()]
    parts += [
        _section("Self-check, true by construction", Text(exact)),
        _section(
            "Influence against the output's KL when a feature is ablated (Spearman)",
            _ablation(facts["influence_against_ablation"]),
        ),
    ]
    parts += [
        _section(
            "Influence of features on features against the share of an activation that ablation moves (Spearman)",
            _among_features(facts["influence_among_features"]),
        ),
        _section(
            "Perturbed streams: local replacement model against the original", _perturbations(facts["perturbations"])
        ),
        _section(
            "One layer downstream: cosine of predicted and measured changes", _one_layer(facts["one_layer_cosine"])
        ),
    ]
    parts += [_section("Features ablated: predicted against measured", _effects(facts["effects"]))]
    for errors, circuit in (facts["circuit"] or {}).items():
        title = f"Circuit alone and model without it, {circuit['other_prompts']} prompts resampled, {_ERRORS[errors]}"
        parts += [_section(title, _circuit(circuit))]
    return Group(*parts, _section("Paths", Text(shape)))


def _ablation(rows: list[dict[str, Any]]) -> Table:
    table = _table("patching", "patterns", "Spearman")
    for row in rows:
        table.add_row(row["patching"], row["patterns"], _number(row["spearman"]))
    return table


def _among_features(rows: list[dict[str, Any]]) -> Table:
    table = _table("patterns", "pairs", "Spearman")
    for row in rows:
        table.add_row(row["patterns"], f"{row['pairs']:,}", _number(row["spearman"]))
    return table


def _perturbations(rows: list[dict[str, Any]]) -> Table:
    table = _table("kind", "patterns", "layers", "perturbations", "cosine", "NMSE", "cosine of what layers add")
    for row in rows:
        figures = (_number(row[name]) for name in ("cosine", "nmse", "cosine_added"))
        table.add_row(row["kind"], row["patterns"], str(row["distance"]), str(row["perturbations"]), *figures)
    return table


def _one_layer(rows: list[dict[str, Any]]) -> Table:
    table = _table("change", "patterns", "norms", "features", "cosine", "median", "larger half", "all of the layer")
    for row in rows:
        figures = (_number(row[name]) for name in ("cosine", "median", "larger_half", "all_features"))
        table.add_row(row["change"], row["patterns"], row["norms"], str(row["features"]), *figures)
    return table


def _effects(rows: list[dict[str, Any]]) -> Table:
    table = _table("patching", "patterns", "layers", "pairs", "Spearman", "Pearson", "cosine", "NMSE")
    for row in rows:
        if row["change"] == "ablated":
            figures = (_number(row[name]) for name in ("spearman", "pearson", "cosine", "nmse"))
            table.add_row(row["patching"], row["patterns"], row["distance"], f"{row['pairs']:,}", *figures)
    return table


def _circuit(circuit: dict[str, Any]) -> Group:
    table = _table("share", "features", "faithfulness", "necessity")
    for row in circuit["sizes"]:
        table.add_row(
            f"{row['share']:g}", str(row["features"]), *(_number(row[n]) for n in ("faithfulness", "necessity"))
        )
    pruned = circuit["pruned"]
    table.add_row("pruned", str(pruned["features"]), *(_number(pruned[n]) for n in ("faithfulness", "necessity")))
    return Group(table, Text(f"CPR {_number(circuit['cpr'])}, CMD {_number(circuit['cmd'])}"))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _section(title: str, body: RenderableType) -> Group:
    return Group(Text(title, style="bold blue"), Padding(body, (0, 0, 1, 2), expand=False))


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        left = name in ("patching", "patterns", "norms", "change", "kind")
        table.add_column(name, justify="left" if left else "right")
    return table
