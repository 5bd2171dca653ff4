"""The page of a validation for terminals and notebooks, made of the same tables as the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from replacement import console
from replacement.validation.tables import tables

WORST_SHOWN = 5


def page(facts: Mapping[str, Any]) -> RenderableType:
    """Every table for the terminal, without the columns that do not fit there; of the worst tokens the first few."""
    parts: list[RenderableType] = []
    for table in tables(dict(facts)):
        columns = table.brief or tuple(range(len(table.heads)))
        heads = [table.heads[column] for column in columns]
        rows = table.rows[: WORST_SHOWN if table.key == "worst_tokens" else None]
        cells = ([row[column] for column in columns] for row in rows)
        shown = console.table(*heads, rows=cells, texts=table.heads[: table.n_texts])
        shown.columns[0].no_wrap = table.n_texts == 1
        parts += [Text(table.title, style="bold"), shown, Text(f"{table.note}\n", style="dim")]
    return Group(*parts)
