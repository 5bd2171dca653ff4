"""The page for people of what `circuits validate` says; takes the facts of `circuits.validation.validate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from circuits.graph.text import printable
from replacement import console

NO_FIGURE = "–"
_ERRORS = {"keep": "error terms kept", "resample": "error terms resampled too"}
_TEXTS = ("patching", "patterns", "norms", "change", "kind", "class", "place", "order")
_HEADS = {
    "distance": "layers",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "nmse": "NMSE",
    "cosine_added": "cosine of what layers add",
    "larger_half": "larger half",
    "all_features": "all of the layer",
    "kl": "KL, nats",
    "of_active": "of the active",
    "cpr": "CPR",
    "cmd": "CMD",
    "circuit_nodes": "in circuit",
    "circuit_edges": "in circuit",
    "nodes_influence": "influence",
    "edges_influence": "influence",
    "same_answers": "same answer",
    "equal_tokens": "equal tokens",
    "influence_kept": "influence",
    "influence_active": "influence",
    "influence_matched": "influence",
    "edges_kept": "edges kept",
    "edge_influence_kept": "influence",
    "share": "influence kept",
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
        "patching patterns norms distance pairs spearman pearson cosine nmse",
    ),
}
"""Title and columns of the sections that are tables, by their key in the facts."""


def page(facts: Mapping[str, Any]) -> Group:
    """Every figure but those of doubled features and, away from logits, of norms held, which JSON holds too."""
    check = facts["self_check"]
    exact = f"{check['edges']:,} direct edges with everything frozen: off by {check['relative_error']:.1e} (relative)"
    shape = (
        f"average path length {facts['average_path_length']:.2f}; "
        f"hop fidelity {figure(facts['hop_fidelity'])} (share of the inputs' influence that passes through a feature)"
    )
    sampled = f"{facts['features']} features, {facts['sampling']}, seed {facts['seed']}; {facts['prediction']}"
    parts: list[RenderableType] = [Text(printable(facts["prompt"]), style="bold"), Text(sampled), Text()]
    if facts["is_pruned"]:
        removed = "This graph is pruned, and removed edges are predicted to do nothing: the full graph predicts better."
        parts += [Text(removed, style="bold red"), Text()]
    sections: list[tuple[str, RenderableType]] = [
        ("In short", console.table("question", "figure", rows=in_short(facts), texts=("question",)))
    ]
    sections.append(("Self-check, true by construction", Text(exact)))
    for key, (title, columns) in _SECTIONS.items():
        sections.append((title, _rows([row for row in facts[key] if key != "effects" or _is_shown(row)], columns)))
    for errors, circuit in (facts["circuit"] or {}).items():
        title = f"Circuit alone and model without it, {circuit['other_prompts']} prompts resampled, {_ERRORS[errors]}"
        sections.append((title, _circuit(circuit)))
    sections += _robustness(facts["robustness"])
    sections.append(("Paths", Text(shape)))
    return Group(*parts, *(console.section(title, body) for title, body in sections))


def in_short(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line for each question that the tables below answer; those without a figure are left out."""
    whole = {"change": "ablated", "norms": "live", "distance": "logits"}
    alone = (facts["circuit"] or {}).get("keep", {}).get("pruned", {})
    core = next((row for row in facts["robustness"]["thresholds"]["classes"] if row["class"] == "core"), None)
    lines = {
        "edges against the model with everything frozen, relative error": f"{facts['self_check']['relative_error']:.0e}",
        "predicted effects on the answer, all else and attention held (Spearman)": _found(
            facts["effects"], "spearman", **whole, patching="constrained", patterns="frozen"
        ),
        "the same in the original model, everything live": _found(
            facts["effects"], "spearman", **whole, patching="original", patterns="live"
        ),
        "influence against what ablation does to the output there": _found(
            facts["influence_against_ablation"], "spearman", patching="original", patterns="live"
        ),
        "the pruned circuit alone: faithfulness (1: all it takes)": figure(alone.get("faithfulness")),
        "the model without it: necessity (1: nothing is left)": figure(alone.get("necessity")),
        "nodes kept at every pair of pruning thresholds: influence": figure(core and core["nodes_influence"]),
    }
    return [(question, shown) for question, shown in lines.items() if shown != NO_FIGURE]


def _found(rows: Iterable[Mapping[str, Any]], key: str, **where: str) -> str:
    """The figure of the row that has these values; none if there is no such row."""
    fitting = [row[key] for row in rows if where.items() <= row.items()]
    return figure(fitting[0] if fitting else None)


def _robustness(facts: Mapping[str, Any]) -> list[tuple[str, RenderableType]]:
    """What of the circuit survives other thresholds, prompts and crosscoders; the latter two where they were given."""
    grid, kinds, crosscoder = facts["thresholds"], facts["prompts"], facts["crosscoder"]
    tried = "; ".join(f"{name} {', '.join(f'{share:g}' for share in grid[name])}" for name in ("nodes", "edges"))
    rarely = f"at {100 * grid['noise']:.0f} % of the pairs or fewer"
    meaning = f"core: kept at every pair of thresholds; noise: {rarely}. Tried: {tried}"
    shares = "kept influence_kept active influence_active edges_kept edge_influence_kept overlap"
    sections: list[tuple[str, RenderableType]] = [
        (
            "Robustness: pruning thresholds",
            Group(
                _rows(grid["classes"], "class nodes circuit_nodes nodes_influence edges circuit_edges edges_influence"),
                Text(meaning),
            ),
        )
    ]
    if kinds:
        places = [
            row
            | {"kind": kind["kind"], "share": row["influence_kept"] / row["influence"] if row["influence"] else None}
            for kind in kinds
            for row in kind["places"]
        ]
        sections += [
            (
                "Robustness: share of the circuit that is in the circuits of other prompts",
                _rows(kinds, f"kind prompts same_answers equal_tokens {shares}"),
            ),
            (
                "The same by place, relative to the words that differ (sums over the prompts)",
                _rows(places, "kind place layer features active kept share"),
            ),
        ]
    if crosscoder:
        title = "Robustness: share of the circuit that another crosscoder's has, by features that are alike"
        sections.append((title, _rows([crosscoder], f"features likeness matched influence_matched {shares}")))
    return sections


def _rows(rows: list[dict[str, Any]], keys: str) -> Table:
    """A table with one line per row and one column per key."""
    columns = keys.split()
    heads = (_HEADS.get(key, key) for key in columns)
    return console.table(*heads, rows=(_row(row, *columns) for row in rows), texts=_TEXTS)


def _is_shown(row: Mapping[str, Any]) -> bool:
    return row["change"] == "ablated" and (row["norms"] == "live" or row["distance"] == "logits")


def _circuit(circuit: dict[str, Any]) -> Group:
    """Circuits of a tenth of the features and more; JSON holds the smaller ones too."""
    orders = circuit["orders"]
    rows = [row | {"order": order} for order in orders for row in orders[order]["sizes"] if row["share"] >= 0.1]
    rows += [circuit["graph"] | {"order": "in the graph"}, circuit["pruned"] | {"order": "in the pruned graph"}]
    shown = [row | {"of_active": row["share"]} for row in rows]
    areas = [{"order": order, **{name: figures[name] for name in ("cpr", "cmd")}} for order, figures in orders.items()]
    return Group(_rows(shown, "order features of_active kl faithfulness necessity"), _rows(areas, "order cpr cmd"))


def _row(row: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Cells of a row: texts as they are, counts with separators, figures with three decimals."""
    cells = (row[name] for name in names)
    return tuple(
        f"{cell:,}" if isinstance(cell, int) else cell if isinstance(cell, str) else figure(cell) for cell in cells
    )


def figure(value: float | None) -> str:
    """Three decimals, or powers of ten from 10,000 on; a dash for what does not exist."""
    if value is None:
        return NO_FIGURE
    return f"{value:.1e}" if abs(value) >= 1e4 else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no -0.000
