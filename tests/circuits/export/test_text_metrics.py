"""Widths against the font metrics of Helvetica, and lines that fit."""

from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.export.text_metrics import WIDEST_WORD, fit, text_width, wrap

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "pdfcorefonts"


@pytest.mark.parametrize(("name", "bold"), [("Helvetica", False), ("Helvetica-Bold", True)])
def test_widths_are_those_of_the_font(name, bold) -> None:
    lines = (FONTS / f"{name}.afm").read_text(encoding="latin-1").splitlines()
    metrics = [line.split() for line in lines if line.startswith("C ")]
    advances = {int(code): float(advance) for _, code, _, _, advance, *_ in metrics if 32 <= int(code) < 127}
    advances.pop(39), advances.pop(96)  # there these two codes are curly quotes
    assert len(advances) == 93
    for code, advance in advances.items():
        assert text_width(chr(code), 1000.0, bold=bold) == pytest.approx(advance), chr(code)


def test_characters_outside_the_font() -> None:
    assert text_width("é", 10.0) == text_width("e", 10.0)
    assert text_width("e\u0301", 10.0) == text_width("e", 10.0), "an accent that is combined"
    assert text_width("中", 10.0) > text_width("Ж", 10.0) > text_width("a", 10.0)


@given(
    st.text() | st.lists(st.text("abcij", min_size=1), min_size=2).map(" ".join),
    st.floats(10.0, 300.0),
    st.integers(1, 4),
)
def test_no_word_is_cut(text, width, most) -> None:
    """Lines hold the first words whole, and ` …` where others follow; they are as wide as told, or as their only word."""
    lines = wrap(text, width, 12.0, most)
    assert 1 <= len(lines) <= most
    said, words = " ".join(lines).split(), text.split()
    if said[-1:] == ["…"] and words[-1:] != ["…"]:
        said.pop()
    widest = max(width, WIDEST_WORD)
    if all(text_width(word, 12.0) <= widest for word in words):
        bare = [[word.rstrip(",|") for word in some[: len(said)]] for some in (said, words)]
        assert bare[0] == bare[1], "no separator stands in front of an ellipsis"
        assert len(said) == len(words) or lines[-1].endswith(" …")
    for line in lines:
        kept = line.removesuffix(" …")
        assert text_width(kept, 12.0) <= max(width, *(text_width(word, 12.0) for word in kept.split()), 0.0) + 1e-3
        assert text_width(kept, 12.0) <= widest + 1e-3


@given(st.text(), st.floats(10.0, 300.0), st.booleans())
def test_one_line_is_the_text_or_its_beginning(text, width, bold) -> None:
    line = fit(text, width, 12.0, bold=bold)
    assert text_width(line, 12.0, bold=bold) <= max(width, text_width("…", 12.0, bold=bold)) + 1e-3
    if line != text:
        assert text.startswith(line.removesuffix("…").rstrip(" "))
    if line.endswith(" …") and line != text:
        assert text[len(line) - 2 :][:1] in tuple(" ,|"), "cut between words"


def test_wrapping() -> None:
    assert wrap("short", 100.0, 12.0, 3) == ("short",)
    assert wrap("Dallas, Houston → Texas", 100.0, 12.0, 3) == ("Dallas, Houston", "→ Texas")
    assert wrap("Houston | Dallas | El Paso → Austin", 100.0, 12.0, 3) == (
        "Houston | Dallas |",
        "El Paso",
        "→ Austin",
    )
    assert wrap("in a long question that goes on → ?", 80.0, 12.0, 3) == ("in a long", "question …", "→ ?")
    assert wrap("Donaudampfschifffahrt", 60.0, 12.0, 3) == ("Donaudampfschifffahrt",)
    assert wrap("a Donaudampfschifffahrt b", 60.0, 12.0, 2) == ("a", "Donaudampfschifffahrt …")
    assert "".join(wrap("x" * 100, 60.0, 12.0, 9)) == "x" * 100, "a word wider than any line goes on in the next"
    assert wrap('a | bb "c …" d', 20.0, 12.0, 9) == ("a |", "bb", '"c …"', "d"), "signs stay with their word"
    assert fit("Donaudampfschifffahrt", 60.0, 12.0) == "Donaud…", "alone, and too long"
    assert wrap("a → Donaudampfschiff", 90.0, 12.0, 3)[0] == "a", "an arrow stands with what it points at"
    for text in ("w30", "Austin", "i"):
        assert fit(text, text_width(text, 12.0), 12.0) == text
    assert fit("", 5.0, 12.0) == ""
