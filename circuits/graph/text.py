"""Text of nodes for people: readable names, and characters that every file format can hold."""

from __future__ import annotations

import re
import unicodedata

from circuits.graph.nodes import NodeKind, NodeTable
from replacement.token_texts import MARKS, quoted, visible

_FEATURE = re.compile(r"(?:(feature|attention):)?(\d{1,40})/(\d{1,40})(?:@(-?\d{1,40}))?")
_UNPRINTABLE = {"Cc", "Cs", "Cn", "Co"}
_REORDERING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # would turn text around them


def printable(text: str) -> str:
    """Text for XML, DOT and screens: line ends and tabs as symbols, without other control characters or surrogates."""
    shown = (MARKS.get(character, character) for character in text if character not in _REORDERING)
    return "".join(character for character in shown if unicodedata.category(character) not in _UNPRINTABLE)


def shorten(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something was cut: between words, if the part that is kept
    is more than half of that long."""
    if len(text) <= length:
        return text
    kept = text[: max(length - 1, 0)]
    whole = kept if text[len(kept)].isspace() else kept.rpartition(" ")[0]
    return (whole if len(whole) > length / 2 else kept).rstrip(" …") + "…"


def slug(text: str) -> str:
    """A file-name part from any text: lower-case words joined by dashes, at most 48 characters, never empty."""
    words = "-".join(re.findall(r"[a-z0-9]+", text.lower()))
    return words[:48].strip("-") or "circuit"


def parse_feature_name(text: str) -> tuple[str, int, int, int]:
    """Part, layer, index and position of a feature named `2/345@7` (layer/index@position) or `attention:2/345@7`; without a
    position, -1: the last one.

    Raises:
        ValueError: another form.
    """
    match = _FEATURE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"expected the name of a feature such as 2/345@7 or attention:2/345@7, got {shorten(text, 60)!r}"
        )
    prefix, layer, index, position = match.groups()
    return "attention" if prefix == "attention" else "mlp", int(layer), int(index), int(position or -1)


def head_name(layer: int, head: int, *, heads: str = "original") -> str:
    """`L2H3`, or `L2Q3` for a query-key group of the low-rank sparse attention that has `replaced` the heads."""
    return f"L{layer}{'H' if heads == 'original' else 'Q'}{head}"


def short_name(nodes: NodeTable, row: int) -> str:
    """What fits on a node: a token's text (in quotes if it is a sign such as `?`), a feature's label or else its index."""
    kind, label = NodeKind(int(nodes.kind[row])), nodes.label[row]
    if kind is NodeKind.FEATURE:
        return printable(label).strip() or f"#{nodes.index[row]}"
    if kind is NodeKind.POSITION:
        return f"pos {nodes.position[row]}"
    if kind is NodeKind.ERROR:
        return "error"
    return quoted(visible(label)) if label else f"token {nodes.index[row]}"


def full_name(nodes: NodeTable, row: int) -> str:
    """The node in words, for tooltips and path descriptions."""
    kind, label = NodeKind(int(nodes.kind[row])), printable(nodes.label[row])
    position, layer, index = int(nodes.position[row]), int(nodes.layer[row]), int(nodes.index[row])
    part = "attention " if nodes.of_attention[row] else ""
    if kind is NodeKind.FEATURE:
        return f"{part}feature {layer}/{index} at {position}" + (f" ({label.strip()})" if label.strip() else "")
    if kind is NodeKind.POSITION:
        return f"position {position}"
    if kind is NodeKind.ERROR:
        return f"{part}error of layer {layer} at {position}"
    if kind is NodeKind.LOGIT:
        chance = f" (p={nodes.probability[row]:.3f})" if nodes.probability[row] > 0 else ""
        return f'output "{visible(nodes.label[row])}"{chance}' if label else f"output {index}{chance}"
    return f'token "{visible(nodes.label[row])}" at {position}' if label else f"token {index} at {position}"
