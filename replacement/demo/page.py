"""What `replacement demo` prints: behaviours, feature families and fidelity, as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table

from replacement.console import pairs, section, table


def page(facts: dict[str, Any]) -> Group:
    """The page of what `measure_demo` found."""
    parts = [section(f"Behaviours ({_PROBES[facts['probes']]})", _behaviours(facts["behaviours"]))]
    if facts["families"]:
        parts.append(section("Feature families", _families(facts["families"])))
        parts.append(section("Do they do it? In the original model's run", _use(facts["families"])))
    title = f"Fidelity on {facts['fidelity']['n_tokens']:,} held-out tokens"
    parts.append(section(title, _fidelity(facts["fidelity"])))
    if facts["circuits"] is not None:
        parts.append(section("Traced by examples/two_hop.py, a table that ships", _circuits(facts["circuits"])))
    return Group(*parts)


_PROBES = {"judge": "held-out probes", "choose": "probes to choose by"}


def _behaviours(rows: list[dict[str, Any]]) -> Table:
    cells = (
        (row["name"], row["n_probes"], *(_number(row[name]) for name in ("top1", "replacement_top1")), _share(row))
        for row in rows
    )
    return table("behaviour", "probes", "model", "replacement", "share kept", rows=cells)


def _share(row: dict[str, Any]) -> str:
    return _number(row["replacement_top1"] / row["top1"] if row["top1"] else None)


def _families(rows: list[dict[str, Any]]) -> Table:
    heads = ("family", "fires at", "concepts", "F1", ">= 0.9", "the best one, and what it promotes")
    cells = (
        (
            row["name"],
            row["place"],
            row["concepts"],
            _number(row["f1"]),
            row["good_concepts"],
            _example(row["features"]),
        )
        for row in rows
    )
    return table(*heads, rows=cells, texts=("fires at", heads[-1]))


def _example(features: dict[str, dict[str, Any]]) -> str:
    concept = max(features, key=lambda name: features[name]["f1"])
    best = features[concept]
    return f"{concept}: {best['best']} → {', '.join(best['promotes'])}"


def _use(rows: list[dict[str, Any]]) -> Table:
    changes = ("swaps", "one feature", "all >= 0.9", "ablated")
    results = ("p before", "after", "control", "log odds fall", "control")
    cells = (
        (
            row["name"],
            row["swaps"]["pairs"],
            *(_number(row["swaps"][name]) for name in ("best_feature", "good_features")),
            row["ablations"]["probes"],
            *(_number(row["ablations"][f"probability_{name}"]) for name in ("none", "family", "control")),
            *(_fall(row["ablations"], name) for name in ("family", "control")),
        )
        for row in rows
    )
    return table("family", *changes, *results, rows=cells)


def _fall(ablations: dict[str, Any], name: str) -> str:
    before, after = ablations["log_odds_none"], ablations[f"log_odds_{name}"]
    return _number(None if before is None or after is None else before - after, 2)


def _fidelity(fidelity: dict[str, Any]) -> Table:
    rows = {
        "active features per token, all layers": f"{fidelity['total_l0']:.1f}",
        "variance unexplained, mean over layers": f"{fidelity['mean_unexplained']:.4f}",
        "KL, errors propagating": f"{fidelity['kl']:.4f} nats",
        "top-1 agreement where p >= 0.5": _number(fidelity["agreement"], 4),
        "top-1 agreement, all tokens": f"{fidelity['agreement_all']:.4f}",
    }
    return pairs(rows.items())


def _circuits(found: dict[str, Any]) -> Table:
    through, first, dallas = found["through_state_features"], found["first_mlp"], found["dallas"]
    where = f"of the answer's influence from a city, mean of {found['prompts']} cities"
    rows = {
        "through the state's feature": f"{_number(through['best_feature'])} {where}",
        "through its features of F1 >= 0.9": f"{_number(through['good_features'])} {where}",
        "first MLP's output at the city swapped": f"{_number(first['answer_follows'])} of {first['pairs']} answers follow",
        "the state's feature in that output": f"{_number(first['share_of_feature'])} of what it says of the state",
        "Dallas, pruned": f"{dallas['nodes']} nodes, {dallas['edges']} edges",
        "replacement, completeness": f"{_number(dallas['replacement'])}, {_number(dallas['completeness'])}",
        "strongest path": dallas["strongest_path"],
    }
    return pairs(rows.items())


def _number(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
