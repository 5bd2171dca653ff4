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
_SEPARATORS = " ,|"
_STICKY = ("|", "…", "×")
WIDEST_WORD = 240.0
"""Pixels of a word that is still kept in one line."""


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
    """The text, or its beginning with an ellipsis, no wider than `width`: cut between words, or inside the first one where
    that is too long already."""
    width += 1e-6  # a box made for this very text must hold it
    if text_width(text, size, bold=bold) <= width:
        return text
    room, end = width - text_width(" …", size, bold=bold), 0
    while end < len(text) and (room := room - text_width(text[end], size, bold=bold)) >= 0:
        end += 1
    words = text[: end + 1].rpartition(" ")[0].rstrip(_SEPARATORS)
    return f"{words} …" if words else f"{text[:end]}…"


def wrap(text: str, width: float, size: float, most: int, *, bold: bool = False) -> tuple[str, ...]:
    """At most `most` lines no wider than `width`, or than their only word. No word is cut; what does not fit ends in ` …`.

    A label of the form `what it fires on → what it promotes` breaks at its arrow, and other text between words. A word wider
    than `WIDEST_WORD` goes on in the next line.
    """
    before, arrow, after = text.partition(" → ")
    first, second = _words(before, width, size, bold), _words(after, width, size, bold)
    if not arrow or not first or not second or most < 2 or text_width(text, size, bold=bold) <= width:
        return _cut(_fill(_words(text, width, size, bold), width, size, bold), width, size, most, bold)
    promoted = _fill([f"→ {second[0]}", *second[1:]], width, size, bold)
    lines = _cut(_fill(first, width, size, bold), width, size, max(most - len(promoted), 1), bold)
    return lines + _cut(promoted, width, size, most - len(lines), bold)


def _words(text: str, width: float, size: float, bold: bool) -> list[str]:
    """The words of a text, those wider than any line in parts; signs stay with the word in front of them."""
    words: list[str] = []
    for word in text.split():
        if words and word.strip('"') in _STICKY:
            words[-1] += f" {word}"
            continue
        while text_width(word, size, bold=bold) > max(width, WIDEST_WORD):
            end = max(len(fit(word, max(width, WIDEST_WORD), size, bold=bold)) - 1, 1)
            words.append(word[:end])
            word = word[end:]
        words.append(word)
    return words


def _fill(words: list[str], width: float, size: float, bold: bool) -> list[str]:
    """Lines filled word by word."""
    lines: list[str] = []
    for word in words:
        if lines and text_width(f"{lines[-1]} {word}", size, bold=bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _cut(lines: list[str], width: float, size: float, most: int, bold: bool) -> tuple[str, ...]:
    """The first lines; where others follow, as many words of the last one as leave room for an ellipsis."""
    if len(lines) <= most:
        return tuple(lines)
    words = lines[most - 1].split(" ")
    while len(words) > 1 and text_width(" ".join([*words, "…"]), size, bold=bold) > width:
        words.pop()
    return (*lines[: most - 1], " ".join(words).rstrip(_SEPARATORS) + " …")
