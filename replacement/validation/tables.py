"""The tables of a validation as plain values: a title, a note, column heads with units, rows of texts.

The terminal, the page and the CSV files are all made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from replacement.token_texts import visible
from replacement.validation.protocols import CLEAN, ERRORS_KEPT, MEAN, PROPAGATED, ZERO
from replacement.validation.verdict import headline, verdicts

Facts = dict[str, Any]
Row = tuple[str, ...]
Column = tuple[str, Callable[[Facts], str]]
"""Head of a column, and its text for the facts of one row."""

MISSING = "–"


# Numbers as texts --------------------------------------------------------------------------------------------------------


def nats(value: int | float | None) -> str:
    """KL and losses: four decimals, or two digits where that would say 0."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if abs(value) >= 5e-5 or value == 0 else f"{value:.1e}"


def signed(value: int | float | None) -> str:
    """A difference, in nats."""
    return MISSING if value is None else f"{round(value, 4) + 0.0:+.4f}"  # + 0.0: no negative zero


def _writer(form: str, *, factor: float = 1.0) -> Callable[[int | float | None], str]:
    return lambda value: MISSING if value is None else form.format(factor * value)


share = _writer("{:.4f}")
count = _writer("{:,.0f}")
one_decimal = _writer("{:,.1f}")
percent = _writer("{:.1f} %", factor=100.0)


def layer_name(site: str) -> str:
    """A written site in words: `layer 2`, of attention `attention 2`."""
    part, _, layer = site.rpartition(".")
    return f"{'attention' if part.startswith('attn') else 'layer'} {layer}"


def protocol_name(name: str) -> str:
    """A protocol in words; `replacement/validation/README.md` lists their names."""
    kind, _, rest = name.partition(" ")
    if kind == "single":
        return f"{layer_name(rest)} alone"
    if kind == "first":
        return f"layers up to {int(rest.split()[0]) - 1}"
    return _PROTOCOLS.get(name, name)


_PROTOCOLS = {
    CLEAN: "all layers, reading the original stream",
    PROPAGATED: "all layers, errors propagating",
    ERRORS_KEPT: "all layers, errors added back",
    ZERO: "zero ablation",
    MEAN: "mean ablation",
}


def _token(text: Any) -> str:
    return MISSING if text is None else visible(str(text))


# Tables ------------------------------------------------------------------------------------------------------------------


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
    makers = (_verdict, _summary, _protocols, _layers, _slices, _controls, _compute, _worst)
    return [table for table in (make(facts) for make in makers) if table.rows]


_INCREASE: Column = ("cross-entropy increase, nats", lambda row: signed(row["cross_entropy_increase"]))
_RECOVERED: list[Column] = [
    ("recovered against zero", lambda row: share(row["cross_entropy_recovered"].get("zero"))),
    ("recovered against mean", lambda row: share(row["cross_entropy_recovered"].get("mean"))),
]


def _filled(columns: list[Column], rows: Iterable[Facts]) -> dict[str, Any]:
    """Heads and rows of a table, from its columns and the facts of each row."""
    return {
        "heads": tuple(head for head, _ in columns),
        "rows": [tuple(cell(row) for _, cell in columns) for row in rows],
    }


def _verdict(facts: Facts) -> Table:
    found = verdicts(facts)
    return Table(
        key="verdict",
        title="Verdict",
        note=headline(found),
        heads=("claim", "may be trusted", "measured", "rule"),
        rows=[(verdict.claim, verdict.word, verdict.measured, verdict.rule) for verdict in found],
        n_texts=4,
    )


def _summary(facts: Facts) -> Table:
    summary = facts["summary"]
    names = {
        "single": "one layer alone, mean over layers",
        "clean": protocol_name(CLEAN),
        "propagated": protocol_name(PROPAGATED),
    }
    rows: list[Row] = [
        (text, nats(summary[key]["kl"]), signed(summary[key]["cross_entropy_increase"])) for key, text in names.items()
    ]
    spread = summary["spread"]
    rows.append(("largest minus smallest", nats(spread["kl"]), nats(spread["cross_entropy_increase"])))
    verdict = "within" if summary["is_within"] else "NOT within"
    return Table(
        key="summary",
        title="One layer, all layers, errors propagating",
        note=f"The three are {verdict} {summary['within']} nats of each other.",
        heads=("protocol", "KL, nats", "cross-entropy increase, nats"),
        rows=rows,
    )


def _protocols(facts: Facts) -> Table:
    columns: list[Column] = [
        ("replaced", lambda row: protocol_name(row["name"])),
        _INCREASE,
        *_RECOVERED,
        ("KL mean, nats", lambda row: nats(row["kl"]["mean"])),
        ("median", lambda row: nats(row["kl"]["median"])),
        ("p95", lambda row: nats(row["kl"]["p95"])),
        ("p99", lambda row: nats(row["kl"]["p99"])),
        ("max", lambda row: nats(row["kl"]["max"])),
        ("top-1 agreement", lambda row: percent(row["agreement"]["all"])),
        ("where unsure", lambda row: percent(row["agreement"]["right_but_unsure"])),
    ]
    original, kept = facts["original"], facts["protocols"].get(ERRORS_KEPT)
    check = ""
    if kept is not None:
        largest = kept["kl"]["max"]
        gap = MISSING if largest is None else f"{largest:.0e}"
        check = f" With the errors kept the model is the original: largest KL {gap} in {facts['model']['dtype']}."
    return Table(
        key="protocols",
        title="Every way of replacing layers",
        note=f"{count(original['n_tokens'])} tokens; the original's cross-entropy is {nats(original['cross_entropy'])} nats. "
        f"It gets {count(original['right_but_unsure'])} of them right with p < 0.8; 'where unsure' (report and "
        "JSON) is the agreement there." + check,
        **_filled(columns, [{"name": name, **protocol} for name, protocol in facts["protocols"].items()]),
        brief=(0, 1, 3, 4, 7, 8, 9),
    )


def _layers(facts: Facts) -> Table:
    """One row per layer where every group has a site of its own, and separate rows for sites and groups otherwise."""
    reconstruction = facts["reconstruction"]
    sites = [{"name": f"written: {layer_name(site['site'])}", **site} for site in reconstruction["sites"]]
    groups = [group for part in reconstruction["crosscoders"] for group in part["groups"]]
    groups = [{"name": f"features read at layer {group['layer']}", **group} for group in groups]
    if len(sites) == len(groups):
        pairs = zip(groups, sites, strict=True)
        rows: list[Facts] = [{**group, **site, "name": layer_name(site["site"])} for group, site in pairs]
    else:
        rows = [*sites, *groups]
    n_features = sum(group["n_features"] for group in groups)
    total = {"name": "all", "n_features": n_features, **reconstruction}

    def dead(row: Facts) -> str:
        return f"{row['dead']:,} ({percent(row['dead'] / row['n_features'])})" if "dead" in row else MISSING

    columns: list[Column] = [
        ("layer", lambda row: str(row["name"])),
        ("variance unexplained", lambda row: share(row.get("unexplained"))),
        ("cosine", lambda row: share(row.get("cosine"))),
        ("active per token", lambda row: one_decimal(row.get("l0"))),
        ("features", lambda row: count(row.get("n_features"))),
        ("dead", dead),
        ("dense", lambda row: count(row.get("dense"))),
    ]
    return Table(
        key="layers",
        title="Reconstruction and features",
        note="On clean activations. Dead features never fire on these tokens, dense ones on more than 10 % of them; the "
        "unexplained variance of all sites is the sum of their squared errors over the sum of their variances.",
        **_filled(columns, [*rows, total]),
    )


def _slices(facts: Facts) -> Table:
    columns: list[Column] = [
        ("slice", lambda row: str(row["name"])),
        ("tokens", lambda row: count(row["n_tokens"])),
        ("variance unexplained", lambda row: share(row["unexplained"])),
        ("KL mean, nats", lambda row: nats(row["kl"]["mean"])),
        ("KL max", lambda row: nats(row["kl"]["max"])),
        ("KL gap", lambda row: signed(row["gap"]["kl"])),
        _INCREASE,
        ("KL of mean ablation", lambda row: nats(row["kl_mean_ablation"])),
        ("top-1 agreement", lambda row: percent(row["agreement"])),
        ("original right", lambda row: percent(row["accuracy_original"])),
        ("replacement right", lambda row: percent(row["accuracy"])),
    ]
    return Table(
        key="slices",
        title="The whole, its parts, and what lies outside",
        note="Errors propagating; the gap is to the whole. Behaviours count the token of the answer only. Where replacing the "
        "sites by their means costs little KL, a low KL says little.",
        **_filled(columns, facts["slices"]),
        brief=(0, 1, 3, 5, 6, 10),
    )


def _controls(facts: Facts) -> Table:
    columns: list[Column] = [
        ("in place of the MLPs", lambda row: str(row["name"])),
        ("active per token", lambda row: one_decimal(row["l0"])),
        ("variance unexplained", lambda row: share(row["unexplained"])),
        ("KL, nats", lambda row: nats(row["kl"])),
        _INCREASE,
        *_RECOVERED,
        ("top-1 agreement", lambda row: percent(row["agreement"])),
    ]
    about = "; ".join(f"{row['name']}: {row['about']}" for row in facts["controls"][1:])
    n_tokens = count(facts["controls"][0]["n_tokens"]) if facts["controls"] else ""
    return Table(
        key="controls",
        title="Controls with as many active features",
        note=f"MLP outputs only, errors propagating, {n_tokens} tokens. {about[:1].upper()}{about[1:]}.",
        **_filled(columns, facts["controls"]),
        brief=(0, 1, 2, 3, 4, 6, 7),
    )


def _compute(facts: Facts) -> Table:
    equivalent = facts["compute_equivalent"]
    rows: list[Row] = []
    if equivalent is not None:
        fraction = "less than the first point" if equivalent["below_curve"] else percent(equivalent["fraction"])
        rows = [(protocol_name(PROPAGATED), signed(facts["protocols"][PROPAGATED]["cross_entropy_increase"]), fraction)]
    return Table(
        key="compute",
        title="Compute-equivalent",
        note="The share of the original's training compute after which it was as good as the replacement is.",
        heads=("replaced", "cross-entropy increase, nats", "training compute"),
        rows=rows,
    )


def _worst(facts: Facts) -> Table:
    columns: list[Column] = [
        ("before", lambda row: " ".join(map(_token, row["before"]))),
        ("token", lambda row: _token(row["token"])),
        ("next", lambda row: _token(row["next"])),
        ("original says", lambda row: _token(row["original"])),
        ("replacement says", lambda row: _token(row["replacement"])),
        ("p of original", lambda row: share(row["original_probability"])),
        ("KL, nats", lambda row: nats(row["kl"])),
    ]
    return Table(
        key="worst_tokens",
        title="The worst tokens",
        note="Largest KL with errors propagating, with the text before; what comes next, and what both models expect.",
        **_filled(columns, facts["worst_tokens"]),
        n_texts=5,
    )
