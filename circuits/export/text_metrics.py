"""Widths of text in a font of Helvetica's metrics (Arial, Liberation Sans, Nimbus Sans), and lines that fit a width."""

from __future__ import annotations

import unicodedata

_REGULAR = {
    191: "'", 222: "ijl", 260: "|", 278: " !,./:;I[\\]ft·", 333: "()-r`", 334: "{}", 355: '"', 389: "*", 469: "^",
    500: "Jcksvxyz", 556: "#$0123456789?L_abdeghnopqu–", 584: "+<=>~×−", 611: "FTZß", 667: "&ABEKPSVXY", 722: "CDHNRUw",
    778: "GOQ", 833: "Mm", 889: "%", 944: "W", 1000: "…—→←", 1015: "@",
}  # fmt: skip
_BOLD = {
    238: "'", 278: " ,./I\\ijl·", 280: "|", 333: "!()-:;[]ft`", 389: "*r{}", 474: '"', 500: "z",
    556: "#$0123456789J_aceksvxy–", 584: "+<=>^~×−", 611: "?FLTZbdghnopquß", 667: "EPSVXY", 722: "&ABCDHKNRU", 778: "GOQw",
    833: "M", 889: "%m", 944: "W", 975: "@", 1000: "…—→←",
}  # fmt: skip
"""Advance in thousandths of the font size -> characters."""
_WIDTHS = [{char: advance / 1000 for advance, chars in table.items() for char in chars} for table in (_REGULAR, _BOLD)]
_OTHER, _WIDE = 0.75, 1.02


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a line of text in pixels at a font size in pixels; characters outside the tables count as wide letters."""
    widths = _WIDTHS[bold]
    return size * sum(widths.get(character) or _width(character, widths) for character in text)


def _width(character: str, widths: dict[str, float]) -> float:
    base = unicodedata.normalize("NFD", character)[0]  # a letter without its accents
    if base in widths:
        return widths[base]
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0.0
    return _WIDE if unicodedata.east_asian_width(character) in "WF" else _OTHER


def fit(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """The text, or its beginning with an ellipsis, no wider than `width`."""
    width += 1e-6  # a box made for this very text must hold it
    if text_width(text, size, bold=bold) <= width:
        return text
    used = text_width("…", size, bold=bold)
    for end, character in enumerate(text):
        used += text_width(character, size, bold=bold)
        if used > width:
            return text[:end].rstrip(" ,|") + "…"
    return text


def wrap(text: str, width: float, size: float, most: int, *, bold: bool = False) -> tuple[str, ...]:
    """At most `most` lines no wider than `width`.

    A label of the form `what it fires on → what it promotes` breaks at its arrow, and other text between words; what does
    not fit ends in `…`.
    """
    if text_width(text, size, bold=bold) <= width:
        return (text,)
    before, arrow, after = text.partition(" → ")
    first, second = before.split(), after.split()
    if not arrow or not first or not second or most < 2:
        return _fill(text.split(), width, size, most, bold)
    second[0] = f"→ {second[0]}"
    n_second = len(_fill(second, width, size, most, bold))
    lines = _fill(first, width, size, max(most - n_second, 1), bold)
    return lines + _fill(second, width, size, most - len(lines), bold)


def _fill(words: list[str], width: float, size: float, most: int, bold: bool) -> tuple[str, ...]:
    """Lines filled word by word; the last one is cut where the text is longer than `most` lines."""
    lines: list[str] = []
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and text_width(" ".join(words[: count + 1]), size, bold=bold) <= width:
            count += 1
        lines.append(fit(" ".join(words[:count]), width, size, bold=bold))
        words = words[count:]
    return (*lines, fit(" ".join(words), width, size, bold=bold)) if words or not lines else tuple(lines)
