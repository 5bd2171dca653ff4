"""What all pictures of a circuit share: colours that colour-blind readers and grey print tell apart, and rows."""

from __future__ import annotations

import numpy as np

from circuits.graph.nodes import NodeKind, NodeTable

# kind -> (fill, outline, text)
NODE_COLOURS: dict[NodeKind, tuple[str, str, str]] = {
    NodeKind.TOKEN: ("#eef1f5", "#8a94a3", "#1f2933"),
    NodeKind.POSITION: ("#f7f8fa", "#b4bcc8", "#4b5563"),
    NodeKind.ERROR: ("#c9ced6", "#9aa3af", "#4b5563"),
    NodeKind.FEATURE: ("#ffffff", "#b4bcc8", "#4b5563"),
    NodeKind.LOGIT: ("#fdf1cf", "#b98900", "#3d2f00"),
}
# shape of the mark that tells what a node is, as in the viewer
MARKS: dict[NodeKind, str] = {
    NodeKind.TOKEN: "square",
    NodeKind.POSITION: "square",
    NodeKind.ERROR: "diamond",
    NodeKind.FEATURE: "circle",
    NodeKind.LOGIT: "square",
}
ATTENTION_MARK = "triangle"
"""The same of features of attention."""
SYMBOLS = {"circle": "●", "triangle": "▲", "square": "■", "diamond": "◆"}
"""Marks as text."""
PATH_COLOURS = ("#fff9e8", "#1f2933", "#1f2933")
"""The same of features on the strongest paths."""
FAINTEST = 0.2
"""How much of its colours a node has that no pruning threshold keeps."""
INCLUSION_NOTE = "the paler, the fewer pruning thresholds keep it"
INK, GREY = "#1f2933", "#6b7280"

LEAST_SHARE = 0.25
"""Smallest part of an edge that a head is named for."""
HEADS_PER_EDGE = 2

# weight > 0 -> colour: Okabe and Ito's blue and vermilion.
EDGE_COLOURS = {True: "#0072b2", False: "#d55e00"}
QUIET_COLOURS = {True: "#a9c8de", False: "#ecb48f"}
"""The same of edges beside the strongest paths."""


def box_colours(kind: NodeKind, *, on_path: bool = False, inclusion: float | None = None) -> tuple[str, str, str]:
    """Fill, outline and text of a node; fill and outline at the opacity that an inclusion frequency stands for, on white paper.

    They are mixed with white instead of transparent, so that no line shows through a box and its text can be read.
    """
    fill, outline, text = PATH_COLOURS if on_path and kind is NodeKind.FEATURE else NODE_COLOURS[kind]
    if inclusion is None:
        return fill, outline, text
    if kind is NodeKind.FEATURE and not on_path:
        outline = GREY  # dark enough to fade
    opacity = FAINTEST + (1 - FAINTEST) * inclusion

    def mixed(colour: str) -> str:
        channels = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        return "#" + "".join(f"{round(255 - opacity * (255 - channel)):02x}" for channel in channels)

    return mixed(fill), mixed(outline), text


def link_width(strength: float, *, on_path: bool) -> float:
    """Width of a line in pixels; `strength` in 0..1 is relative to the strongest of the paths, or of the other links."""
    return 2.2 + 2.8 * strength if on_path else 0.7 + 1.1 * strength


def picture_rows(nodes: NodeTable) -> np.ndarray:
    """int64[N], row of each node in a picture, upwards: inputs -1, then attention and MLP of each layer in turn.

    Logits have the row after the last layer's.
    """
    layer = nodes.layer.astype(np.int64)
    return np.where(layer < 0, -1, 2 * layer + (~nodes.of_attention & (nodes.kind != NodeKind.LOGIT)))


def row_title(row: int) -> str:
    """What the row of features is called at its left."""
    return "input" if row < 0 else f"layer {row // 2}" if row % 2 else f"attention {row // 2}"
