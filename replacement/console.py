"""What the commands print: tables without lines, titled sections, one JSON object."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 120
"""A pipe has no width of its own, and the tables are wide."""
SHOWN_ROWS = 20
"""Rows of a long table that `repr` and notebooks show."""


def table(
    *heads: str, rows: Iterable[Iterable[object]] = (), texts: Collection[str] = (), header: bool = True
) -> Table:
    """A table whose first column and those named in `texts` hold text; the others hold numbers, set to the right.

    Cells of `rows` are never read as markup; use `add_row` for rows that are added later and may hold text of others.
    """
    result = Table(box=None, padding=(0, 2, 0, 0), header_style="bold blue", show_header=header)
    for place, head in enumerate(heads):
        is_text = place == 0 or head in texts
        result.add_column(Text(head), justify="left" if is_text else "right", vertical="top", overflow="fold")
    for row in rows:
        add_row(result, *row)
    return result


def first_rows(
    *heads: str, rows: Iterable[Iterable[object]], n_rows: int, texts: Collection[str] = ()
) -> RenderableType:
    """The first `SHOWN_ROWS` of `n_rows` rows as a table, and the number of those left out."""
    shown = table(*heads, rows=itertools.islice(rows, SHOWN_ROWS), texts=texts)
    return Group(shown, Text(f"... and {n_rows - SHOWN_ROWS:,} more")) if n_rows > SHOWN_ROWS else shown


def add_row(to: Table, *cells: object) -> None:
    """Add a row of texts, none of which is read as markup."""
    to.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def pairs(facts: Iterable[tuple[object, object]], *, width: int = 0) -> Table:
    """Names and values in two columns without heads, the first of at least `width` characters."""
    result = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    result.add_column(min_width=width)
    result.add_column(overflow="fold")
    for name, value in facts:
        add_row(result, name, value)
    return result


def section(title: str, body: RenderableType) -> Group:
    """A title with its content indented below, and a blank line."""
    return Group(Text(title, style="bold blue"), Padding(body, (0, 0, 1, 2), expand=False))


def show(page: RenderableType, console: Console | None = None) -> None:
    """Print to stdout; nothing is read as markup or coloured by guesswork."""
    console = console or Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(page, highlight=False, markup=False, soft_wrap=False)


def finite(value: Any) -> Any:
    """The same JSON value with numbers that JSON cannot hold (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show_json(facts: Mapping[str, Any]) -> None:
    """Print one JSON object on one line of stdout; NaN and infinity are refused."""
    sys.stdout.write(json.dumps(facts, allow_nan=False) + "\n")
