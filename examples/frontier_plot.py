"""The frontier as a picture: active features against unexplained variance, agreement and KL, one panel each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from plot_style import STYLE, save


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: str = "-"
    width: float = 1.5


LOOKS = {
    "CLT": Look("#0072b2", "o", width=2.4),
    "PLT": Look("#d55e00", "s", width=2.4),
    "tied CLT": Look("#56b4e9", "v"),
    "skip PLT": Look("#e69f00", "D"),
    "CLT BatchTopK": Look("#009e73", "^"),
    "CLT JumpReLU": Look("#cc79a7", "P"),
    "CLT ReLU + L1": Look("#7f6aa8", "X"),
    "random CLT": Look("#888888", "o", "--"),
    "neurons": Look("#222222", "s", ":"),
}
LABELS = {
    "CLT": "CLT, TopK",
    "PLT": "PLT, TopK",
    "tied CLT": "tied CLT, TopK",
    "skip PLT": "skip PLT, TopK",
    "CLT JumpReLU": "CLT, JumpReLU + tanh",
    "CLT BatchTopK": "CLT, BatchTopK",
    "CLT ReLU + L1": "CLT, ReLU + L1",
    "random CLT": "CLT, frozen random decoder",
    "neurons": "MLP neurons, thresholded",
}


class Panel(NamedTuple):
    """One measure against L0."""

    measure: str
    title: str
    best: str


PANELS = (
    Panel("unexplained", "variance unexplained", "lower is better; logarithmic axis"),
    Panel("kl", "KL from the original, nats", "lower is better; logarithmic axis"),
    Panel("agreement_all", "top-1 agreement", "higher is better; log of 1 − agreement"),
)
AGREEMENT_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def draw(rows: Sequence[dict[str, Any]], target: Path) -> None:
    """Write TARGET.svg and TARGET.png.

    Args:
        rows: of `OUT/results.json`: one per run, with `name`, `level`, `seed`, `l0` and the measures.
    """
    if not rows:
        raise ValueError("no results to draw: train the runs first")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10.5, 4.5))
        for ax, panel in zip(axes, PANELS, strict=True):
            for name, look in LOOKS.items():
                _curve(ax, [row for row in rows if row["name"] == name], panel.measure, look, name)
            _dress(ax, panel, sorted({row["level"] for row in rows}), best=max(row["agreement_all"] for row in rows))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, handlelength=2.6, columnspacing=1.6)
        figure.tight_layout(rect=(0, 0.12, 1, 1), w_pad=2.0)
        save(figure, target)


def _curve(ax: Axes, rows: Sequence[dict[str, Any]], measure: str, look: Look, name: str) -> None:
    """Mean over seeds at every level, with the range of the seeds as error bars."""
    levels = [[row for row in rows if row["level"] == level] for level in sorted({row["level"] for row in rows})]
    if not levels:
        return
    values = [[row[measure] for row in level] for level in levels]
    means = [sum(each) / len(each) for each in values]
    l0 = [sum(row["l0"] for row in level) / len(level) for level in levels]
    spread = [[m - min(v) for m, v in zip(means, values, strict=True)]]
    spread.append([max(v) - m for m, v in zip(means, values, strict=True)])
    several = any(len(each) > 1 for each in values)
    ax.errorbar(
        l0,
        means,
        yerr=spread if several else None,
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        linewidth=look.width,
        markersize=7 if look.marker in "PX" else 5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        capsize=3 if several else 0,
        elinewidth=1.2,
        label=LABELS[name],
    )


def _dress(ax: Axes, panel: Panel, levels: Sequence[int], *, best: float) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(levels)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(which="minor", length=0)
    ax.grid(visible=False, axis="x")
    if panel.measure == "agreement_all":
        # Equal distances are equal factors of disagreement.
        ax.set_yscale("function", functions=(lambda y: -np.log10(np.clip(1 - y, 1e-6, None)), lambda z: 1 - 10**-z))
        ax.set_ylim(0, 1 - 0.7 * (1 - best))
        ax.set_yticks([tick for tick in AGREEMENT_TICKS if tick <= best])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.grid(visible=True, which="minor", color="#f3f3f3", linewidth=0.5, axis="y")
    ax.set_xlabel("active features per token, all layers (L0)")
    ax.set_title(f"{panel.title}  ", loc="left", fontsize=11, fontweight="bold", color="#222222", pad=18)
    ax.text(0, 1.02, panel.best, transform=ax.transAxes, fontsize=9, color="#777777")
