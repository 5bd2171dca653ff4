"""A head view as a picture: heads x source positions, coloured by what each contributes to the feature's pre-activation.

The last row is the direct path, which no head carries: it comes from the feature's own position alone.
"""

from __future__ import annotations

import io
import os
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from circuits.graph.text import shorten
from replacement.files import check_file, checked_path, write_atomic
from replacement.token_texts import visible

if TYPE_CHECKING:
    from circuits.heads.feature_heads import HeadView

FORMATS = (".svg", ".png")
DPI = 100
LEAST_ROW = 0.01
"""Heads with less of the summed magnitudes are not drawn."""
MOST_ROWS = 32
MOST_COLUMNS = 64
"""Longer prompts show the positions that contribute most."""
_PLACEHOLDER = "□"
"""Stands in a .png for a character that no font of matplotlib's has; an .svg keeps the character for the viewer's fonts."""
_CELL = (0.36, 0.27)  # inches


def plot_heads(view: HeadView, path: str | os.PathLike[str]) -> Path:
    """Draw a head view; the title says what share of the heads' summed magnitudes is not shown.

    Args:
        path: `.svg` or `.png` file; missing folders are made.

    Raises:
        ValueError: another kind of file, or one that cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    check_picture(path)
    heads, positions = _shown(view)
    cells_RC = view.heads_LHT[tuple(zip(*heads, strict=True))][:, positions] if heads else np.zeros((0, len(positions)))
    size = float(np.abs(view.heads_LHT).sum())
    hidden = 1 - float(np.abs(cells_RC).sum()) / size if size else 0.0
    direct_C = np.where(np.array(positions) == view.feature.position, view.direct, np.nan)
    cells_RC = np.vstack([cells_RC, direct_C])
    with mpl.rc_context({"svg.hashsalt": "circuits", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(
            figsize=(2.6 + _CELL[0] * max(8, len(positions)), 1.9 + _CELL[1] * max(2, len(heads) + 1)), dpi=DPI
        )
        axes = figure.add_subplot()
        limit = max(float(np.nanmax(np.abs(cells_RC))), 1e-12)
        image = axes.imshow(cells_RC, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_facecolor("#f0f0f0")  # where the direct path has no cell
        axes.axhline(len(heads) - 0.5, color="#555555", lw=0.8)
        figure.colorbar(image, ax=axes, label="to the pre-activation", pad=0.02)
        rows = [f"L{layer}H{head}  {view.heads_LH[layer, head]:+.3g}" for layer, head in heads]
        rows.append(f"direct  {view.direct:+.3g}")
        axes.set_yticks(range(len(rows)), rows)
        kind = Path(path).suffix.lower().lstrip(".")
        drawn = drawable if kind == "png" else str
        columns = [f"{shorten(drawn(visible(view.tokens[t])), 14)} {t}" for t in positions]
        for label in axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor"):
            label.label1.set_parse_math(False)  # a token may hold dollar signs
        axes.set_title(drawn(_title(view, hidden)), loc="left", fontsize=9, parse_math=False)
        if positions and int(positions[-1]) == view.feature.position:
            axes.get_xticklabels()[-1].set_fontweight("bold")
        content = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with warnings.catch_warnings():  # matplotlib measures the text of an .svg, too, with fonts of its own
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
            figure.savefig(content, format=kind, bbox_inches="tight", dpi=DPI, metadata=metadata)
    return write_atomic(path, content.getvalue())


def drawable(text: str) -> str:
    """Text that matplotlib's fonts can draw: format characters they lack are left out, others become a placeholder."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    held: set[int] = {ord("\n")}
    for family in FontProperties().get_family():
        fonts = [findfont(FontProperties(family=family, weight=weight)) for weight in ("normal", "bold")]
        held |= set.intersection(*(set(get_font(font).get_charmap()) for font in fonts))
    stand_in = _PLACEHOLDER if ord(_PLACEHOLDER) in held else "?"
    shown = (character for character in text if ord(character) in held or unicodedata.category(character) != "Cf")
    return "".join(character if ord(character) in held else stand_in for character in shown)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raise `ValueError`, before the work is done, for a file that `plot_heads` cannot write."""
    if checked_path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a file that ends in {' or '.join(FORMATS)}")
    check_file(path)


def _shown(view: HeadView) -> tuple[list[tuple[int, int]], list[int]]:
    """Heads with a visible share, in order of layers, and positions, in order of the prompt."""
    size_LH = np.abs(view.heads_LHT).sum(-1)
    strongest = sorted(view.players, key=lambda head: -size_LH[head])[:MOST_ROWS]
    heads = sorted(head for head in strongest if size_LH[head] > 0 and size_LH[head] >= LEAST_ROW * size_LH.sum())
    size_T = np.abs(view.heads_LHT).sum((0, 1))[: view.feature.position + 1]
    size_T[view.feature.position] = np.inf  # its own position has the direct path
    return heads, np.sort(np.argsort(-size_T, kind="stable")[: MOST_COLUMNS if heads else 1]).tolist()


def _title(view: HeadView, hidden: float) -> str:
    feature = view.feature
    name = f"{'attention ' if feature.part == 'attention' else ''}feature {feature.layer}/{feature.index}"
    token = shorten(visible(view.tokens[feature.position]), 20)
    parts = f"heads {view.heads_LH.sum():+.3g}, direct {view.direct:+.3g}, bias {view.bias:+.3g}"
    left_out = f"; {100 * hidden:.1g} % of the heads not drawn" if hidden > 1e-6 else ""
    numbers = f"pre-activation {view.pre_activation:.3g}, threshold {view.threshold:.3g}"
    return f'{name} at {feature.position} "{token}": {numbers}\n{parts}{left_out}'
