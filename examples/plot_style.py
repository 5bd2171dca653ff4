"""One look for all plots: light, plain, readable at the width of a web page."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.figure import Figure

from replacement.validation import plots

matplotlib.use("Agg")

STYLE = plots.STYLE | {
    "grid.linewidth": 0.8,
    "axes.facecolor": "white",
    "svg.hashsalt": "frontier",
}
"""Settings for `pyplot.rc_context`."""


def save(figure: Figure, target: Path) -> None:
    """Write TARGET.svg, text as paths and without a date, and TARGET.png; closes the figure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(target.with_suffix(".png"), dpi=190)
    pyplot.close(figure)
