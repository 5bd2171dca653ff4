"""Widths against the font metrics of Helvetica, and lines that fit."""

from pathlib import Path

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits.export.text_metrics import fit, text_width, wrap

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


@given(st.text(), st.floats(10.0, 300.0), st.integers(1, 4), st.booleans())
def test_lines_fit_and_say_what_was_cut(text, width, most, bold) -> None:
    lines = wrap(text, width, 12.0, most, bold=bold)
    assert 1 <= len(lines) <= most
    least = text_width("…", 12.0, bold=bold)
    assert all(text_width(line, 12.0, bold=bold) <= max(width, least) + 1e-3 for line in lines)
    if not any(line.endswith("…") for line in lines):
        assert "".join("".join(lines).split()) == "".join(text.split())


def test_wrapping() -> None:
    assert wrap("short", 100.0, 12.0, 3) == ("short",)
    assert wrap("Dallas, Houston → Texas", 100.0, 12.0, 3) == ("Dallas, Houston", "→ Texas")
    assert wrap("Houston | Dallas | El Paso → Austin", 100.0, 12.0, 3) == (
        "Houston | Dallas |",
        "El Paso",
        "→ Austin",
    )
    assert wrap("in a long question that goes on → ?", 80.0, 12.0, 3) == ("in a long", "question tha…", "→ ?")
    assert wrap("Donaudampfschifffahrt", 60.0, 12.0, 3)[0].endswith("…")
    assert wrap("a → Donaudampfschiff", 90.0, 12.0, 3)[0] == "a", "an arrow stands with what it points at"
    for text in ("w30", "Austin", "i"):
        assert fit(text, text_width(text, 12.0), 12.0) == text
    assert fit("", 5.0, 12.0) == ""
