"""The plots of a validation, light and plain; each is a function of the facts that returns a figure, or None without data."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from replacement.validation.protocols import CLEAN, ERRORS_KEPT, MEAN, PROPAGATED, ZERO, single
from replacement.validation.tables import layer_name, nats, percent, protocol_name

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "validation",
}
BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#9aa5b1"
_LOWEST_KL = 1e-8
_DPI = 170

Facts = dict[str, Any]


def plots(facts: Facts) -> dict[str, Figure]:
    """Every plot that has data, by name."""
    controls = [(row["name"], row["kl"]) for row in facts["controls"]]
    with matplotlib.rc_context(STYLE):
        figures = {
            "layers": _layers(facts),
            "protocols": _protocols(facts),
            "slices": _slices(facts),
            "controls": _points(controls, "mean KL, nats, as many active features"),
            "compute": _compute(facts),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _drawn(value: int | float | None) -> float:
    """A KL on a logarithmic axis: 0 at its lower end, and nothing for one that is not defined or infinite."""
    return math.nan if value is None else max(value, _LOWEST_KL)


def as_file(figure: Figure, kind: str) -> bytes:
    """An `svg` file, the same for the same figure, or a `png` file."""
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": _DPI}
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def _layers(facts: Facts) -> Figure:
    """Unexplained variance of every site; KL of each layer alone and of the first k together."""
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    sites = facts["reconstruction"]["sites"]
    left.bar(
        [layer_name(row["site"]) for row in sites], [row["unexplained"] or 0 for row in sites], color=BLUE, width=0.6
    )
    left.set_title("variance unexplained", loc="left", fontsize=9.5)
    left.tick_params(axis="x", rotation=30 if len(sites) > 4 else 0)
    left.grid(axis="x", visible=False)
    together = [(row["layers"] - 1, row["kl"]) for row in facts["summary"]["first_layers"]]
    alone = [(site["layer"], facts["protocols"][single(site["site"])]["kl"]["mean"]) for site in sites]
    for points, text, colour, marker in (
        (together, "all layers up to this one", BLUE, "-o"),
        (alone, "this layer alone", ORANGE, "s"),
    ):
        known = [(layer, kl) for layer, kl in points if kl is not None]
        if known:
            right.plot(*zip(*known, strict=True), marker, color=colour, ms=4)
            offset, anchor = ((0, 7), "bottom") if points is together else ((0, -7), "top")
            style = {"textcoords": "offset points", "color": colour, "ha": "right", "va": anchor, "fontsize": 8.5}
            right.annotate(text, max(known), offset, **style)
    right.set_title("KL, nats", loc="left", fontsize=9.5)
    right.set_xlabel("layer")
    right.set_xticks([layer for layer, _ in together])
    right.set_ylim(bottom=0)
    right.margins(x=0.06, y=0.25)
    return figure


def _protocols(facts: Facts) -> Figure:
    """Median to 99th percentile and maximum of KL, for every way of replacing that is not an ablation."""
    left_out = (ZERO, MEAN, ERRORS_KEPT)
    rows = [(name, output["kl"]) for name, output in facts["protocols"].items() if name not in left_out]
    figure = Figure(figsize=(8.6, 0.8 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, kl) in enumerate(reversed(rows)):
        low, p95, p99, top, mean = (_drawn(kl[key]) for key in ("median", "p95", "p99", "max", "mean"))
        colour = BLUE if name in (CLEAN, PROPAGATED) else GREY
        axes.plot([low, p99], [place, place], color=colour, lw=2)
        axes.plot([low, p95, p99], [place] * 3, "|", color=colour, ms=9, mew=2)
        axes.plot(mean, place, "o", color=colour, ms=5)
        axes.plot(top, place, "x", color=colour, ms=5)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [protocol_name(name) for name, _ in reversed(rows)])
    axes.set_xlabel("KL per token, nats (logarithmic axis):  | median, p95, p99   ● mean   × maximum")
    axes.grid(axis="y", visible=False)
    return figure


def _slices(facts: Facts) -> Figure | None:
    rows = [(row["name"], row["kl"]["mean"]) for row in facts["slices"]]
    figure = _points(rows, "mean KL, nats, errors propagating")
    if figure is not None and rows[0][1] is not None:
        figure.axes[0].axvline(_drawn(rows[0][1]), color="#555555", lw=0.8, ls=":")
    return figure


def _points(rows: list[tuple[str, int | float | None]], title: str) -> Figure | None:
    """Points on a logarithmic axis, the first of them in colour; bars would have no length there, for want of a zero."""
    if not rows:
        return None
    figure = Figure(figsize=(8.6, 0.75 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [_drawn(value) for _, value in rows]
    known = [value for value in values if not math.isnan(value)] or [1.0]
    for place, value in enumerate(values):
        axes.plot(value, place, "o", color=GREY if place else BLUE, ms=7)
        if not math.isnan(value):
            look: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
            axes.annotate(nats(rows[place][1]), (value, place), (9, 0), **look)
    axes.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name, _ in rows])  # no dollar sign starts a formula
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(known) / 2, max(known) * 3)
    axes.set_xlabel(f"{title} (logarithmic axis)")
    return figure


def _compute(facts: Facts) -> Figure | None:
    equivalent = facts["compute_equivalent"]
    if equivalent is None:
        return None
    figure = Figure(figsize=(8.6, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*equivalent["curve"], strict=True), "-o", color=GREY, ms=3)
    axes.axhline(equivalent["target_loss"], color=BLUE, lw=1.2)
    if equivalent["compute"] is not None:
        axes.plot(equivalent["compute"], equivalent["target_loss"], "o", color=BLUE, ms=6)
        axes.annotate(
            f"replacement: {percent(equivalent['fraction'])} of the compute",
            (equivalent["compute"], equivalent["target_loss"]),
            xytext=(-6, 55),  # a training curve falls to the right: there is room above its end
            textcoords="offset points",
            ha="right",
            color=BLUE,
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.8},
        )
    axes.set_xscale("log")
    axes.set_xlabel("training compute of the original")
    axes.set_title("cross-entropy, nats", loc="left", fontsize=9.5)
    return figure
