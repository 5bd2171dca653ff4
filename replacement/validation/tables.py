"""The tables of a validation as plain values: a title, a note, column heads with units, rows of texts.

The terminal, the page and the CSV files are all made of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from replacement.validation.numbers import MISSING, count, nats, one_decimal, percent, share, signed, visible
from replacement.validation.protocols import ERRORS_KEPT, PROPAGATED

Facts = dict[str, Any]
Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; the first `n_texts` columns are text, the others numbers."""

    key: str
    """Short name: of the CSV file, and of the place on the page."""
    title: str
    note: str
    heads: tuple[str, ...]
    rows: list[Row]
    n_texts: int = 1
    brief: tuple[int, ...] | None = None
    """Columns that fit a terminal; all if None."""


def tables(facts: Facts) -> list[Table]:
    """All tables, in the order of the page; those without rows are left out."""
    made = [
        _summary(facts),
        _protocols(facts),
        _layers(facts),
        _slices(facts),
        _controls(facts),
        _compute(facts),
        _worst(facts),
    ]
    return [table for table in made if table.rows]


def _summary(facts: Facts) -> Table:
    summary = facts["summary"]
    names = {
        "single": "single: one layer at a time, mean over layers",
        "clean": "clean: all layers, reading the original stream",
        "propagated": "propagated: all layers, reading their own stream",
    }
    rows: list[Row] = [
        (text, nats(summary[key]["kl"]), signed(summary[key]["cross_entropy_increase"])) for key, text in names.items()
    ]
    spread = summary["spread"]
    rows.append(("largest minus smallest", nats(spread["kl"]), nats(spread["cross_entropy_increase"])))
    verdict = "within" if summary["is_within"] else "NOT within"
    note = f"The three are {verdict} {summary['within']} nats of each other."
    return Table(
        key="summary",
        title="One layer, all layers, errors propagating",
        note=note,
        heads=("protocol", "KL, nats", "cross-entropy increase, nats"),
        rows=rows,
    )


def _protocols(facts: Facts) -> Table:
    rows = []
    for name, own in facts["protocols"].items():
        kl, agreement, recovered = own["kl"], own["agreement"], own["cross_entropy_recovered"]
        rows.append(
            (
                {"zero": "zero ablation", "mean": "mean ablation"}.get(name, name),
                signed(own["cross_entropy_increase"]),
                share(recovered.get("zero")),
                share(recovered.get("mean")),
                *(nats(kl[key]) for key in ("mean", "median", "p95", "p99", "max")),
                percent(agreement["all"]),
                percent(agreement["right_but_unsure"]),
            )
        )
    original, kept = facts["original"], facts["protocols"].get(ERRORS_KEPT)
    check = ""
    if kept is not None:
        largest = kept["kl"]["max"]
        worst = MISSING if largest is None else f"{largest:.0e}"
        check = f" With the errors kept the model is the original: largest KL {worst} in {facts['model']['dtype']}."
    return Table(
        key="protocols",
        title="Every way of replacing layers",
        note=f"{count(original['n_tokens'])} tokens; the original's cross-entropy is {nats(original['cross_entropy'])} nats. "
        f"It gets {count(original['right_but_unsure'])} of them right with p < 0.8: agreement there is in the page and in JSON."
        + check,
        heads=(
            "replaced",
            "cross-entropy increase, nats",
            "recovered against zero",
            "recovered against mean",
            "KL mean, nats",
            "median",
            "p95",
            "p99",
            "max",
            "top-1 agreement",
            "where unsure",
        ),
        rows=rows,
        brief=(0, 1, 3, 4, 7, 8, 9),
    )


def _layers(facts: Facts) -> Table:
    reconstruction = facts["reconstruction"]
    sites = reconstruction["sites"]
    groups = [group for part in reconstruction["crosscoders"] for group in part["groups"]]
    read: list[Row] = [
        (
            f"features read at layer {group['layer']}",
            MISSING,
            MISSING,
            one_decimal(group["l0"]),
            count(group["n_features"]),
            percent(group["dead"] / group["n_features"]),
            count(group["dense"]),
        )
        for group in groups
    ]
    written: list[Row] = [
        (
            f"written: {site['site']}",
            share(site["unexplained"]),
            share(site["cosine"]),
            MISSING,
            MISSING,
            MISSING,
            MISSING,
        )
        for site in sites
    ]
    n_features = sum(group["n_features"] for group in groups)
    total = (
        "all",
        share(reconstruction["unexplained"]),
        MISSING,
        one_decimal(reconstruction["l0"]),
        count(n_features),
        percent(reconstruction["dead"] / n_features),
        count(reconstruction["dense"]),
    )
    return Table(
        key="layers",
        title="Reconstruction and features",
        note="On clean activations. Dead features never fire on these tokens, dense ones on more than 10 % of them; the "
        "unexplained variance of all sites is the sum of their squared errors over the sum of their variances.",
        heads=("layer", "variance unexplained", "cosine", "active per token", "features", "dead", "dense"),
        rows=[*_joined(written, read), total],
    )


def _joined(written: list[Row], groups: list[Row]) -> list[Row]:
    """One row per layer where every group has a site of its own, and separate rows otherwise."""
    if len(written) != len(groups):
        return [*written, *groups]
    return [
        (site[0].removeprefix("written: "), *site[1:3], *group[3:]) for site, group in zip(written, groups, strict=True)
    ]


def _slices(facts: Facts) -> Table:
    rows: list[Row] = [
        (
            row["name"],
            count(row["n_tokens"]),
            share(row["unexplained"]),
            nats(row["kl"]["mean"]),
            nats(row["kl"]["max"]),
            signed(row["gap"]["kl"]),
            signed(row["cross_entropy_increase"]),
            nats(row["kl_mean_ablation"]),
            percent(row["agreement"]),
            percent(row["accuracy_original"]),
            percent(row["accuracy"]),
        )
        for row in facts["slices"]
    ]
    return Table(
        key="slices",
        title="The whole, its parts, and what lies outside",
        note="Errors propagating; the gap is to the whole. Behaviours count the token of the answer only. Where replacing the "
        "sites by their means costs little KL, a low KL says little.",
        heads=(
            "slice",
            "tokens",
            "variance unexplained",
            "KL mean, nats",
            "KL max",
            "KL gap",
            "cross-entropy increase, nats",
            "KL of mean ablation",
            "top-1 agreement",
            "original right",
            "replacement right",
        ),
        rows=rows,
        brief=(0, 1, 3, 5, 6, 10),
    )


def _controls(facts: Facts) -> Table:
    rows: list[Row] = [
        (
            row["name"],
            one_decimal(row["l0"]),
            share(row["unexplained"]),
            nats(row["kl"]),
            signed(row["cross_entropy_increase"]),
            share(row["cross_entropy_recovered"].get("zero")),
            share(row["cross_entropy_recovered"].get("mean")),
            percent(row["agreement"]),
        )
        for row in facts["controls"]
    ]
    about = "; ".join(f"{row['name']}: {row['about']}" for row in facts["controls"][1:])
    n_tokens = count(facts["controls"][0]["n_tokens"]) if rows else ""
    return Table(
        key="controls",
        title="Controls with as many active features",
        note=f"MLP outputs only, errors propagating, {n_tokens} tokens. {about[:1].upper()}{about[1:]}.",
        heads=(
            "in place of the MLPs",
            "active per token",
            "variance unexplained",
            "KL, nats",
            "cross-entropy increase, nats",
            "recovered against zero",
            "recovered against mean",
            "top-1 agreement",
        ),
        rows=rows,
        brief=(0, 1, 2, 3, 4, 6, 7),
    )


def _compute(facts: Facts) -> Table:
    found = facts["compute_equivalent"]
    rows: list[Row] = []
    if found is not None:
        fraction = "less than the first point" if found["below_curve"] else percent(found["fraction"])
        rows = [(PROPAGATED, signed(facts["protocols"][PROPAGATED]["cross_entropy_increase"]), fraction)]
    return Table(
        key="compute",
        title="Compute-equivalent",
        note="The share of the original's training compute after which it was as good as the replacement is.",
        heads=("replaced", "cross-entropy increase, nats", "training compute"),
        rows=rows,
    )


def _worst(facts: Facts) -> Table:
    rows: list[Row] = [
        (
            " ".join(visible(word) for word in row["before"]),
            visible(row["token"]),
            visible(row["next"]),
            visible(row["original"]),
            visible(row["replacement"]),
            share(row["original_probability"]),
            nats(row["kl"]),
        )
        for row in facts["worst_tokens"]
    ]
    return Table(
        key="worst_tokens",
        title="The worst tokens",
        note="Largest KL with errors propagating, with the text before; what comes next, and what both models expect.",
        heads=("before", "token", "next", "original says", "replacement says", "p of original", "KL, nats"),
        rows=rows,
        n_texts=5,
    )
