"""The report folder of a validation: one page that needs nothing else, and its plots, tables and facts as files.

    DIR/index.html  DIR/validation.json  DIR/plots/*.svg, *.png  DIR/tables/*.csv

Every text that comes from a model, a tokenizer or a user is escaped; the page holds no script and loads nothing.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import jinja2

from replacement.validation.numbers import nats, one_decimal, percent, share, signed
from replacement.validation.plots import as_data_uri, as_png, as_svg, plots
from replacement.validation.protocols import PROPAGATED
from replacement.validation.tables import Table, tables

TEMPLATE = Path(__file__).with_name("page.html.jinja")


def check_folder(folder: Path) -> None:
    """Refuse a report folder before anything is measured for it.

    Raises:
        ValueError: the path is a file.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"report: expected a folder, {place} is a file")


def write_report(facts: dict[str, Any], folder: str | Path) -> Path:
    """Write the folder, replacing what an earlier report left of these files; returns the page.

    Raises:
        ValueError: the path is a file.
    """
    folder = Path(folder)
    check_folder(folder)
    pictures = {}
    for name, figure in plots(facts).items():
        svg = as_svg(figure)
        pictures[name] = as_data_uri(svg)
        _write(folder / "plots" / f"{name}.svg", svg)
        _write(folder / "plots" / f"{name}.png", as_png(figure))
    for table in tables(facts):
        _write(folder / "tables" / f"{table.key}.csv", _csv(table).encode())
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    _write(folder / "validation.json", text.encode())
    page = folder / "index.html"
    _write(page, render(facts, pictures).encode())
    return page


def render(facts: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page as text.

    Args:
        pictures: data addresses of the plots, by the key of the table each belongs to.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(facts=facts, tables=tables(facts), pictures=pictures, figures=_figures(facts))


def _figures(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The few numbers on top of the page."""
    output = facts["protocols"][PROPAGATED]
    return [
        ("KL, errors propagating (nats)", nats(output["kl"]["mean"])),
        ("cross-entropy increase (nats)", signed(output["cross_entropy_increase"])),
        ("top-1 agreement", percent(output["agreement"]["all"])),
        ("variance unexplained", share(facts["reconstruction"]["unexplained"])),
        ("active features per token", one_decimal(facts["reconstruction"]["l0"])),
    ]


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.heads)
    writer.writerows(table.rows)
    return file.getvalue()


def _write(target: Path, content: bytes) -> None:
    """Write a file, atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(content)
    os.replace(scratch, target)
