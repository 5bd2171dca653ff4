"""How numbers of a report are written, in the terminal and on the page."""

from __future__ import annotations

from typing import Any

MISSING = "–"


def nats(value: int | float | None) -> str:
    """KL and losses: four decimals, or two digits where that would say 0."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if abs(value) >= 5e-5 or value == 0 else f"{value:.1e}"


def signed(value: int | float | None) -> str:
    """A difference, in nats."""
    return MISSING if value is None else f"{round(value, 4) + 0.0:+.4f}"  # + 0.0: no negative zero


def share(value: int | float | None) -> str:
    """A fraction, four decimals."""
    return MISSING if value is None else f"{value:.4f}"


def count(value: int | float | None) -> str:
    """A number of things."""
    return MISSING if value is None else f"{value:,.0f}"


def one_decimal(value: int | float | None) -> str:
    """A mean number of things."""
    return MISSING if value is None else f"{value:,.1f}"


def percent(value: int | float | None) -> str:
    """A fraction as a percentage."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def visible(text: Any) -> str:
    """A token as it can be shown: white space and control characters made visible, nothing else changed."""
    if text is None:
        return MISSING
    shown = str(text).replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in shown)
